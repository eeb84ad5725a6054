"""A run's checkpoints: crashes at every step of a save, damage, a full disk, which are kept, what resume refuses."""

import json
import resource
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import launch
from test_checkpoint import killed_at, names

from senseflow import checkpoint
from senseflow.checkpoint import load_latest, newest
from senseflow.config import UserError
from senseflow.dist import World
from senseflow.fields import to_dict
from senseflow.presets import tiny
from senseflow.resuming import check_config, is_best
from senseflow.saving import Saver


def state_of(number: int) -> dict:
    numbers = torch.full((40,), number + 0.5)
    return {"at": number, "nested": {"w": numbers, "low": numbers.to(torch.int16), 3: [1.5, None, (2,), numbers[0]]}}


def saver(folder: Path, keep_last: int = 9, keep_best: int = 0) -> Saver:
    return Saver(folder, World(), keep_last, keep_best, background=False)


def same(found, iteration: int) -> bool:
    """Whether load_latest found the state of `iteration`, bit for bit."""
    if found is None or found[0] != iteration:
        return False
    mine, theirs = checkpoint.split(state_of(iteration)), checkpoint.split(found[1])
    equal = mine[0].keys() == theirs[0].keys() and all(torch.equal(mine[0][k], theirs[0][k]) for k in mine[0])
    return equal and mine[1] == theirs[1]


