"""`python -m senseflow.evaluate` end to end: a tiny random SD 3.5 student offline, tiny random score networks."""

import json

import pytest
import torch
from students import WRITE, make_run
from tiny_scores import write_alexnet, write_clip, write_image_reward, write_open_clip

from senseflow import sample
from senseflow.evaluate import main
from senseflow.metrics import frechet_distance, standard_scale
from senseflow.models.lite0 import load_lite0
from senseflow.scores.pictures import read_picture

for package in ("diffusers", "open_clip", "lpips", "cleanfid", "torch_fidelity"):
    pytest.importorskip(package)
PROMPTS = ["red apple", "penguin", "blue star"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("scoring")
    teacher = WRITE["sd35-large"](root / "teacher")
    make_run("sd35-large", teacher, root / "run")
    reward, bert = write_image_reward(root / "ir")
    places = dict(clip=write_open_clip(root / "clip"), hpsv2=root / "clip", pickscore=write_clip(root / "pick"),
                  imagereward=reward, bert=bert, lpips=write_alexnet(root / "alex"))  # fmt: skip
    return root, [word for name, place in places.items() for word in ("--weights", f"{name}={place}")]


def base(made, out, *more):
    root, weights = made
    return ["--student", str(root / "run"), "--out", str(out), "--teacher-steps", "2", "--batch", "4", *weights,
            "--prompts", *PROMPTS, *more]  # fmt: skip


def test_every_metric_whose_weights_are_there(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert main(base(made, tmp_path / "out", "--images", "2")) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = record["scores"]["student"]
    assert set(scores) == {"fd-lite0-t", "kid-lite0-t", "clip", "hpsv2", "pickscore", "imagereward", "lpips",
                           "clip-diversity"}  # fmt: skip
    assert set(record["scores"]["teacher"]) == {"clip", "hpsv2", "pickscore", "imagereward"}
    assert (
        "give --weights inception=PATH" in record["missing"]["fid-t"]
        and "left out: fid-t, kid-t, patch-fid-t, patch-kid-t: inception" in out
    )
    assert record["missing"]["fid"].startswith("compares with real pictures")
    assert "hpsv2.1" in record["missing"] and len(record["missing"]) == 11
    assert record["generation"]["student"]["seed"] == 1 and record["generation"]["teacher"]["seed"] == 2
    assert (record["generation"]["student"]["calls"], record["generation"]["teacher"]["calls"]) == (4, 4)
    assert scores["clip"]["count"] == 6 and scores["lpips"]["count"] == 3 and len(scores["clip"]["sha256"]) == 64
    assert record["versions"]["torch"] and record["pictures"] == {"student": 6, "teacher": 6}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| SenseFlow (published) | 4 | 13.38 | 17.48 | 0.3286 | 0.3016 | 23.01 | 1.1713 |" in table
    assert f"| {scores['clip']['value']:.4f} | {scores['hpsv2']['value']:.4f} |" in table
    # FD on Lite0, by hand from the pictures
    net = load_lite0()

    def features(name):
        files = sorted((tmp_path / "out" / name).glob("*.png"))
        x = torch.stack([read_picture(f) for f in files]).float() / 127.5 - 1
        assert x.shape == (6, 3, 64, 64)  # as made, not enlarged
        with torch.no_grad():
            return net.features(x)

    mine, teacher = features("student"), features("teacher")
    mean, std = standard_scale(teacher)
    expected = frechet_distance((mine - mean) / std, (teacher - mean) / std)
    assert scores["fd-lite0-t"]["value"] == pytest.approx(expected, rel=1e-4)


def test_it_goes_on_and_another_metric_samples_nothing(made, tmp_path, capsys, monkeypatch):
    argv = base(made, tmp_path / "out", "--metrics")
    assert main([*argv, "clip"]) == 0
    (tmp_path / "out" / "student" / "000001.png").unlink()  # of a stopped run
    first = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "student").glob("*2.png")}
    networks = []
    load = sample.Source.network
    monkeypatch.setattr(sample.Source, "network", lambda self: networks.append(self) or load(self))
    capsys.readouterr()
    assert main([*argv, "clip", "pickscore"]) == 0
    assert len(networks) == 1 and "student: 3 pictures made here" in capsys.readouterr().out and first
    assert main([*argv, "clip", "pickscore"]) == 0 and len(networks) == 1
    assert main([*argv, "clip", "--seed", "5"]) == 2
    assert "holds pictures of other settings or prompts" in capsys.readouterr().err


