"""Pictures from a student or a teacher: `python -m senseflow.sample --student runs/tiny --prompts "red apple"`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.algo.rollout import sample_euler, sample_renoise
from senseflow.config import Model, UserError
from senseflow.data.emoji import to_uint8
from senseflow.draws import Draws
from senseflow.flow import DiffusionSchedule
from senseflow.models.adapter import Adapter, Condition
from senseflow.models.embedded import EmbeddedAdapter, load_transformer, load_vae
from senseflow.models.families import make_adapter
from senseflow.models.loading import load_component, network_class

SAMPLERS = ("renoise", "euler")


def _batches(cond: Condition, samples: Tensor, batch: int):
    for start in range(0, len(samples), batch):
        index = torch.arange(start, min(start + batch, len(samples)), device=samples.device)
        yield cond.index(index), samples[index]


@torch.no_grad()
def student_samples(
    adapter: Adapter, net: nn.Module, anchors: Sequence[float], cond: Condition,
    seed: int = 0, sampler: str = "renoise", batch: int = 64,
) -> Tensor:  # fmt: skip
    """Pictures fp32 [N, 3, H, W] of N prompts, one network call per anchor, no guidance.

    `renoise` is how the student is trained: x0, then fresh noise at the next anchor. `euler` follows the velocity.
    The noise of picture i depends on (seed, i) alone.
    """
    draws, shape = Draws(seed), adapter.latent_shape
    pictures = []
    device = cond.embeds.device
    for part, ids in _batches(cond, torch.arange(len(cond), device=device), batch):
        noises = [draws.normal(0, ids, f"sample{k}", shape) for k in range(len(anchors))]
        if sampler == "renoise":
            x0 = sample_renoise(adapter, net, noises, list(anchors), part)
        else:
            x0 = sample_euler(adapter, net, noises[0], [*anchors, 0.0], part)
        pictures.append(adapter.decode(x0).float())
    return torch.cat(pictures)


def teacher_sigmas(schedule: Any, steps: int, shift: float) -> list[float]:
    """Descending sigmas of a teacher's sampler, the last one 0: u = 1, ..., 1 / steps, shifted; for SDXL's schedule,
    which has no shift, timesteps 1000 j / steps - 1."""
    if isinstance(schedule, DiffusionSchedule):
        u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps - 1 / 1000
        return [*schedule.sigma(u).tolist(), 0.0]
    return dataclasses.replace(schedule, shift=shift).sigma(torch.linspace(1, 0, steps + 1).double()).tolist()


@torch.no_grad()
def teacher_samples(
    adapter: Any, net: nn.Module, steps: int, guidance: float, shift: float, cond: Condition,
    seed: int = 0, batch: int = 64, progress: Any = None,
) -> Tensor:  # fmt: skip
    """Pictures fp32 [N, 3, H, W] of N prompts: `steps` Euler (DDIM) steps at the given shift; two calls each if guided,
    one where the network embeds its guidance."""
    draws = Draws(seed)
    sigmas = teacher_sigmas(adapter.schedule, steps, shift)
    pictures = []
    device = cond.embeds.device
    for part, ids in _batches(cond, torch.arange(len(cond), device=device), batch):
        noise = draws.normal(0, ids, "sample0", adapter.latent_shape)
        uncond = adapter.uncond(len(ids)) if guidance != 1 else None
        embedded = bool(getattr(getattr(net, "config", None), "guidance_embeds", False))
        w = torch.full((len(ids),), guidance, device=device) if uncond is not None or embedded else None
        x0 = sample_euler(adapter, net, noise, sigmas, part, w, uncond)
        pictures.append(adapter.decode(x0).float())
        if progress:
            progress(len(ids))
    return torch.cat(pictures)


def picture_grid(pictures: Tensor, columns: int, scale: int = 2, gap: int = 4) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> one uint8 picture [3, H', W'] of N / columns rows on light grey."""
    n, _, h, w = pictures.shape
    rows = -(-n // columns)
    cell_h, cell_w = h * scale + gap, w * scale + gap
    sheet = torch.full((3, rows * cell_h + gap, columns * cell_w + gap), 225, dtype=torch.uint8)
    big = to_uint8(pictures).repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu()
    for i in range(n):
        top, left = gap + (i // columns) * cell_h, gap + (i % columns) * cell_w
        sheet[:, top : top + h * scale, left : left + w * scale] = big[i]
    return sheet


def save_png(picture: Tensor, path: Path) -> None:
    """Writes a uint8 picture [3, H, W]."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path)


def load_student(run: Path, source: str = "") -> tuple[Any, nn.Module, dict[str, Any]]:
    """(adapter, network, record) of a run folder or of its `student` folder; text encoders and VAE come from the
    teacher that the record names, or from `source`. Raises UserError when something is missing."""
    folder = run / "student" if (run / "student").is_dir() else run
    record_file = folder / "senseflow.json"
    if not record_file.is_file():
        raise UserError(f"{run} holds no student (no {record_file.name}): give the folder of a run")
    record = json.loads(record_file.read_text())
    known = {k: v for k, v in record.get("model", {}).items() if k in {f.name for f in dataclasses.fields(Model)}}
    model = Model(**{"shift": record["shift"], "shift_kind": record["shift_kind"], **known})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model.family == "embedded":
        adapter = EmbeddedAdapter(model.shift, model.shift_kind, str(device), load_vae(folder, device), folder)
        return adapter, load_transformer(folder, device), record
    adapter = make_adapter(model, device, source)
    return (
        adapter,
        load_component(network_class(folder / adapter.network), folder, adapter.network, adapter.dtype, device),
        record,
    )


def main(argv: list[str] | None = None) -> int:
    """Command line: writes one PNG per prompt and a sheet, prints where they are."""
    parser = argparse.ArgumentParser(prog="python -m senseflow.sample", description=__doc__)
    parser.add_argument("--student", type=Path, required=True, help="run folder")
    parser.add_argument("--teacher", default="", help="its folder or hub id, where it is not where it was in training")
    parser.add_argument("--prompts", nargs="+", required=True, help="one picture each")
    parser.add_argument("--steps", type=int, choices=(1, 2, 4, 8), help="default: as trained")
    parser.add_argument("--sampler", choices=SAMPLERS, default="renoise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder; default STUDENT/samples")
    args = parser.parse_args(argv)
    try:
        adapter, net, record = load_student(args.student, args.teacher)
        steps = args.steps or len(record["anchors"])
        same = steps == len(record["anchors"])
        anchors = record["anchors"] if same else adapter.schedule.anchors(steps)
        cond = adapter.encode_prompts(args.prompts)
        pictures = student_samples(adapter, net, anchors, cond, args.seed, args.sampler).cpu()
    except UserError as error:
        print(f"senseflow.sample: {error}", file=sys.stderr)
        return 2
    out = args.out or args.student / "samples"
    for i, (prompt, picture) in enumerate(zip(args.prompts, pictures, strict=True)):
        name = "".join(c if c.isalnum() else "-" for c in prompt)[:60]
        save_png(picture_grid(picture[None], 1, scale=4), out / f"{i:03d}-{name}.png")
    save_png(picture_grid(pictures, min(8, len(pictures)), scale=3), out / "sheet.png")
    print(f"{len(pictures)} pictures in {out}, all of them on {out / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
