"""`python -m senseflow.sample`: students, teachers, prompts, metadata, the same pictures on any number of processes."""

import json
import os
import shutil
import subprocess
import sys
from itertools import chain

import pytest
import torch
from students import WRITE, make_run
from test_export import PRESETS

from senseflow import sample
from senseflow.sample import main, read_png, shares
from senseflow.student import find_student

pytest.importorskip("diffusers")
FILE = "red apple\n\n  penguin \nblue star\na photo of a red star\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    teacher = WRITE["sd35-large"](root / "teacher")
    make_run("sd35-large", teacher, root / "run", ema=True)
    (root / "prompts.txt").write_text(FILE)
    return root


def run(root, out, *more):
    return main(["--student", str(root / "run"), "--prompts-file", str(root / "prompts.txt"), "--out", str(out), *more])


def pictures(out):
    return {p.name: read_png(p) for p in sorted(out.glob("[0-9]*.png"))}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def error(capsys, argv):
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("senseflow.sample: ")]
    assert len(lines) == 1
    return lines[0]


def test_files_and_metadata(made, tmp_path):
    from PIL import Image

    assert run(made, tmp_path, "--seed", "3", "--steps", "3", "--sampler", "euler", "--images", "2") == 0
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows[::2]] == ["red apple", "penguin", "blue star", "a photo of a red star"]
    assert [row["index"] for row in rows] == list(range(8))
    assert set(pictures(tmp_path)) == {row["file"] for row in rows} and rows[2]["file"] == "002-penguin.png"
    with Image.open(tmp_path / rows[2]["file"]) as picture:
        text = picture.text
        assert picture.size == (128, 128)  # of 64 pixels, doubled to be seen
    assert (text["prompt"], text["seed"], text["sampler"], text["steps"]) == ("penguin", "3", "euler", "3")
    assert text["student"] == str(made / "run") and json.loads(text["sigmas"]) == [1.0, 0.857143, 0.6]  # shift 3
    assert not list(tmp_path.glob(".*"))
    found = pictures(tmp_path)
    assert not torch.equal(found["002-penguin.png"], found["003-penguin.png"])  # two noises of one prompt
    assert (tmp_path / "sheet.png").is_file()


def test_a_picture_depends_on_seed_and_index_alone(made, tmp_path):
    """Same bits whatever else is drawn, in batches of one; the seed, the sampler and the weights all matter."""
    assert run(made, tmp_path / "a", "--batch", "1") == 0
    assert run(made, tmp_path / "b", "--batch", "1", "--images", "1", "--seed", "0") == 0
    a = pictures(tmp_path / "a")
    assert same(a, pictures(tmp_path / "b"))
    one = ["--student", str(made / "run"), "--prompts", "red apple", "--out"]
    assert main([*one, str(tmp_path / "c")]) == 0
    assert torch.equal(pictures(tmp_path / "c")["000-red-apple.png"], a["000-red-apple.png"])
    others = [["--seed", "1"], ["--sampler", "euler"], ["--weights", "raw"], ["--weights", "ema"], ["--steps", "2"]]
    for i, flags in enumerate(others):
        assert main([*one, str(tmp_path / str(i)), *flags]) == 0
    seen = [pictures(tmp_path / str(i))["000-red-apple.png"] for i in range(5)] + [a["000-red-apple.png"]]
    assert all(not torch.equal(x, y) for i, x in enumerate(seen) for y in seen[:i])


@pytest.mark.parametrize("count, batch, world", [(7, 2, 1), (7, 2, 3), (5, 8, 2), (16, 4, 4)])
def test_shares_are_all_indices_once(count, batch, world):
    """And every batch is one that a single process would make."""
    alone = [part.tolist() for part in shares(count, batch, 0, 1)]
    split = [part.tolist() for rank in range(world) for part in shares(count, batch, rank, world)]
    assert sorted(split) == sorted(alone) and sorted(chain(*split)) == list(range(count))