def quiet_latest(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_latest(folder)


def check_crash(folder: Path, event: int) -> tuple[bool, int]:
    """A save killed at its event-th file-system step: (whether it died, the iteration that is found after)."""
    died = killed_at(event, lambda: saver(folder, 1).save(2, state_of(2)))
    found = quiet_latest(folder)
    assert found is not None and same(found, found[0])
    return died, found[0]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    saver(folder).save(1, state_of(1))
    return folder


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_crash_at_any_step_leaves_a_whole_checkpoint(every, first, tmp_path):
    """keep_last = 1 is the hardest: the only other checkpoint is removed by this very save."""
    found, event, died = [], 0, True
    while died:
        folder = shutil.copytree(first, tmp_path / str(event))
        died, iteration = check_crash(folder, event)
        found.append(iteration)
        event += every
    assert found[0] == 1 and found[-1] == 2 and found == sorted(found) and len(found) > 20 // every
    saver(folder, 1).save(3, state_of(3))
    assert names(folder) == ["step-00000003"]


def test_any_damage_is_one_line_and_the_one_before_is_used(first, tmp_path):
    folder = shutil.copytree(first, tmp_path / "c")
    saver(folder).save(2, state_of(2))
    assert same(load_latest(folder), 2)
    path = folder / "step-00000002"
    files = sorted(p.name for p in path.iterdir())
    assert files == [".metadata", "__0_0.distcp", "manifest.json", "plain.pt"]
    for name in files:
        whole = (path / name).read_bytes()
        middle = bytearray(whole)
        middle[len(whole) // 2] ^= 0x10
        for damaged in (whole[:-1], b"", bytes(middle), None):
            (path / name).unlink() if damaged is None else (path / name).write_bytes(damaged)
            with pytest.warns(UserWarning) as said:
                assert newest(folder) == folder / "step-00000001", (name, damaged)
            text = [str(w.message) for w in said]
            assert (
                len(text) == 1 and name in text[0] and "iteration 1 is used instead" in text[0] and "\n" not in text[0]
            )
            (path / name).write_bytes(whole)
    assert newest(folder) == path


def test_another_version_is_refused_by_name(first, tmp_path):
    folder = shutil.copytree(first, tmp_path / "c")
    path = folder / "step-00000001"
    record = checkpoint.manifest(path)
    files = record.pop("files")
    record.pop("version")
    (path / "manifest.json").unlink()
    checkpoint.VERSION, kept = 7, checkpoint.VERSION
    try:
        checkpoint.write_manifest(path, files, **record)
    finally:
        checkpoint.VERSION = kept
    assert json.loads((path / "manifest.json").read_text())["version"] == 7
    with pytest.raises(UserError, match=r"step-00000001 has version 7: this program reads version 1 alone"):
        newest(folder)


def test_a_full_disk_is_one_line_and_loses_nothing(first, tmp_path, monkeypatch):
    folder = shutil.copytree(first, tmp_path / "c")
    mine = saver(folder, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # while the tensors are written
    try:
        with pytest.raises(UserError, match="step-00000002 cannot be written: File too large") as e:
            mine.save(2, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value) and names(folder) == ["step-00000001"] and same(load_latest(folder), 1)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr("senseflow.saving.shutil.disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"no room for checkpoint .*c of iteration 3: .* GB to write, 0.001 GB free"):
        mine.save(3, state_of(3))
    assert names(folder) == ["step-00000001"]


def test_a_failure_behind_the_training_is_heard_at_the_next_wait(tmp_path):
    behind = Saver(tmp_path / "c", World(), 2)
    behind.save(1, state_of(1))
    behind.wait()
    assert behind.last == tmp_path / "c" / "step-00000001"
    with pytest.raises(TypeError, match=r"state\['x'\] is a object"):
        behind.save(2, {"x": object()})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        behind.save(2, {"w": torch.zeros(100_000)})
        assert behind.thread is not None
        behind.thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert behind.failed
    with pytest.raises(UserError, match=r"cannot be written: File too large; last good checkpoint: .*step-00000001"):
        behind.save(3, state_of(3))
    behind.save(3, state_of(3))
    behind.wait()
    assert names(tmp_path / "c") == ["step-00000001", "step-00000003"]


def fail_on_one(world: World, folder: Path) -> None:
    """A save that goes wrong on one rank, at three places: whichever it is, all ranks hear of it, and none goes on."""
    from unittest import mock

    mine = Saver(folder, world, 2)
    mine.save(1, state_of(1))
    mine.wait()
    for number, (rank, name) in enumerate([(1, "digest"), (0, "digest"), (0, "publish")], 2):
        broken = mock.Mock(side_effect=OSError(28, "No space left on device"))
        patch = mock.patch(f"senseflow.saving.checkpoint.{name}", broken)
        with patch if world.rank == rank else nullcontext():
            mine.save(number, state_of(number))
            assert mine.thread is not None
            mine.thread.join()
        assert mine.failed and mine.last == folder / "step-00000001"
        with pytest.raises(UserError, match=rf"step-0000000{number} cannot be written: .*No space left") as e:
            mine.wait()
        assert "\n" not in str(e.value)
        world.barrier()
        # what was whole before it could be renamed stays
        left = [] if name == "digest" else [f".partial-0000000{number}"]
        assert names(folder) == [*left, "step-00000001"]
        world.barrier()  # before the next save begins
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    tensors = {f"w{i}": torch.zeros(30_000) for i in range(4)}  # each rank writes its share of them
    with pytest.raises(UserError, match=r"step-00000009 cannot be written: .*File too large"):
        mine.save(9, tensors)
        mine.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    mine.save(10, state_of(10))
    mine.wait()
    world.barrier()
    assert names(folder) == ["step-00000001", "step-00000010"]


@pytest.mark.slow
def test_a_failure_of_one_rank_is_one_of_all(tmp_path):
    launch(2, fail_on_one, tmp_path)
    assert same(load_latest(tmp_path), 10)


def test_the_copy_is_of_the_moment_of_the_save(tmp_path):
    state = state_of(1)
    behind = Saver(tmp_path, World(), 2)
    behind.save(1, state)
    for t in checkpoint.split(state)[0].values():
        t.zero_()  # as the next step would
    behind.wait()
    assert same(load_latest(tmp_path), 1)


def test_the_best_are_kept_beside_the_last(tmp_path):
    mine = saver(tmp_path, keep_last=2, keep_best=2)
    for iteration, score in ((1, 5.0), (2, 1.0), (3, None), (4, 3.0), (5, 9.0), (6, None)):
        mine.save(iteration, state_of(iteration), score=score)
    assert names(tmp_path) == [f"step-0000000{i}" for i in (2, 4, 5, 6)]
    assert is_best({1: 5.0, 2: 1.0}, 2, 1) and not is_best({1: 5.0, 2: 1.0}, 1, 1)
    assert is_best({1: 5.0, 2: 1.0}, 1, 2) and not is_best({1: 5.0}, 3, 2)


def test_resume_names_the_field_that_differs():
    cfg = tiny()
    check_config(to_dict(cfg), replace(cfg, out="elsewhere", train=replace(cfg.train, iterations=7, accumulate=2)))
    check_config(to_dict(cfg), replace(cfg, data=replace(cfg.data, workers=0), dist=replace(cfg.dist, shard=2)))
    for other, line in (
        (replace(cfg, model=replace(cfg.model, steps=2)), "model.steps was 4 in the checkpoint and is 2 now"),
        (replace(cfg, seed=3), "seed was 0 in the checkpoint and is 3 now"),
        (
            replace(cfg, optim=replace(cfg.optim, name="torch")),
            "optim.name was 'senseflow' in the checkpoint and is 't",
        ),
        (replace(cfg, data=replace(cfg.data, batch=4)), "data.batch was 32 in the checkpoint and is 4 now"),
    ):
        with pytest.raises(UserError, match=line):
            check_config(to_dict(cfg), other)
