"""Scores of a student against its teacher: KID and FD on EfficientNet-Lite0 features, patches, text alignment.

    python -m senseflow.evaluate --student runs/tiny              # the table of a finished run
    python -m senseflow.evaluate --make-reference FOLDER          # teacher's many-step samples and its own scores

KID-Lite0 and FD-Lite0 against the TEACHER's many-step samples of the same prompts are the small analogue of the
paper's FID-T. They say nothing about published Inception scores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.cli import status_of
from senseflow.config import Config, UserError
from senseflow.data.emoji import EmojiSet, default_names, load_variants, pick_variants, to_float, to_uint8
from senseflow.data.packages import cache_folder
from senseflow.fields import replace
from senseflow.metrics import (
    AlignmentModel,
    ScoreNet,
    frechet_distance,
    kid,
    mean_cosine,
    patches,
    recall_at_1,
    train_alignment,
)
from senseflow.models.adapter import Condition
from senseflow.models.embedded import EmbeddedAdapter, load_transformer, load_vae, teacher_folder
from senseflow.models.lite0 import load_lite0
from senseflow.presets import tiny
from senseflow.sample import load_student, picture_grid, student_samples, teacher_samples
from senseflow.steps import Parts
from senseflow.student import find_student

SHIPPED_REFERENCE = Path(__file__).parent / "assets" / "reference"
PATCH_SIZE, PATCHES = 16, 4  # of 32 pixels: the four quarters
# Deviation of the scores' dither, levels of 255. The white of the teacher's own 50 steps scatters by 2.0, and its
# predictions of x0 move that white by .3 to 1.7, by noise level: what a student makes of that is no quality. White
# darker by .3 of a level costs KID x1000 4.7, dithered .4 (python -m bench.white).
DITHER = 4.0
SCORED, REFERENCED = 1, 2  # the two sides' dither seeds
STUDENT_SEED, REFERENCE_SEED, TEACHER_SEED, DATA_SEED = 1, 2, 3, 4  # the noises of all sides are independent
FEW_STEP_GRID = [(shift, w) for shift in (1.0, 3.0) for w in (1.0, 1.5, 2.0, 3.0, 4.0)]


@dataclass(frozen=True)
class Scores:
    """kid and patch_kid are 1000 x the unbiased estimate; fd, patch_fd Frechet; r1 in [0, 1]; cosine in [-1, 1].
    All of dithered pictures (DITHER) but kid_raw."""

    kid: float
    fd: float
    patch_kid: float
    patch_fd: float
    r1: float
    cosine: float
    kid_raw: float

    def cells(self) -> list[str]:
        return [
            f"{self.kid_raw:.0f}", f"{self.kid:.0f}", f"{self.fd:.1f}", f"{self.patch_kid:.0f}", f"{self.patch_fd:.1f}",
            f"{self.r1:.3f}", f"{self.cosine:.3f}",
        ]  # fmt: skip


COLUMNS = ["generator", "network calls", "KID x1000", "dithered: KID x1000", "FD", "patch KID x1000", "patch FD",
           "text R@1", "text cosine"]  # fmt: skip


def weights_sha256(folder: Path) -> str:
    """sha256 of a teacher folder's transformer weights: which teacher a reference belongs to."""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


class Reference:
    """What a teacher's students are scored against: its many-step pictures, its own scores, and the score nets."""

    def __init__(self, folder: Path):
        from safetensors.torch import load_file

        record = json.loads((folder / "reference.json").read_text())
        self.record: dict[str, Any] = record
        self.pictures = to_float(load_file(folder / "pictures.safetensors")["pictures"])
        self.net = ScoreNet.load(folder / "scale.safetensors", load_lite0())
        self.alignment = AlignmentModel.load(folder / "alignment.safetensors")
        self.raw_net = ScoreNet.fit(self.net.net, self.pictures)
        self.raw_features = self.raw_net(self.pictures)
        self.features = self.net(self.pictures, seed=REFERENCED)
        self.patch_features = self.net(patches(self.pictures, PATCH_SIZE, PATCHES), seed=REFERENCED)

    @torch.no_grad()
    def score(self, pictures: Tensor, cond: Condition) -> Scores:
        """pictures fp32 [N, 3, H, W] of the prompts cond (N distinct ones), as they would be saved (8 bits)."""
        pictures = to_float(to_uint8(pictures)).cpu()
        features = self.net(pictures, seed=SCORED)
        patch = self.net(patches(pictures, PATCH_SIZE, PATCHES), seed=SCORED)
        images = self.alignment.images(features)
        texts = self.alignment.texts(cond.pooled.cpu())
        return Scores(
            1000 * kid(features, self.features), frechet_distance(features, self.features),
            1000 * kid(patch, self.patch_features), frechet_distance(patch, self.patch_features),
            recall_at_1(images, texts), mean_cosine(images, texts),
            1000 * kid(self.raw_net(pictures), self.raw_features),
        )  # fmt: skip