def test_two_processes_make_the_same_pictures(made, tmp_path, monkeypatch):
    assert run(made, tmp_path / "one", "--batch", "2") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert run(made, tmp_path / "two", "--batch", "2") == 0
        count = len(list((tmp_path / "two").glob("[0-9]*.png")))
        assert count == (2 if rank else 4) and (tmp_path / "two" / "sheet.png").is_file() == (not rank)
    assert same(pictures(tmp_path / "one"), pictures(tmp_path / "two"))
    assert torch.equal(read_png(tmp_path / "one" / "sheet.png"), read_png(tmp_path / "two" / "sheet.png"))
    assert (tmp_path / "one" / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()


@pytest.mark.slow
def test_two_real_processes(made, tmp_path):
    """Side by side, as torchrun starts them: RANK and WORLD_SIZE are all they share."""
    assert run(made, tmp_path / "one", "--batch", "2") == 0
    argv = [sys.executable, "-m", "senseflow.sample", "--student", str(made / "run"), "--prompts-file",
            str(made / "prompts.txt"), "--out", str(tmp_path / "two"), "--batch", "2"]  # fmt: skip
    path = os.pathsep.join(p for p in sys.path if p)
    ranks = [subprocess.Popen(argv, env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2", "PYTHONPATH": path})
             for r in range(2)]  # fmt: skip
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert same(pictures(tmp_path / "one"), pictures(tmp_path / "two"))
    assert torch.equal(read_png(tmp_path / "one" / "sheet.png"), read_png(tmp_path / "two" / "sheet.png"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_teacher_by_itself(preset, tmp_path):
    """Its family from model_index.json, its settings from the family's preset; guidance acts."""
    teacher = WRITE[preset](tmp_path / "teacher")
    base = ["--teacher", str(teacher), "--prompts", "penguin", "--side", "64", "--steps", "2", "--dtype", "fp32"]
    assert main([*base, "--out", str(tmp_path / "a")]) == 0
    assert main([*base, "--out", str(tmp_path / "b"), "--guidance", "1.5"]) == 0
    row = json.loads((tmp_path / "a" / "samples.jsonl").read_text())
    published = {"sd35-medium": (7.0, 3.0), "flux-dev": (3.5, 1.15), "sdxl": (5.0, 1.0), "flux2-klein": (4.0, 2.02335)}
    assert (row["guidance"], row["shift"], row["steps"]) == (*published[preset], 2)
    assert not same(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    for words, calls in (([], 2 if preset == "flux-dev" else 4), (["--guidance", "1"], 2)):  # FLUX.1 embeds guidance
        args = sample.build_parser().parse_args([*base, "--sampler", "euler", *words])
        assert sample.Source(args, torch.device("cpu")).calls == calls


def test_the_embedded_teacher_and_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "default_names", lambda: ["red apple", "penguin"])
    assert main(["--teacher", "embedded", "--embedded", "--steps", "4", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["red apple", "penguin"] and rows[0]["teacher"] == "embedded"
    red = pictures(tmp_path)["000-red-apple.png"].float().mean((1, 2))
    assert red[0] > red[2] + 10  # it is one that was trained


def test_captions_of_a_data_set(made, tmp_path, capsys):
    """A folder of pictures and a list in JSON, in their order; what has no caption is left out and said."""
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    for name, caption in (("b", "penguin"), ("a", "red apple"), ("c", None), ("d", "blue star")):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        if caption:
            (folder / f"{name}.txt").write_text(caption)
    student = ["--student", str(made / "run"), "--out", str(tmp_path / "out")]

    def prompts(*more):
        assert main([*student, *more]) == 0
        return [json.loads(line)["prompt"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]

    assert prompts("--data", str(folder)) == ["red apple", "penguin", "blue star"]
    assert "1 items without a usable caption left out" in capsys.readouterr().err
    assert prompts("--data", str(folder), "--limit", "2") == ["red apple", "penguin"]
    (tmp_path / "list.json").write_text('["a star", {"prompt": "a penguin"}]')
    assert prompts("--data", str(tmp_path / "list.json")) == ["a star", "a penguin"]
    assert prompts("--prompts-file", str(made / "prompts.txt"), "--limit", "1") == ["red apple"]
    assert "does not exist" in error(capsys, [*student, "--data", str(tmp_path / "none")])
    assert "--limit -1: allowed is 0 or more" in error(capsys, [*student, "--prompts", "a", "--limit", "-1"])
    assert "one of --prompts" in error(capsys, [*student, "--prompts", "a", "--data", str(folder)])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "settings.json").write_text("{}")
    assert "is a cache, which holds no captions" in error(capsys, [*student, "--data", str(tmp_path / "cache")])


def test_dtype(made, tmp_path):
    one = ["--student", str(made / "run"), "--prompts", "red apple", "--out"]
    assert main([*one, str(tmp_path / "a")]) == 0
    assert main([*one, str(tmp_path / "b"), "--dtype", "bf16"]) == 0
    a, b = (pictures(tmp_path / name)["000-red-apple.png"].float() for name in "ab")
    gap = (a - b).abs().mean() / a.std()
    assert 0 < gap < 0.1  # 2^-8 a layer, some ten layers, four steps
    student = find_student(made / "run")
    assert student.model.decode == "bf16"
    for dtype in (torch.float32, torch.bfloat16):  # of the decoder too, however it decoded in training
        adapter = student.adapter(dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
        assert {p.dtype for p in adapter.vae.decoder.parameters()} == {dtype} and adapter.dtype == dtype


def test_bad_input_is_one_line(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = ["--student", str(made / "run")]
    assert "one of --prompts, --prompts-file, --data and --embedded" in error(capsys, student)
    assert "one of --prompts" in error(capsys, [*student, "--prompts", "a", "--embedded"])
    assert "cannot be read" in error(capsys, [*student, "--prompts-file", str(tmp_path / "none")])
    (tmp_path / "empty").write_text("\n \n")
    assert "holds no prompt" in error(capsys, [*student, "--prompts-file", str(tmp_path / "empty")])
    assert "--steps 9 is out of range: allowed is 1 to 8" in error(capsys, [*student, "--prompts", "a", "--steps", "9"])
    assert "--guidance is for --teacher" in error(capsys, [*student, "--prompts", "a", "--guidance", "3"])
    assert "--batch 0" in error(capsys, [*student, "--prompts", "a", "--batch", "0"])
    assert "give --student RUN or --teacher" in error(capsys, ["--prompts", "a"])
    assert "prompt 'caf\\udce9' is no UTF-8" in error(capsys, [*student, "--prompts", "caf\udce9"])
    (tmp_path / "file").write_text("")
    message = error(capsys, [*student, "--prompts", "a", "--out", str(tmp_path / "file")])
    assert message.endswith("file/000-a.png cannot be written: File exists")
    teacher = ["--teacher", str(made / "teacher"), "--prompts", "a"]
    assert "a teacher knows euler alone" in error(capsys, [*teacher, "--sampler", "renoise"])
    index = made / "teacher" / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("StableDiffusion3Pipeline", "SanaPipeline"))
    assert "is a SanaPipeline: allowed are StableDiffusion3Pipeline" in error(capsys, teacher)
    index.write_text(text)
    assert "does not exist" in error(capsys, ["--teacher", str(tmp_path / "none"), "--prompts", "a"])
    assert "model.side = 72: allowed is a multiple of 16" in error(capsys, [*teacher, "--side", "72"])
    (tmp_path / "lora").mkdir()
    shutil.copy(made / "run" / "student" / "senseflow.json", tmp_path / "lora")
    found = error(capsys, ["--student", str(tmp_path / "lora"), "--prompts", "a"])
    assert not (tmp_path / "samples").exists()
    assert "holds no network in diffusers' layout (a LoRA, a single file?): give the run" in found


def test_a_real_student_has_no_row_in_the_embedded_table(made, capsys):
    from senseflow.evaluate import main as evaluate

    assert evaluate(["--student", str(made / "run")]) == 2
    assert "is of family 'sd35', which the embedded table does not know" in capsys.readouterr().err


def test_a_teacher_in_the_home_folder(made, monkeypatch):
    """Where the shell leaves the tilde: --teacher=~/teacher."""
    monkeypatch.setenv("HOME", str(made))
    assert sample.teacher_preset("~/teacher").model.family == "sd35"
