"""kill -9 at any moment, --resume, and the weights are those of a run that was never stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ITERATIONS, KILLS = 40, 5
FLAGS = (
    f"--train.iterations {ITERATIONS} --data.batch 2 --train.gen_every 2 --train.checkpoint_every 3 --eval.prompts 4 "
    "--eval.teacher_steps 1 --eval.grid 4 --eval.every 1000 --disc.taps 2 --disc.width 8 --disc.size 28 --log.every 2 "
    "--log.tensorboard false --log.progress false --train.threads 1"
)


def start(out: Path, cache: Path, resume: bool) -> subprocess.Popen:
    command = [sys.executable, "-m", "senseflow.train", "--out", str(out), *FLAGS.split()]
    command += ["--resume"] if resume else []
    root = Path(__file__).parent.parent
    env = {**os.environ, "SENSEFLOW_CACHE": str(cache), "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    return subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.DEVNULL)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, tmp_path / "cache", False).wait() == 0
    chance = random.Random(0)
    kills = 0
    while kills < KILLS:
        begun = any((killed / "checkpoints").glob("step-*"))
        process = start(killed, tmp_path / "cache", begun)
        while process.poll() is None and not any((killed / "checkpoints").glob("step-*")):
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 15))
        if process.poll() is not None:
            assert process.returncode == 0  # it ended before the kill
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills > 0
    assert start(killed, tmp_path / "cache", True).wait() == 0
    a, b = weights(whole), weights(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
