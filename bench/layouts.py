"""The benchmarks' own code on the layouts that `senseflow.evaluate --write` makes: `python -m bench.layouts`.

    python -m bench.layouts --geneval CLONE --t2i-compbench CLONE --dpg CLONE

CLONE: of djghosh13/geneval, Karine-Huang/T2I-CompBench, TencentQQGYLab/ELLA. From each, the code that walks the
folders, reads prompts and numbers and writes results is run as it stands (needs pandas and accelerate); the networks
that judge a picture are replaced by one that knows what was written, so that a picture in another's place is seen. Its
result files are then read by `--read`'s own function. Prints one line a check; exits with 1 where one fails.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from senseflow.scores.benchmarks import Layout, layout, read_results, write_dpg_grids

FAILED: list[str] = []


def check(what: str, good: bool) -> None:
    print(f"{'ok    ' if good else 'FAILED'} {what}", flush=True)
    FAILED.extend([] if good else [what])


@contextmanager
def arguments(*words: str):
    with mock.patch.object(sys, "argv", ["evaluator", *words]):
        yield


def foreign(file: Path, **absent: Any) -> types.ModuleType:
    """The module of a file of a clone, with stand-ins for what it imports and is not here (dots as __)."""
    made = {name.replace("__", "."): value for name, value in absent.items()}
    for name in list(made):
        for k in range(1, name.count(".") + 1):
            made.setdefault(".".join(name.split(".")[:k]), types.ModuleType(name))
    spec = importlib.util.spec_from_file_location(file.stem.replace("-", "_"), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(made)  # and no patch.dict: it would drop pandas again, half of which stays
    try:
        spec.loader.exec_module(module)
    finally:
        for name in made:
            del sys.modules[name]
    return module


def colour(k: int) -> tuple[int, int, int]:
    return k % 251, k // 251 % 251, 7


def picture(file: Path, k: int) -> None:
    """8 x 8 pixels that say which picture this is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), colour(k), np.uint8)).save(file)


def write(plan: Layout, only: str = "") -> None:
    for k, file in enumerate(plan.files):
        if only in file.parts or not only:
            picture(file, k)
    for file, text in plan.texts.items():
        file.write_text(text)


def geneval(clone: Path, out: Path) -> None:
    """evaluate_images.main and summary_scores.py: every fourth picture is called wrong."""
    plan = layout("geneval", clone, out)
    write(plan)
    number = {str(file): k for k, file in enumerate(plan.files)}
    text = (clone / "evaluation" / "evaluate_images.py").read_text()
    space: dict[str, Any] = {}
    exec(
        "import json, os, re\nimport pandas as pd\n" + text[text.index("def main(") : text.index("if __name__")], space
    )
    seen: list[str] = []

    def judged(path: str, metadata: dict[str, Any]) -> dict[str, Any]:
        k = number[path]
        seen.append(path)
        right = metadata["prompt"] == plan.prompts[k]
        return dict(filename=path, tag=metadata["tag"], prompt=metadata["prompt"], correct=right and k % 4 != 3,
                    reason="", metadata=json.dumps(metadata), details="{}")  # fmt: skip

    space["evaluate_image"] = judged
    result = out / "results.jsonl"
    space["main"](types.SimpleNamespace(imagedir=str(out), outfile=str(result)))
    check(f"geneval: all {len(plan.files)} pictures of {len(plan.texts)} prompts are walked", len(seen) == len(number))
    found = read_results("geneval", result)
    check("geneval: each picture beside its own prompt's metadata", abs(found["GenEval"] - 0.75) < 1e-12)
    words = [sys.executable, str(clone / "evaluation" / "summary_scores.py"), str(result)]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    check(f"geneval: its own summary says the same ({shown})", f"{found['GenEval']:.5f}" in shown)


class Chunk(str):
    text = property(str)


class OneChunk:
    """A stand-in for spacy: the whole prompt is one noun phrase."""

    def __call__(self, text: str) -> Any:
        return types.SimpleNamespace(noun_chunks=[Chunk(text)])


