"""The trainer on real sources: every bad case to the end, a shard that vanishes, resume, the data's share."""

import json
import signal

import pytest
import torch
from data_sets import caption, jpeg, write_bad_folder, write_folder, write_tar, write_tars
from tiny_pipelines import write_sdxl

from senseflow.config import Config, Data, UserError
from senseflow.data.dali import why_not
from senseflow.data.stream import open_stream
from senseflow.draws import Draws
from senseflow.models.adapter import Condition
from senseflow.train import iterate, main

pytest.importorskip("diffusers")
CPU = torch.device("cpu")
SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.dtype=fp32", "train.precision=fp32", "train.gen_every=2", "log.every=2",
    "log.tensorboard=false", "log.progress=false", "eval.grid=1", "eval.teacher_steps=1", "eval.every=1000",
    "disc.kind=none", "data.batch=8", "data.workers=2", "train.checkpoint_every=4", "train.keep_last=9",
)]  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SENSEFLOW_CACHE", str(tmp_path_factory.getbasetemp() / "senseflow-cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(write_sdxl(tmp_path_factory.mktemp("pipelines") / "sdxl"))


def run(teacher, data, out, *more):
    return main(["sdxl", "--teacher", teacher, "--data", str(data), "--out", str(out), *SMALL, *more])


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"fake"' in line]


class Text:
    """Stands in for an adapter where only the data are looked at."""

    latent_shape = (4, 8, 8)

    def encode_prompts(self, prompts):
        return Condition(torch.zeros(len(prompts), 1, 1), torch.zeros(len(prompts), 1))


def stream(path, **fields):
    cfg = Config(data=Data(path=str(path), **fields))
    return open_stream(cfg, Text(), Draws(0), CPU)


with_dali = pytest.mark.skipif(bool(why_not()), reason=f"no DALI: {why_not()}")


