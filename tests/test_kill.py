"""kill -9 at any moment, --resume, and the weights are those of a run that was never stopped."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import start
from safetensors.torch import load_file
from tiny_pipelines import embedded_teacher

from senseflow import checkpoint

KILLS = {1: 12, 2: 30}  # by ranks
FLAGS = ("--train.iterations=10", "--train.checkpoint_every=1", "--train.keep_last=1")  # most of the time is saving


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def state(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.load_latest(out / "checkpoints")
    assert found is not None
    return checkpoint.split(found[1]["updates"])[0]


def end(ranks: list) -> None:
    for process in ranks:
        process.kill()
        process.join()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:incomplete checkpoint")
@pytest.mark.parametrize("world", KILLS)
def test_killed_runs_end_with_the_same_weights(world, tmp_path):
    """All ranks or one of them (then the rest, as torchrun does), the saves included; every start goes on."""
    teacher = embedded_teacher(tmp_path / "teacher")
    whole, begun = tmp_path / "whole", time.monotonic()
    ranks = start(world, teacher, whole, *FLAGS)
    for process in ranks:
        process.join()
    assert [p.exitcode for p in ranks] == [0] * world
    seconds = time.monotonic() - begun
    chance, kills, lap, interrupted = random.Random(0), 0, 0, 0
    while kills < KILLS[world]:
        out = tmp_path / f"lap{lap}"
        while True:
            resume = ["--resume"] if checkpoint.newest(out / "checkpoints") else []
            begun = time.monotonic()
            ranks = start(world, teacher, out, *FLAGS, *resume)
            deadline = begun + chance.uniform(0.2, 1.0) * seconds
            while time.monotonic() < deadline and any(p.is_alive() for p in ranks):
                time.sleep(0.005)
            if kills >= KILLS[world]:
                for process in ranks:
                    process.join()
            if not any(p.is_alive() for p in ranks):
                assert [p.exitcode for p in ranks] == [0] * world, "a restart must go on"
                # the very first run waited for its imports: kills that come after the end are none
                seconds = seconds if resume else min(seconds, time.monotonic() - begun)
                break
            interrupted += any((out / "checkpoints").glob(".partial-*"))
            if chance.random() < 0.5:
                os.kill(ranks[-1].pid, signal.SIGKILL)  # one alone: the others wait for it
                time.sleep(0.2)
            end(ranks)
            kills += 1
        assert same(weights(out), weights(whole)) and same(state(out), state(whole))
        lap += 1
    print(f"{world} ranks: {kills} kills, {interrupted} within a save, {lap} runs to the end")
    assert interrupted > 0, "no kill met a save"