def few_step_scores(reference: Reference, adapter: Any, teacher: nn.Module, cond: Condition, steps: int) -> list[dict]:
    """The teacher's own scores at `steps` Euler steps, a row for every shift and guidance of FEW_STEP_GRID."""
    rows = []
    for shift, w in FEW_STEP_GRID:
        scores = reference.score(teacher_samples(adapter, teacher, steps, w, shift, cond, TEACHER_SEED), cond)
        rows.append(dict(steps=steps, shift=shift, guidance=w, **asdict(scores)))
        print(f"teacher, {steps} steps, shift {shift:g}, w = {w:g}: KID {scores.kid:.1f}", flush=True)
    return rows


def make_reference(teacher: Path, out: Path, steps: int, guidance: float, shift: float, prompts: int = 0) -> None:
    """Generates the reference of a teacher folder: pictures, score nets' scale and heads, the teacher's scores.

    prompts: how many captions of the embedded set are used, for everything; 0: all.
    """
    from safetensors.torch import save_file

    net = load_transformer(teacher)
    names = default_names()
    data = load_variants(names[: prompts or len(names)])
    count, variants = data.images.shape[:2]
    adapter = EmbeddedAdapter(vae=load_vae(teacher))
    shown = adapter.encode_prompts(data.captions)
    real = to_float(data.images.flatten(0, 1))
    out.mkdir(parents=True, exist_ok=True)
    print(f"{steps}-step samples of {count} prompts", flush=True)

    def many(seed: int) -> Tensor:
        return teacher_samples(adapter, net, steps, guidance, shift, shown, seed)

    pictures = to_uint8(many(REFERENCE_SEED))
    save_file({"pictures": pictures.contiguous()}, out / "pictures.safetensors")
    # The features' scale is that of what students are held against: by the real pictures' own, whose background is 255
    # everywhere, the teacher's wavering by a level would be many deviations.
    scale = ScoreNet.fit(load_lite0(), to_float(pictures), dither=DITHER, seed=REFERENCED)
    scale.save(out / "scale.safetensors")
    labels = torch.arange(count).repeat_interleave(variants)
    heads = train_alignment(scale(real, seed=SCORED), shown.pooled, seed=0, steps=600, labels=labels)
    heads.half().save(out / "alignment.safetensors")  # fp16: half the size in the package
    settings = dict(steps=steps, guidance=guidance, shift=shift, prompts=prompts)
    record: dict[str, Any] = dict(teacher_sha256=weights_sha256(teacher), **settings)
    (out / "reference.json").write_text(json.dumps(record, indent=1) + "\n")
    reference = Reference(out)
    one_of_each = to_float(pick_variants(data.images, torch.arange(count), seed=0))
    record["real"] = asdict(reference.score(one_of_each, shown))
    record["many"] = asdict(reference.score(many(TEACHER_SEED), shown))
    record["few"] = few_step_scores(reference, adapter, net, shown, 4)
    (out / "reference.json").write_text(json.dumps(record, indent=1) + "\n")


def many_step_key(teacher: Path, cfg: Config) -> dict[str, Any]:
    """Which teacher's many-step samples, and how they are made."""
    e = cfg.eval
    return dict(
        teacher_sha256=weights_sha256(teacher),
        steps=e.teacher_steps,
        guidance=e.teacher_guidance,
        shift=e.teacher_shift,
    )


