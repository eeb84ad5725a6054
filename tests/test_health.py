"""What ends a run early or turns it back: preemption, divergence, stuck ranks; on one rank and on two."""

import json
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from ranks import launch, start
from safetensors.torch import load_file
from tiny_pipelines import embedded_teacher

from senseflow import checkpoint, iteration
from senseflow.dist import World
from senseflow.watch import Watchdog
from senseflow_kernels import _launch


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return embedded_teacher(tmp_path_factory.mktemp("teacher"))


def state(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.load_latest(out / "checkpoints")
    assert found is not None
    return checkpoint.split(found[1]["updates"])[0]


def same(a: Path, b: Path) -> bool:
    x, y = state(a), state(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    with _launch.torch_path():  # conftest's own is for functions; the interpreter takes half a minute an iteration
        assert ranks.main(teacher, out) == 0
    return out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_rest_is_the_same_bits(number, status, whole, teacher, tmp_path, monkeypatch, capsys):
    def signalled(cfg, parts, updates, batch, it):
        if it == 4:
            signal.raise_signal(number)
        return iteration.iterate(cfg, parts, updates, batch, it)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("senseflow.train.iterate", signalled)
        assert ranks.main(teacher, out) == status
    assert checkpoint.newest(out / "checkpoints") == out / "checkpoints" / "step-00000005"
    capsys.readouterr()
    assert ranks.main(teacher, out, "--resume") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed")]
    assert said == [f"resumed from {out}/checkpoints/step-00000005, iteration 5, saved by 1 rank(s), now 1"]
    assert same(out, whole)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "fake" in row] == list(range(1, 9))


def test_a_run_killed_between_its_last_checkpoint_and_the_student_is_finished(whole, teacher, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out / "student")
    assert ranks.main(teacher, out, "--resume") == 0
    a, b = (load_file(run / "student/transformer/diffusion_pytorch_model.safetensors") for run in (out, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def diverging(times: int):
    """iterate, but the fifth iteration reports a gap that is not finite the first `times` times."""
    left = [times]

    def run(cfg, parts, updates, batch, it):
        metrics = iteration.iterate(cfg, parts, updates, batch, it)
        if it == 5 and left[0]:
            left[0] -= 1
            metrics["fake_real_gap"] = torch.tensor(torch.nan)
        return metrics

    return run


def test_a_diverging_run_stops_or_goes_back(teacher, tmp_path, monkeypatch, capsys):
    back = ("--health.on_divergence", "rollback", "--health.slower", "0.25")
    for name, flags, times, status, line in (
        ("warn", (), 1, 0, r"warning: iteration 6: fake_real_gap is not finite"),
        ("stop", ("--health.on_divergence", "stop"), 1, 2, r"iteration 6: .*not finite; last good .*step-00000004"),
        ("back", back, 2, 0, r"not finite.*; went back to iteration 4, rates times 0.0625"),
        ("often", (*back, "--health.rollbacks", "1"), 2, 2, r"iteration 6: fake_real_gap is not finite; last good"),
    ):
        monkeypatch.setattr("senseflow.train.iterate", diverging(times))
        assert ranks.main(teacher, tmp_path / name, *flags) == status, name
        said = "".join(capsys.readouterr())
        assert re.search(line, said), (name, said)
    found = checkpoint.load_latest(tmp_path / "back" / "checkpoints")
    assert found is not None and found[1]["updates"]["rate"] == 0.0625
    assert not same(tmp_path / "back", tmp_path / "warn")


def hold(event: threading.Event) -> None:
    event.wait(60)


def test_a_stuck_process_is_reported_once_with_its_stack():
    said: list[str] = []
    free = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        free.set()

    with Watchdog(World(), 0.1, say) as dog:
        dog.beat("data of iteration 3")
        hold(free)
    assert len(said) == 1
    assert "stuck: rank 0 in data of iteration 3; the stack of rank 0:" in said[0] and "in hold" in said[0]


@pytest.mark.parametrize("meanwhile", ["nothing", "moves", "ends"])
def test_what_moves_or_ends_before_the_report_is_not_stuck(meanwhile):
    said: list[str] = []
    dog: Any = Watchdog(World(), 100, said.append)
    dog.at -= 101

    def others_tell() -> bool:
        if meanwhile == "moves":
            dog.beat("iteration 2")
        return meanwhile == "ends"

    waits = iter([lambda: False, others_tell, lambda: True])
    dog.ended = SimpleNamespace(wait=lambda _: next(waits)())
    dog._watch()
    assert len(said) == (meanwhile == "nothing")


def stall(world: World, out: Path) -> None:
    said: list[str] = []
    with Watchdog(world, 0.5, said.append) as dog:
        dog.beat("data of iteration 1")
        if world.rank == 1:
            while not said:
                time.sleep(0.05)
        else:
            dog.beat("iteration 1")
        world.barrier()
        while not said:
            time.sleep(0.05)
    (out / f"{world.rank}.txt").write_text(said[0])


def test_of_two_ranks_the_stuck_one_is_named_by_both(tmp_path):
    launch(2, stall, tmp_path)
    waiting, stuck = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert "stuck: rank 1 in data of iteration 1" in waiting and "stack" not in waiting
    assert "stuck: rank 1 in data of iteration 1; the stack of rank 1:" in stuck and "in stall" in stuck


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_on_all(teacher, tmp_path):
    """The others hear of it at the end of the iteration; resumed on one process the run goes on."""
    out = tmp_path / "run"
    both = start(2, teacher, out, "--train.iterations=100000")
    while not any((out / "checkpoints").glob("step-*")):
        time.sleep(0.05)
    both[1].terminate()
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [75, 75]
    newest = checkpoint.newest(out / "checkpoints")
    assert newest is not None and checkpoint.manifest(newest)["ranks"] == 2
    more = checkpoint.iteration_of(newest) + 2
    assert ranks.main(teacher, out, f"--train.iterations={more}", "--resume") == 0