def test_processes_share_the_work(made, tmp_path, monkeypatch, capsys):
    flags = ["--images", "2", "--metrics", "clip", "lpips", "kid-lite0-t"]
    one, two = base(made, tmp_path / "one", *flags), base(made, tmp_path / "two", *flags)
    assert main(one) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        capsys.readouterr()
        assert main(two) == 0
        assert (tmp_path / "two" / "results.json").is_file() == (rank == 0)
    a, b = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert a["scores"] == b["scores"] and a["missing"] == b["missing"] == {}


def test_folders_of_pictures(made, tmp_path):
    root, weights = made
    for name, seed in (("a", "1"), ("b", "2"), ("c", "3")):
        argv = ["--student", str(root / "run"), "--prompts", *PROMPTS, "--out", str(tmp_path / name), "--seed", seed]
        assert sample.main(argv) == 0
        (tmp_path / name / "sheet.png").unlink()
    argv = ["--pictures", str(tmp_path / "a"), "--reference", str(tmp_path / "b"), "--real", str(tmp_path / "c"),
            "--metrics", "fd-lite0-t", "fd-lite0", "clip", *weights, "--published", "flux"]  # fmt: skip
    assert main(argv) == 0
    record = json.loads((tmp_path / "a-evaluation" / "results.json").read_text())
    scores = record["scores"]["student"]
    assert scores["fd-lite0-t"]["value"] != scores["fd-lite0"]["value"] and scores["clip"]["count"] == 3
    assert "| Hyper-FLUX (published) |" in (tmp_path / "a-evaluation" / "table.md").read_text()