def short_name(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def teacher_pictures(cfg: Config, adapter: Any, teacher: nn.Module, folder: Path) -> EmojiSet:
    """The teacher's own many-step samples of the embedded captions, uint8 [N, 1, 3, H, W], of a seed that no score
    uses: the shipped ones if they are of these weights and settings, else made once, in the user's cache."""
    from safetensors.torch import load_file, save_file

    captions, key, e = default_names(), many_step_key(folder, cfg), cfg.eval
    shipped = json.loads((SHIPPED_REFERENCE / "reference.json").read_text())
    if all(shipped[k] == v for k, v in key.items()):
        file = SHIPPED_REFERENCE / "samples.safetensors"
    else:
        file = cache_folder() / f"samples-{short_name(key)}.safetensors"
    if not file.is_file():
        print(f"no samples of this teacher yet: making {len(captions)} once, in {file}", flush=True)
        cond = adapter.encode_prompts(captions)
        made = teacher_samples(adapter, teacher, e.teacher_steps, e.teacher_guidance, e.teacher_shift, cond, DATA_SEED)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({"pictures": to_uint8(made).cpu().contiguous()}, partial)
        os.replace(partial, file)
    return EmojiSet(load_file(file)["pictures"][:, None], captions)


def find_reference(teacher: Path, cfg: Config) -> Path:
    """Folder of the reference of a teacher: the shipped one if it is of these weights and settings, else one in
    the user's cache, made once (minutes on a CPU)."""
    key = many_step_key(teacher, cfg) | dict(prompts=cfg.eval.prompts)
    cached = cache_folder() / f"reference-{short_name(key)}"

    def whole(folder: Path) -> bool:
        file = folder / "reference.json"
        record = json.loads(file.read_text()) if file.is_file() else {}
        return "few" in record and all(record.get(k) == v for k, v in key.items())

    for folder in (SHIPPED_REFERENCE, cached):
        if whole(folder):
            return folder
    print(f"no reference of this teacher yet: making it once, in {cached}", flush=True)
    e, made = cfg.eval, cached.with_name(f"{cached.name}.{os.getpid()}")  # another run may be making it too
    make_reference(teacher, made, e.teacher_steps, e.teacher_guidance, e.teacher_shift, e.prompts)
    if whole(cached):
        shutil.rmtree(made)
    else:
        shutil.rmtree(cached, ignore_errors=True)
        os.replace(made, cached)
    return cached


@dataclass
class Look:
    """One evaluation: scores, where there are any, and pictures of the student."""

    scores: Scores | None
    pictures: Tensor  # fp32 [N, 3, H, W]

    def row(self) -> dict[str, float]:
        return {f"eval/{k}": v for k, v in asdict(self.scores).items()} if self.scores else {}

    def grid(self, evaluator: Any) -> Tensor:
        """uint8 [3, H, W]: teacher few-step, student few-step, teacher many-step; a column per prompt."""
        n = len(evaluator.shown)
        rows = [evaluator.few_pictures, self.pictures[evaluator.shown], evaluator.many_pictures]
        return picture_grid(torch.cat(rows), n)


class Evaluator:
    """Scores and pictures during a run. Reads or makes the teacher's reference when it is built."""

    def __init__(self, cfg: Config, adapter: Any, teacher: nn.Module, folder: Path):
        self.cfg, self.adapter = cfg, adapter
        self.reference = Reference(find_reference(folder, cfg))
        captions = default_names()
        captions = captions[: cfg.eval.prompts or len(captions)]
        self.cond = adapter.encode_prompts(captions)
        self.shown = torch.linspace(0, len(captions) - 1, min(cfg.eval.grid, len(captions))).long()
        self.few = self._few(teacher, cfg.model.steps)
        self.best_few = min(self.few, key=lambda row: row["kid"])
        self.few_pictures = teacher_samples(
            adapter, teacher, cfg.model.steps, self.best_few["guidance"], self.best_few["shift"],
            self.cond.index(self.shown), TEACHER_SEED,
        )  # fmt: skip
        self.many_pictures = self.reference.pictures[self.shown]

    def _few(self, teacher: nn.Module, steps: int) -> list[dict]:
        """The teacher at the student's number of steps: shipped for 4; else made once, in the user's cache."""
        record = self.reference.record
        rows = [row for row in record["few"] if row["steps"] == steps]
        if rows:
            return rows
        key = [record[k] for k in ("teacher_sha256", "steps", "guidance", "shift", "prompts")]
        file = cache_folder() / f"few-steps-{short_name([key, steps])}.json"
        if not file.is_file():
            print(f"no scores of this teacher at {steps} steps yet: making them once, in {file}", flush=True)
            rows = few_step_scores(self.reference, self.adapter, teacher, self.cond, steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(rows) + "\n")
            os.replace(partial, file)
        return json.loads(file.read_text())

    def measure(self, net: nn.Module, anchors: list[float], sampler: str = "renoise") -> Look:
        """The student's pictures of every prompt, scored."""
        pictures = student_samples(self.adapter, net, anchors, self.cond, STUDENT_SEED, sampler).cpu()
        return Look(self.reference.score(pictures, self.cond), pictures)

    def table(self, net: nn.Module, anchors: list[float], renoise: Look | None = None):
        """(columns, rows), lists of text: the real pictures, the teacher at many and at few steps, the student both
        ways; `renoise` is what `measure` said of this network, where that has been asked already."""
        record, rows = self.reference.record, []

        def add(name: str, calls: str, scores: Scores) -> None:
            rows.append([name, calls, *scores.cells()])

        add("real pictures", "", Scores(**record["real"]))
        w, steps = record["guidance"], record["steps"]
        many = f"teacher, {steps} Euler steps, w = {w:g} (other seed)"
        add(many, str(2 * steps), Scores(**record["many"]))
        for row in self.few:
            few = {k: v for k, v in row.items() if k not in ("steps", "shift", "guidance")}
            best = ", its best" if row == self.best_few else ""
            n = row["steps"]
            name = f"teacher, {n} Euler steps, w = {row['guidance']:g}, shift {row['shift']:g}{best}"
            if best or row["guidance"] == 1:
                add(name, str(n if row["guidance"] == 1 else 2 * n), Scores(**few))
        for sampler in ("renoise", "euler"):
            known = renoise if sampler == "renoise" else None
            scores = (known or self.measure(net, anchors, sampler)).scores
            assert scores is not None
            add(f"student, {len(anchors)} steps, {sampler}", str(len(anchors)), scores)
        return COLUMNS, rows


def grid_captions(cfg: Config) -> list[str]:
    """The prompts of the picture grid: eval.grid of the embedded captions, at equal distances."""
    captions = default_names()
    return [captions[i] for i in torch.linspace(0, len(captions) - 1, min(cfg.eval.grid, len(captions))).long()]


class PictureEvaluator:
    """What `Evaluator` is for a teacher that the embedded score networks do not know: pictures, and no scores."""

    def __init__(self, cfg: Config, adapter: Any, teacher: nn.Module, cond: Condition):
        """cond: of `grid_captions`."""
        self.cfg, self.adapter, self.cond, e = cfg, adapter, cond, cfg.eval
        self.shown = torch.arange(len(cond))

        def teacher_at(steps: int) -> Tensor:
            return teacher_samples(
                adapter, teacher, steps, e.teacher_guidance, e.teacher_shift, self.cond, TEACHER_SEED, 1
            )

        self.few_pictures, self.many_pictures = teacher_at(cfg.model.steps).cpu(), teacher_at(e.teacher_steps).cpu()

    def measure(self, net: nn.Module, anchors: list[float], sampler: str = "renoise") -> Look:
        """The student's pictures of the grid's prompts."""
        return Look(None, student_samples(self.adapter, net, anchors, self.cond, STUDENT_SEED, sampler, 1).cpu())

    def table(self, net: nn.Module, anchors: list[float], renoise: Look | None = None):
        """No rows: nothing here is scored."""
        return COLUMNS, []


def make_evaluator(cfg: Config, parts: Parts) -> Evaluator | PictureEvaluator:
    """Scores and pictures for the embedded family, pictures alone for the others."""
    if parts.shown is None:
        return Evaluator(cfg, parts.adapter, parts.teacher, teacher_folder(cfg.model.teacher))
    return PictureEvaluator(cfg, parts.adapter, parts.teacher, parts.shown)


def embedded_table(args: argparse.Namespace) -> None:
    """Makes the reference of --make-reference, or prints the table of --student. Raises UserError."""
    from senseflow.logs import print_table

    cfg = tiny()
    if args.make_reference:
        e = cfg.eval
        make_reference(
            teacher_folder(args.teacher), args.make_reference, e.teacher_steps, e.teacher_guidance, e.teacher_shift
        )
        return
    if not args.student:
        raise UserError("nothing to do: give --student RUN or --make-reference FOLDER")
    model = find_student(args.student).model
    family, folder = model.family, teacher_folder(args.teacher or model.teacher)
    if family != "embedded":
        raise UserError(
            f"{args.student} is of family {family!r}, which the embedded table does not know: name prompts, by "
            "--prompts-file, --data or --coco, for the other metrics"
        )
    adapter, net, record = load_student(args.student)
    cfg = replace(cfg, {"model.steps": len(record["anchors"])})
    evaluator = Evaluator(cfg, adapter, load_transformer(folder), folder)
    print_table("lower KID and FD are better", *evaluator.table(net, record["anchors"]))


def main(argv: list[str] | None = None) -> int:
    """The embedded table for --student of the embedded family or --make-reference, as before; with any other flag the
    metrics of the field (scoring.py)."""
    words = sys.argv[1:] if argv is None else argv
    if {w.partition("=")[0] for w in words if w.startswith("-")} - {"--student", "--teacher", "--make-reference"}:
        from senseflow.scoring import main as score

        return score(list(words))
    parser = argparse.ArgumentParser(prog="python -m senseflow.evaluate", description=__doc__)
    parser.add_argument("--student", type=Path, help="run folder")
    parser.add_argument("--teacher", default="", help="teacher folder; default: the student's own, or the embedded one")
    parser.add_argument("--make-reference", type=Path, help="folder to write a reference into")
    args = parser.parse_args(words)
    return status_of("evaluate", lambda: embedded_table(args))


if __name__ == "__main__":
    sys.exit(main())