@pytest.mark.parametrize("decoder", ["pil", pytest.param("dali", marks=with_dali)])
def test_a_set_with_every_bad_case_trains_to_the_end(teacher, tmp_path, decoder):
    """302 usable pictures and one of each bad kind, one epoch: exact counts by reason in the run's skipped.jsonl."""
    expected = write_bad_folder(tmp_path / "set", 300)
    items = 302 + sum(expected.values()) - 4  # the listing itself drops a picture without caption and three rows
    out = tmp_path / "run"
    steps = -(-items // 45)
    flags = ["--train.iterations", str(steps), "--data.batch", "45", "--model.side", "32"]
    assert run(teacher, tmp_path / "set", out, *flags, "--data.decoder", decoder) == 0
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {why: sum(row["reason"] == why for row in listed) for why in expected} == expected
    assert len(listed) == sum(expected.values()) == len({row["key"] for row in listed})
    assert len(rows(out)) == steps and all(row["fake"] > 0 for row in rows(out))


@pytest.mark.parametrize("workers", [0, 3])
def test_tars_with_every_bad_case_and_a_shard_that_vanishes(tmp_path, workers):
    """Sixty shards of ten: one is no tar, one breaks off in its last sample, one has a sample without caption and one
    twice; one is removed after the first epoch. Every sample that is left is served; counts are exact."""
    folder = write_tars(tmp_path / "set", 60, 10, width=20, height=18)
    names = sorted(folder.glob("*.tar"))
    names[5].write_bytes(b"not a tar at all" * 100)
    good = [(f"{i}", {"jpg": jpeg(i, 20, 18), "txt": caption(i).encode()}) for i in range(10)]
    data = write_tar(names[6], good).read_bytes()
    names[6].write_bytes(data[: data.rindex(b"9.jpg") + 600])
    write_tar(names[7], [*good, ("3", good[3][1]), ("bare", {"jpg": good[0][1]["jpg"]})])
    made = stream(folder, workers=workers)
    made.begin(tmp_path / "run", 0)
    count = len(made)
    assert count == 57 * 10 + 9 + 10
    per_epoch = count // 19
    first = torch.cat([made.batch(i, 19).items for i in range(per_epoch)])
    assert sorted(first.tolist()) == list(range(count))
    names[8].unlink()
    last = torch.cat([made.batch(i, 19).items for i in range(per_epoch, 3 * per_epoch + 1)])
    gone = {i for i in range(count) if made.loader.reader.key(i).startswith(str(names[8]))}
    assert set(last[-2 * 19 :].tolist()) & gone == set() and set(last.tolist()) >= set(range(count)) - gone
    expected = {"unreadable tar": 10, "half tar": 1, "duplicate key": 1, "no caption": 1, "missing file": 10}
    assert dict(made.skipped.counts) == expected
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sum(row["samples"] for row in listed) == 23
    names[9].unlink()  # ten more: 33 of 602 is over 5 %
    with pytest.raises(UserError, match=r"cannot be used \(missing file: 1\d\), allowed is 5 %; see .*skipped.jsonl"):
        for i in range(3 * per_epoch + 1, 6 * per_epoch):
            made.batch(i, 19)
    made.close()


def test_a_stopped_run_resumes_to_the_same_bits_and_refuses_other_data(teacher, tmp_path, monkeypatch, capsys):
    """Stopped in the middle of an epoch; other threads and batches ahead, and the folder moved, change nothing."""
    folder = write_folder(tmp_path / "set", 21)
    (folder / "0004.jpg").write_bytes(b"")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--train.iterations", "6", "--data.crop", "random", "--train.cooldown", "0", "--train.lr", "1e-4"]
    assert run(teacher, folder, whole, *flags) == 0

    def interrupted(cfg, parts, updates, batch, iteration):
        if iteration == 3:
            signal.raise_signal(signal.SIGINT)
        return iterate(cfg, parts, updates, batch, iteration)

    with monkeypatch.context() as patch:
        patch.setattr("senseflow.train.iterate", interrupted)
        assert run(teacher, folder, parts, *flags) == 130
    folder = folder.rename(tmp_path / "moved")
    assert run(teacher, folder, parts, *flags, "--resume", "--data.workers", "0") == 0
    assert rows(parts) == rows(whole) and len(rows(whole)) == 6
    assert [json.loads(line)["reason"] for line in (parts / "skipped.jsonl").read_text().splitlines()] == ["empty file"]
    (folder / "0021.jpg").write_bytes(jpeg(21))
    (folder / "0021.txt").write_text("one more")
    assert run(teacher, folder, parts, *flags, "--resume") == 2
    assert "holds other samples than it did in the checkpoint" in capsys.readouterr().err


def test_ranks_see_shares_of_the_same_batches(tmp_path):
    """Pixels, numbers, captions and crops belong to samples: two ranks have together what one has."""
    folder = write_tars(tmp_path / "set", 1, 11)
    cfg = Config(data=Data(path=str(folder), workers=2, captions="alt", crop="random"))
    one = open_stream(cfg, Text(), Draws(0), CPU)
    two = [open_stream(cfg, Text(), Draws(0), CPU, rank, 2) for rank in range(2)]
    for i in range(6):
        whole, parts = one.share(i, 5), [data.share(i, 5) for data in two]
        assert torch.equal(whole.tensors["pixels"], torch.cat([p.tensors["pixels"] for p in parts]))
        assert torch.equal(whole.samples, torch.cat([p.samples for p in parts]))
        assert whole.texts["text"] == [text for p in parts for text in p.texts["text"]]
    for data in (one, *two):
        data.close()


def test_several_captions_come_up_alike(tmp_path):
    """Of two captions each, over 40 epochs, about half the draws are the first: 200 with a deviation of 10."""
    made = stream(write_tars(tmp_path / "set", 1, 10), workers=0, captions="alt")
    texts = [text for i in range(40) for text in made.share(i, 10).texts["text"]]
    assert abs(sum(text.startswith("first") for text in texts) - 200) < 50
    assert len(set(texts)) == 20


def test_the_profile_says_how_long_the_data_take(teacher, tmp_path, capsys):
    folder = write_folder(tmp_path / "set", 9)
    assert run(teacher, folder, tmp_path / "run", "--profile", "--data.batch", "2") == 0
    table = [line.split("│")[1:] for line in capsys.readouterr().out.splitlines() if "│" in line]
    phases = {cells[0].strip(): cells for cells in table}
    assert 0 < float(phases["data"][3]) < 100 and 0 < float(phases["encode"][3]) < 100
