"""The commands and scripts of docs/distributed.md as they are typed: torchrun on one node and two, srun, signals.

The scripts in examples/ run as they are, on 2 ranks a node instead of 8 and 2 nodes instead of 4: a `torchrun`, `srun`
and `scontrol` that stand before the real ones in PATH say so. The nodes are this machine, the ranks talk by gloo.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import embedded_teacher

from senseflow import checkpoint

ROOT, BIN = Path(__file__).parent.parent, Path(sys.executable).parent
SMALL = [f"--{setting}" for setting in (
    "data.images=pictures", "data.batch=4", "disc.taps=2", "disc.width=8", "disc.size=28", "eval.prompts=4",
    "eval.teacher_steps=1", "eval.grid=4", "eval.every=1000", "log.tensorboard=false", "log.progress=false",
    "train.threads=1", "train.gen_every=2", "train.checkpoint_every=2", "train.cooldown=0", "train.lr=1e-4",
)]  # fmt: skip
RATE = 1e-4
pytestmark = pytest.mark.slow

TORCHRUN = """#!/bin/bash
words=()
for word in "$@"; do
  case "$last $word" in
    "--nproc-per-node 8" | "--dist.shard 8" | "--nnodes 4") word=2 ;;
    *localhost:29400) word=localhost:$PORT ;;
  esac
  words+=("$word") last=$word
done
exec {torchrun} "${words[@]}"
"""
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
words=()
for word in "$@"; do [ "$last $word" = "--dist.shard 8" ] && word=2; words+=("$word") last=$word; done
export SLURM_NTASKS=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "${words[@]}" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
status=0
for pid in "${pids[@]}"; do
  wait "$pid"; mine=$?
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; mine=$?; done  # the first wait ends with the signal
  [ $mine -gt $status ] && status=$mine
done
exit $status
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > "$QUEUE"
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return embedded_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def start(teacher, tmp_path):
    """start(command, *flags, **environment): a process; its output is in tmp_path/log."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("torchrun", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text.replace("{torchrun}", str(BIN / "torchrun")))
        (stubs / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= dict(
        PYTHONPATH=f"{ROOT / 'kernels'}{os.pathsep}{ROOT}", SENSEFLOW_KERNELS="torch", OMP_NUM_THREADS="1",
        SENSEFLOW_CACHE=str(tmp_path / "cache"), PATH=f"{stubs}:{BIN}:{os.environ['PATH']}", PORT=str(free_port()),
        QUEUE=str(tmp_path / "queue"), HEAD="localhost", SLURM_JOB_NODELIST="here", SLURM_JOB_ID=str(os.getpid()),
    )  # fmt: skip
    running = []

    def run(command: list[str], *flags: str) -> subprocess.Popen:
        log = (tmp_path / "log").open("a")
        more = ["tiny", "--teacher", str(teacher), *SMALL, *flags]
        how = dict(env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
        process = subprocess.Popen([*command, *more], **how)
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def log_of(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text()


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def newest(out: Path) -> tuple[int, int]:
    """(iteration, ranks that saved it) of the newest checkpoint."""
    path = checkpoint.newest(out / "checkpoints")
    assert path is not None
    return checkpoint.iteration_of(path), checkpoint.manifest(path)["ranks"]


def first_checkpoint(out: Path, *processes: subprocess.Popen) -> None:
    while not any((out / "checkpoints").glob("step-*")):
        assert all(p.poll() is None for p in processes), "it ended before its first checkpoint"
        time.sleep(0.05)


def near(out: Path, other: Path) -> None:
    """The same training on other numbers of ranks: within the rounding that Adam makes of its reductions."""
    a, b = weights(out), weights(other)
    assert a.keys() == b.keys()
    assert all((a[k] - b[k]).abs().mean() <= 0.05 * RATE for k in a)


ONE = [sys.executable, "-m", "senseflow.train"]


def test_torchrun_trains_and_saves_and_one_process_goes_on(start, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    two = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "senseflow.train"]
    assert start(two, f"--out={out}", "--train.iterations=4").wait() == 0, log_of(tmp_path)
    assert newest(out) == (4, 2)
    assert start(ONE, f"--out={out}", "--train.iterations=6", "--resume").wait() == 0, log_of(tmp_path)
    assert newest(out) == (6, 1)
    line = f"resumed from {out}/checkpoints/step-00000004, iteration 4, saved by 2 rank(s), now 1"
    assert log_of(tmp_path).count(line) == 1
    assert start(ONE, f"--out={alone}", "--train.iterations=6").wait() == 0, log_of(tmp_path)
    near(out, alone)


def test_two_nodes_by_the_script_share_a_copy_each(start, tmp_path):
    """torchrun_4x8.sh: HSDP, 2 nodes of 2 ranks that find each other at HEAD."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    script = ["bash", str(ROOT / "examples" / "torchrun_4x8.sh")]
    nodes = [start(script, f"--out={out}", "--train.iterations=4") for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0], log_of(tmp_path)
    assert newest(out) == (4, 4)
    assert start(ONE, f"--out={alone}", "--train.iterations=4").wait() == 0, log_of(tmp_path)
    near(out, alone)


def test_the_script_of_one_node_goes_on_after_a_signal_to_torchrun(start, tmp_path):
    """SIGTERM to torchrun: its workers save and end with 75, it with 1; the script starts it again with --resume."""
    out = tmp_path / "out"
    script = ["bash", str(ROOT / "examples" / "torchrun_1x8.sh")]
    run = start(script, f"--out={out}", "--train.iterations=30")
    first_checkpoint(out, run)
    found = subprocess.run(["pgrep", "-P", str(run.pid), "-f", "torchrun"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGTERM)
    assert run.wait() == 0, log_of(tmp_path)
    said = log_of(tmp_path)
    assert "attempt 1 ended with status 1" in said and said.count(f"resumed from {out}/checkpoints/step-") == 1
    assert "and saved: go on with the same command and --resume" in said and newest(out) == (30, 2)


def test_slurm_requeues_a_preempted_job_and_it_goes_on(start, tmp_path):
    """slurm_4x8.sh: USR1 to the tasks; all save and end with 75, and the job queues itself again."""
    out = tmp_path / "out"
    script = ["bash", str(ROOT / "examples" / "slurm_4x8.sh")]
    job = start(script, "--out", str(out), "--train.iterations=30")
    first_checkpoint(out, job)
    found = subprocess.run(["pgrep", "-P", str(job.pid), "-f", "srun"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGUSR1)
    assert job.wait() == 75, log_of(tmp_path)
    assert (tmp_path / "queue").read_text() == f"requeue {os.getpid()}\n"
    assert 2 <= newest(out)[0] < 30 and newest(out)[1] == 2
    again = start(script, "--out", str(out), "--train.iterations=30")
    assert again.wait() == 0, log_of(tmp_path)
    assert newest(out) == (30, 2) and "resumed from" in log_of(tmp_path)
