"""GenEval, T2I-CompBench and DPG-Bench: pictures in the layout their own evaluators read, and their result files read.

Every layout was taken from the evaluator's source:
- GenEval (djghosh13/geneval, evaluation/evaluate_images.py): NNNNN/metadata.jsonl with one JSON object, and
  NNNNN/samples/NNNNN.png, 4 a prompt. Result: the JSON lines of --outfile; score: mean over tags of the share correct.
- T2I-CompBench (Karine-Huang/T2I-CompBench, Readme and *_eval): CATEGORY/samples/PROMPT_NNNNNN.png, 10 a prompt,
  numbered through; the prompt is read from the file name. Result: vqa_result.json of the category's evaluator; score:
  mean answer.
- DPG-Bench (TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py): ID.png, named as the prompt's ID.txt, 4 pictures as
  2 x 2. Result: the text file of --res-path, its last line.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from senseflow.config import UserError
from senseflow.scores.pictures import read_picture

# category -> (prompts, where its evaluator writes) (3_in_1_eval/3_in_1.py and the Readme's commands)
CATEGORIES = {
    "color": ("color_val.txt", "annotation_blip/vqa_result.json"),
    "shape": ("shape_val.txt", "annotation_blip/vqa_result.json"),
    "texture": ("texture_val.txt", "annotation_blip/vqa_result.json"),
    "spatial": ("spatial_val.txt", "labels/annotation_obj_detection_2d/vqa_result.json"),
    "non-spatial": ("non_spatial_val.txt", "annotation_clip/vqa_result.json"),
    "complex": ("complex_val.txt", "annotation_3_in_1/vqa_result.json"),
}
IMAGES = {"geneval": 4, "t2i-compbench": 10, "dpg": 4}


@dataclass(frozen=True)
class Layout:
    """A picture a file, with its prompt; what else the evaluator reads, as text; `after`: what is made of the
    pictures."""

    files: list[Path]
    prompts: list[str]
    texts: dict[Path, str]
    hint: str


def layout(name: str, clone: Path, out: Path, images: int = 0, limit: int = 0) -> Layout:
    """The files of a benchmark under `out`. clone: a copy of the benchmark's repository, where its prompts are; images:
    a prompt, 0: as its authors; limit: the first prompts alone. Raises UserError for a folder that is no such clone."""
    n = images or IMAGES[name]
    return {"geneval": _geneval, "t2i-compbench": _compbench, "dpg": _dpg}[name](clone, out, n, limit)


def named(path: Path) -> str:
    """A path in a command that is run in another folder."""
    return shlex.quote(str(path.absolute()))


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"{file} is not there: give the folder of a clone of the benchmark's repository")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _geneval(clone: Path, out: Path, n: int, limit: int) -> Layout:
    file = clone / "prompts" / "evaluation_metadata.jsonl"
    lines = _lines(file)
    try:
        rows = [json.loads(line) for line in lines[: limit or len(lines)]]
        prompts = [row["prompt"] for row in rows for _ in range(n)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no metadata of GenEval: {error!r}") from None
    files = [out / f"{i:05d}" / "samples" / f"{k:05d}.png" for i in range(len(rows)) for k in range(n)]
    texts = {out / f"{i:05d}" / "metadata.jsonl": json.dumps(row) for i, row in enumerate(rows)}
    result = named(out / "results.jsonl")
    hint = f"python evaluation/evaluate_images.py {named(out)} --outfile {result} --model-path MODELS"
    return Layout(files, prompts, texts, hint)


def _compbench(clone: Path, out: Path, n: int, limit: int) -> Layout:
    files, prompts = [], []
    for category, (name, _) in CATEGORIES.items():
        lines = [line.split("\t")[0].strip() for line in _lines(clone / "examples" / "dataset" / name)]
        lines = lines[: limit or len(lines)]
        if bad := [line for line in lines if "/" in line or "_" in line]:
            raise UserError(f"{name}: {bad[0]!r} cannot be a file's name that the evaluator reads a prompt from")
        for i, prompt in enumerate(prompt for prompt in lines for _ in range(n)):
            files.append(out / category / "samples" / f"{prompt}_{i:06d}.png")
            prompts.append(prompt)
    hint = f"run each category's evaluator on {named(out)}/CATEGORY/ (its Readme: BLIP_vqa.py, 2D_spatial_eval.py, ...)"
    return Layout(files, prompts, {}, hint)


def _dpg(clone: Path, out: Path, n: int, limit: int) -> Layout:
    if n != IMAGES["dpg"]:
        raise UserError(f"--images {n}: DPG-Bench's grid takes 4 pictures a prompt")
    folder = clone / "dpg_bench" / "prompts"
    names = sorted(folder.glob("*.txt"))
    if not names:
        raise UserError(f"{folder} holds no prompts: give the folder of a clone of TencentQQGYLab/ELLA")
    names = names[: limit or len(names)]
    prompts = [" ".join(name.read_text(encoding="utf-8").split()) for name in names for _ in range(n)]
    files = [out / "parts" / f"{name.stem}-{k}.png" for name in names for k in range(n)]
    hint = f"bash dpg_bench/dist_eval.sh {named(out / 'images')} SIDE_OF_ONE_PICTURE"
    return Layout(files, prompts, {}, hint)


def write_dpg_grids(files: list[Path], out: Path) -> int:
    """out/images/ID.png: the 4 pictures of each prompt as 2 x 2, in the order of the evaluator's crops. Returns the
    side of one picture, which the evaluator is told."""
    from senseflow.scores.clip import to_pil

    side = 0
    for start in range(0, len(files), 4):
        target = out / "images" / (files[start].stem.rpartition("-")[0] + ".png")
        four = [read_picture(f) for f in files[start : start + 4]]
        side = four[0].shape[2]
        grid = torch.cat([torch.cat(four[:2], 2), torch.cat(four[2:], 2)], 1)
        target.parent.mkdir(parents=True, exist_ok=True)
        to_pil(grid).save(target)
    return side


def read_results(name: str, path: Path) -> dict[str, float]:
    """Column -> score of a benchmark's own result: GenEval its JSON lines, T2I-CompBench the folder of categories that
    `layout` wrote, DPG-Bench its text. Raises UserError for what is not there or not of that form."""
    try:
        return {"geneval": _read_geneval, "t2i-compbench": _read_compbench, "dpg": _read_dpg}[name](path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of {name}: {error!r}") from None


def _mean(values: list[Any]) -> float:
    if not values:
        raise ValueError("it is empty")
    return sum(map(float, values)) / len(values)


def _read_geneval(path: Path) -> dict[str, float]:
    tags: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        tags.setdefault(row["tag"], []).append(float(row["correct"]))
    scores = {tag: _mean(values) for tag, values in tags.items()}
    if not scores:
        raise ValueError("it is empty")
    return {"GenEval": _mean(list(scores.values())), **scores}


def _read_compbench(path: Path) -> dict[str, float]:
    found = {}
    for category, (_, result) in CATEGORIES.items():
        file = path / category / result
        if file.is_file():
            found[category] = _mean([row["answer"] for row in json.loads(file.read_text())])
    if not found:
        raise ValueError("no CATEGORY has a vqa_result.json")
    return found


def _read_dpg(path: Path) -> dict[str, float]:
    if path.is_dir():  # the evaluator's default: dpg-bench_TIME_results.txt among the pictures
        path = max(path.glob("dpg-bench_*_results.txt"))
    text = path.read_text()
    found = {"DPG-Bench": float(re.findall(r"^DPG-Bench score: ([\d.]+)", text, re.M)[-1])}
    level = text.rpartition("L1 category scores:")[2].partition("L2 category scores:")[0]
    return found | {name: float(score) for name, score in re.findall(r"^\t(.+): ([\d.]+)$", level, re.M)}