def compbench(clone: Path, out: Path) -> None:
    """BLIP_vqa.Create_annotation_for_BLIP on every category, 3_in_1.main on `complex`."""
    plan = layout("t2i-compbench", clone, out)
    spacy: Any = types.ModuleType("spacy")
    spacy.load = lambda name: OneChunk()
    vqa: Any = types.ModuleType("train_vqa_func")
    vqa.VQA_main = None
    blip = foreign(clone / "BLIPvqa_eval" / "BLIP_vqa.py", spacy=spacy, BLIP__train_vqa_func=vqa)
    for category in dict.fromkeys(file.parent.parent.name for file in plan.files):
        write(plan, category)
        place = out / category
        mine = [(str(f), p) for f, p in zip(plan.files, plan.prompts, strict=True) if f.parent.parent == place]
        with mock.patch("builtins.print"):
            blip.Create_annotation_for_BLIP(f"{place}/samples/", str(place), np_index=0)
        rows = json.loads((place / "vqa_test.json").read_text())
        theirs = [(row["image"], row["question"].removesuffix("?")) for row in rows]
        check(
            f"t2i-compbench: {category}: {len(mine)} pictures in order, prompts read from their names", theirs == mine
        )
    place, lines = out / "complex", (clone / "examples" / "dataset" / "complex_val.txt").read_text().splitlines()
    for name, value in (
        ("annotation_blip", 0.6),
        ("labels/annotation_obj_detection_2d", 0.3),
        ("annotation_clip", 0.0),
    ):
        (place / name).mkdir(parents=True)
        answers = [{"question_id": k, "answer": value + k / 1e6} for k in range(10 * len(lines))]
        (place / name / "vqa_result.json").write_text(json.dumps(answers))
    three = foreign(clone / "3_in_1_eval" / "3_in_1.py")
    with arguments("--outpath", str(place), "--data_path", str(clone / "examples" / "dataset")):
        three.main()
    found = read_results("t2i-compbench", out)
    said = float((place / "annotation_3_in_1" / "vqa_score.txt").read_text().split(":")[1])
    check(
        f"t2i-compbench: the 3-in-1 score is read as it was written ({said:.6f})", abs(found["complex"] - said) < 1e-12
    )


def dpg(clone: Path, out: Path) -> None:
    """compute_dpg_bench.main with one question a prompt, answered yes for the crops that belong to it."""
    plan = layout("dpg", clone, out)
    for k, file in enumerate(plan.files):
        picture(file, k)
    side = write_dpg_grids(plan.files, out)
    names = [file.stem.rpartition("-")[0] for file in plan.files[::4]]
    columns = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
               "tuple", "question_natural_language"]  # fmt: skip
    with (out / "questions.csv").open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(columns)
        for name in ["-", *names]:  # the evaluator passes over the first row
            parents = "0,0" if name == "-" else "0"  # text, as its own table's column
            rows.writerow([name, "t", "", 1, parents, "entity", "whole", "entity - whole (x)", f"is it {name}?"])
    answered: list[tuple[str, int]] = []

    class Judge:
        def __init__(self, **_: Any):
            self.asked: dict[str, int] = {}

        def vqa(self, crop: Any, question: str) -> str:
            j = self.asked[question] = self.asked.get(question, -1) + 1
            expected = colour(4 * names.index(question[6:-1]) + j)
            good = crop.size == (side, side) and set(crop.getdata()) == {expected}
            answered.append((question, j))
            return "yes" if good else "no"

    module: Any = foreign(clone / "dpg_bench" / "compute_dpg_bench.py")
    module.MPLUG = Judge
    words = ["--image-root-path", str(out / "images"), "--resolution", str(side), "--csv", str(out / "questions.csv"),
             "--pic-num", "4", "--vqa-model", "mplug"]  # fmt: skip
    with arguments(*words), mock.patch("time.sleep"), mock.patch("builtins.print"):
        module.main()
    check(f"dpg: all 4 crops of all {len(names)} grids are asked for", len(answered) == 4 * len(names))
    found = read_results("dpg", out / "images")
    check(f"dpg: each crop is its own picture ({found})", found == {"DPG-Bench": 100.0, "entity": 100.0})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.layouts", description=__doc__)
    checks = {"geneval": geneval, "t2i-compbench": compbench, "dpg": dpg}
    for name in checks:
        parser.add_argument(f"--{name}", type=Path, metavar="CLONE")
    args = vars(parser.parse_args(argv))
    with tempfile.TemporaryDirectory() as folder:
        for name, run in checks.items():
            if clone := args[name.replace("-", "_")]:
                run(clone, Path(folder) / name)
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main())