def test_benchmark_pictures_and_results(made, tmp_path, capsys):
    root, _ = made
    clone = tmp_path / "clone" / "prompts"
    clone.mkdir(parents=True)
    rows = [{"tag": "counting", "prompt": "red apple"}, {"tag": "colors", "prompt": "penguin"}]
    (clone / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    student = ["--student", str(root / "run"), "--out", str(tmp_path / "out")]
    assert main([*student, "--write", f"geneval={tmp_path / 'clone'}"]) == 0
    assert f"evaluation/evaluate_images.py {tmp_path / 'out' / 'geneval'} " in capsys.readouterr().out
    folder = tmp_path / "out" / "geneval"
    for i, row in enumerate(rows):  # what evaluate_images.py walks
        assert json.loads((folder / f"{i:05d}" / "metadata.jsonl").read_text()) == row
        names = sorted(f.name for f in (folder / f"{i:05d}" / "samples").iterdir())
        assert names == [f"{k:05d}.png" for k in range(4)]
    result = tmp_path / "results.jsonl"
    result.write_text("\n".join(json.dumps(dict(tag=t, correct=c)) for t, c in (("counting", True), ("colors", False))))
    assert main([*student, "--read", f"geneval={result}"]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| SenseFlow (published) | 4 | 0.7098 |" in table and "| 0.5000 | 1.0000 | 0.0000 |" in table


def test_results_read_later_stand_beside_the_scores(made, tmp_path):
    """--read by itself keeps what was scored, further metrics keep what was read; another student's is not kept."""
    root, _ = made
    (tmp_path / "a").mkdir()
    for k in range(3):
        sample.save_png(torch.full((3, 40, 40), 50 * k, dtype=torch.uint8), tmp_path / "a" / f"{k}.png")
    (tmp_path / "r.jsonl").write_text(json.dumps(dict(tag="colors", correct=True)))
    (tmp_path / "dpg.txt").write_text("DPG-Bench score: 80.5\n")
    out = ["--out", str(tmp_path / "out")]
    folder = ["--pictures", str(tmp_path / "a"), "--reference", str(tmp_path / "a"), *out, "--metrics", "fd-lite0-t"]

    def record(argv):
        assert main(argv) == 0
        return json.loads((tmp_path / "out" / "results.json").read_text())

    first = record([*folder, "--read", f"geneval={tmp_path / 'r.jsonl'}"])
    assert first["benchmarks"] == {"geneval": {"GenEval": 1.0, "colors": 1.0}} and first["scores"]["student"]
    assert record(folder)["benchmarks"] == first["benchmarks"]
    student = ["--student", str(root / "run"), *out, "--read"]
    read = record([*student, f"geneval={tmp_path / 'r.jsonl'}"])
    assert read["of"] == str(root / "run") and read["scores"] == {"student": {}, "teacher": {}}  # not the folder's
    (tmp_path / "out" / "results.json").write_text(json.dumps(read | dict(scores=first["scores"])))
    read = record([*student, f"dpg={tmp_path / 'dpg.txt'}"])
    assert read["scores"] == first["scores"] and list(read["benchmarks"]) == ["geneval", "dpg"]


def test_bad_input_is_one_line(made, tmp_path, capsys):
    root, _ = made
    student = ["--student", str(root / "run"), "--out", str(tmp_path)]

    def error(*argv):
        assert main(list(argv)) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("senseflow.evaluate: ")]
        return line

    assert "unknown metric 'clips', did you mean 'clip'" in error(*student, "--metrics", "clips")
    assert "prompts come from one of --coco" in error(*student, "--metrics", "clip")
    assert "--weights 'clipp=x': allowed is NAME=PATH" in error(*student, "--metrics", "clip", "--weights", "clipp=x")
    assert "give --student RUN or --pictures FOLDER" in error("--metrics", "clip", "--prompts", "a")
    assert "is no folder of pictures" in error("--pictures", str(tmp_path / "none"), "--metrics", "clip")
    assert "--batch 0" in error(*student, "--batch", "0")
    assert "clone of the benchmark's repository" in error(*student, "--write", f"geneval={tmp_path}")
    two = ("--write", f"geneval={tmp_path}", "--write", f"dpg={tmp_path}")
    assert "allowed is one benchmark a command" in error(*student, *two)
    assert "--steps 0: allowed is 1 to 8" in error(*student, "--prompts", "a", "--steps", "0")
    assert "--teacher-steps 0: allowed is 1 to 1000" in error(*student, "--prompts", "a", "--teacher-steps", "0")
    assert "--make-reference: allowed beside it is" in error("--make-reference", str(tmp_path), "--seed", "1")
    (tmp_path / "prompts").mkdir()
    for text in ("{cut", "[1]"):
        (tmp_path / "prompts" / "evaluation_metadata.jsonl").write_text(text)
        assert "is no metadata of GenEval" in error(*student, "--write", f"geneval={tmp_path}")
    (tmp_path / "color" / "annotation_blip").mkdir(parents=True)
    (tmp_path / "color" / "annotation_blip" / "vqa_result.json").write_text("[]")
    assert "is no result of t2i-compbench" in error(*student, "--read", f"t2i-compbench={tmp_path}")


@pytest.mark.slow
def test_an_embedded_student_and_its_teacher_by_name(made, tmp_path, capsys, monkeypatch):
    """--embedded captions, the shipped teacher as the reference; a network's weights missing leaves the rest."""
    from senseflow.models.embedded import teacher_folder

    _, weights = made
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    make_run("tiny", teacher_folder(""), tmp_path / "run", "--model.side", "32", "--model.teacher", "")
    argv = ["--student", str(tmp_path / "run"), "--embedded", "--limit", "4", "--images", "2", "--batch", "8",
            "--teacher-steps", "2", "--metrics", "all", *weights]  # fmt: skip
    assert main(argv) == 0
    record = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert record["family"] == "embedded" and record["pictures"] == {"student": 8, "teacher": 8}
    assert {"fd-lite0-t", "kid-lite0-t", "clip", "hpsv2", "pickscore", "imagereward", "lpips", "clip-diversity"} == set(
        record["scores"]["student"]
    )
    said = capsys.readouterr().out
    lines = [x for x in said.splitlines() if x.startswith("left out: ")]
    assert len(lines) == 3  # Inception, the real pictures, HPSv2.1: one line each
    for name in ("fid-t", "patch-fid-t", "fid", "hpsv2.1"):
        assert any(name in line.split(": ")[1].split(", ") and record["missing"][name] in line for line in lines)
    assert "HF_HUB_OFFLINE is set" in record["missing"]["fid-t"]
    assert all(torch.isfinite(torch.tensor(s["value"])) for s in record["scores"]["student"].values())
