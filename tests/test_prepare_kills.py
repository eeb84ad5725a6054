"""A cache is whole after any kill, crash or full disk, and the same bytes as one that was never interrupted."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data_sets import write_bad_folder, write_folder
from tiny_pipelines import write_sdxl

from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.prepare import main as prepare
from senseflow.train import build

pytest.importorskip("diffusers")
CPU = torch.device("cpu")
SMALL = ["--model.side", "64", "--model.dtype", "fp32", "--train.precision", "fp32", "--data.workers", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(flags, folder) of a cache of nine pictures in shards of two."""
    root = tmp_path_factory.mktemp("kills")
    teacher, pictures = write_sdxl(root / "teacher"), write_folder(root / "pictures", 9)
    flags = ["sdxl", "--teacher", str(teacher), "--data", str(pictures), *SMALL, "--shard", "2", "--batch", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENSEFLOW_CACHE", str(root / "cache"))
        assert prepare([*flags, "--out", str(root / "whole")]) == 0
    return flags, root / "whole"


@pytest.fixture(autouse=True)
def _cache(made, monkeypatch):
    monkeypatch.setenv("SENSEFLOW_CACHE", str(made[1].parent / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


def test_two_kills_leave_the_same_bytes(made, tmp_path, monkeypatch):
    """Killed before a rename and after one: the run goes on, redoes nothing finished, ends with the same files."""
    from senseflow.data import shards

    flags, whole = made
    out = tmp_path / "cache"

    class Killed(BaseException):
        pass

    made = []
    real = os.replace

    def replace(source, target):
        if str(target).endswith(".safetensors"):
            made.append(Path(target).name)
            if len(made) == 2:
                raise Killed
        real(source, target)
        if len(made) == 4 and str(target).endswith(".safetensors"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "replace", replace)
        for _ in range(2):
            with pytest.raises(Killed):
                prepare([*flags, "--out", str(out)])
            assert not (out / "index.json").exists()
            with pytest.raises(UserError, match=r"is not finished: run the same senseflow.prepare again"):
                build(parse(["sdxl", "--teacher", flags[2], "--data", str(out), *SMALL], "").config, CPU)
            (out / "shards" / ".images-00003.safetensors.partial-7").write_bytes(b"left by a kill")
        assert prepare([*flags, "--out", str(out)]) == 0
    images = [name for name in made if name.startswith("images")]
    assert sorted(images) == [f"images-{i:05d}.safetensors" for i in (0, 1, 1, 2, 3, 4)]  # the unnamed one alone twice
    assert contents(out) == contents(whole)
    assert prepare([*flags, "--out", str(out)]) == 0 and contents(out) == contents(whole)
    (out / "shards" / "images-00001.json").unlink()  # a shard without its record does not count
    assert prepare([*flags, "--out", str(out)]) == 0 and contents(out) == contents(whole)
    assert len({f.stat().st_mode for f in (out / "shards").iterdir()}) == 1  # whoever may read one may read all


def start(flags, out, *more):
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "senseflow.prepare", *flags, "--out", str(out), *more]
    return subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


PRELOADED = [  # imported once: a start then takes a fork and not ten seconds
    "senseflow.prepare", "transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
]  # fmt: skip


def in_a_process(flags: list[str]) -> None:
    """What a killed process runs."""
    sys.exit(prepare(flags))


@pytest.mark.slow
def test_twenty_kills_leave_the_same_bytes(made, tmp_path):
    """SIGKILL at 20 random moments between the first write and the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = write_folder(tmp_path / "pictures", 160)
    flags = ["sdxl", "--teacher", made[0][2], "--data", str(folder), *SMALL, "--shard", "4", "--batch", "2"]
    flags += ["--train.threads", "1"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    for _ in range(2):  # the second one with everything imported: how long it takes
        shutil.rmtree(whole, ignore_errors=True)
        process = context.Process(target=in_a_process, args=([*flags, "--out", str(whole)],))
        process.start()
        wait_for(process, lambda: (whole / "settings.json").exists())
        began = time.monotonic()
        process.join()
        assert process.exitcode == 0
    span, chance, kills, stages = time.monotonic() - began, random.Random(0), 0, set()
    while kills < 20:
        process = context.Process(target=in_a_process, args=([*flags, "--out", str(out)],))
        process.start()
        there = shards_of(out)
        if chance.random() < 0.75:  # else at any moment from the start on, mostly before it writes
            wait_for(process, lambda there=there: shards_of(out) > there)
        time.sleep(chance.uniform(0, 0.1 * span))
        if not process.is_alive():  # it came to the end: again, from a cache with holes
            assert process.exitcode == 0
            finished = contents(out)
            assert finished == contents(whole)
            for name in chance.sample(sorted(n for n in finished if n.startswith("shards/")), 60):
                (out / name).unlink()  # of a shard and its record, either may be the one that is gone
            (out / "index.json").unlink()
            continue
        process.kill()
        process.join()
        kills += 1
        stages.add(shards_of(out))
    assert prepare([*flags, "--out", str(out)]) == 0
    assert contents(out) == contents(whole)
    assert len(stages) > 5  # the kills did come at different stages


def shards_of(folder: Path) -> int:
    return len(list((folder / "shards").glob("*.safetensors")))


def wait_for(process, ready) -> None:
    """Until it is ready, or the process has ended."""
    while process.is_alive() and not ready():
        time.sleep(0.01)


@pytest.mark.slow
def test_processes_make_the_same_bytes_and_one_that_dies_is_heard(made, tmp_path):
    flags, whole = made
    process = start(flags, tmp_path / "two", "--processes", "2")
    assert process.wait() == 0, process.stderr.read()
    assert contents(tmp_path / "two") == contents(whole)
    process = start(flags, tmp_path / "dead", "--processes", "2")
    workers: list[int] = []
    while process.poll() is None and not workers:
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    assert process.wait() == 2
    assert b"ended with code -9; what is finished stays, run it again" in process.stderr.read()
    process = start(flags, tmp_path / "dead", "--processes", "2")
    assert process.wait() == 0 and contents(tmp_path / "dead") == contents(whole)
    write_bad_folder(tmp_path / "worse", 30)
    process = start([*flags[:3], "--data", str(tmp_path / "worse"), *SMALL], tmp_path / "x", "--processes", "2")
    assert process.wait() == 2 and b"samples cannot be used" in process.stderr.read()


def test_verify_names_what_is_not_as_it_was_written(made, tmp_path, capsys):
    flags, whole = made
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    assert (
        prepare(["--verify", "--out", str(out)]) == 0
        and "23 files as they were written, 0 not" in capsys.readouterr().out
    )
    shard = out / "shards" / "images-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    (out / "shards" / "prompts-00002.safetensors").unlink()
    record = out / "shards" / "images-00003.json"
    record.write_bytes(record.read_bytes().replace(b"star", b"moon"))
    assert prepare(["--verify", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"{shard}: its checksum differs" in printed and "prompts-00002.safetensors: No such file" in printed
    assert f"{record}: its checksum differs" in printed and "20 files as they were written, 3 not" in printed
    with pytest.raises(UserError, match=r"lacks shards/prompts-00002.safetensors"):
        build(parse(["sdxl", "--teacher", flags[2], "--data", str(out), *SMALL], "").config, CPU)
    shard.unlink()
    record.unlink()
    assert prepare([*flags, "--out", str(out)]) == 0  # makes the three again, and only them
    assert contents(out) == contents(whole)


def test_prompts_are_those_of_the_samples_whatever_became_of_them(made, tmp_path, capsys):
    """A picture that could not be read when its shard was made, and can be when it is made again: the prompts that
    follow it move by one, and their shards are made again with it."""
    flags, _ = made
    out, pictures = tmp_path / "cache", tmp_path / "pictures"
    write_folder(pictures, 30)
    flags = [*flags[:3], "--data", str(pictures), *flags[5:]]
    data = (pictures / "0002.jpg").read_bytes()
    assert prepare([*flags, "--out", str(tmp_path / "right")]) == 0
    (pictures / "0002.jpg").write_bytes(b"\0" * len(data))  # of the same size: the same source
    assert prepare([*flags, "--out", str(out)]) == 0
    assert contents(out) != contents(tmp_path / "right")
    (pictures / "0002.jpg").write_bytes(data)
    (out / "shards" / "images-00001.safetensors").unlink()
    capsys.readouterr()
    assert prepare([*flags, "--out", str(out)]) == 0
    assert contents(out) == contents(tmp_path / "right")
    (out / "shards" / "images-00001.json").write_text("{")
    assert prepare([*flags, "--out", str(out)]) == 2
    assert "images-00001.json is spoiled" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_anything_is_made(made, tmp_path, monkeypatch, capsys):
    """Nine samples of 14,336 bytes, then nine prompts, each embeds [77, 32] and pooled [16] in fp32."""
    flags, _ = made
    out, usage = tmp_path / "cache", shutil.disk_usage(tmp_path)
    for rooms, kind, there in (([129_000], "images", 0), ([129_100, 89_000], "prompts", 5)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, rooms=rooms: usage._replace(free=rooms.pop(0)))
        assert prepare([*flags, "--out", str(out)]) == 2
        said = capsys.readouterr()
        assert f"0.0 GB are needed for 9 {kind} and 0.0 GB are free" in said.err
        assert "latents 0.00205 MB, pixels 0.0123 MB, its prompt 0.00992 MB; 9 to make" in said.out
        assert len(list((out / "shards").glob("*.safetensors"))) == there


def test_a_full_disk_is_one_line_and_leaves_what_is_finished(made, tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError
    from safetensors import torch as st

    flags, whole = made
    out, real = tmp_path / "cache", st.save_file

    def full(tensors, path):
        if "images-00002" in str(path):
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(st, "save_file", full)
        assert prepare([*flags, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "No space left on device" in error
        and "run it again" in error
        and "\n" not in error.split("senseflow.prepare")[1]
    )
    assert sorted(f.name for f in (out / "shards").glob("*.safetensors")) == [
        f"images-{i:05d}.safetensors" for i in (0, 1)
    ]
    assert not list((out / "shards").glob(".*"))
    assert prepare([*flags, "--out", str(out)]) == 0 and contents(out) == contents(whole)
