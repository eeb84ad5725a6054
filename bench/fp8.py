"""What an 8-bit teacher changes: `python -m bench.fp8 [PRESET] [--random WIDTH ...] [--samples N] [--json FILE]
[--any.field VALUE]`.

The relative error ||v_8 - v|| / ||v|| of the teacher's score over the run's own pictures and prompts at each sigma:
conditional, and with the preset's guidance for the DMD term (middle of its range), where the difference of two
predictions is blown up. Beside it, and what matters to the student, the error of the DMD gradient x0_fake - x0_real
when the fake is the unquantised teacher's student at the start and the guidance gives the gap. --random: and the same
of random SD3 transformers of the embedded form, RANDOM_LAYERS blocks of these widths, as diffusers initialises them:
how the error goes with width and depth where nothing was trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import environment
from senseflow.algo.dmd import teacher_predictions
from senseflow.cli import parse
from senseflow.config import Config, UserError
from senseflow.fields import replace
from senseflow.flow import add_noise
from senseflow.flow import cfg as guided
from senseflow.logs import print_table
from senseflow.models.fp8 import to_fp8
from senseflow.steps import Parts, encoded
from senseflow.train import build

RANDOM_LAYERS, HEAD = 12, 64
SIGMAS = (0.05, 0.25, 0.5, 0.75, 0.9, 0.98)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@torch.no_grad()
def score_errors(cfg: Config, parts: Parts, data: Any, samples: int) -> list[dict[str, float]]:
    """A row a sigma: errors of an 8-bit copy of the teacher, and bytes of both over the rows' keys."""
    eight = copy.deepcopy(parts.teacher)
    to_fp8(eight, parts.adapter.blocks(eight))
    batch = encoded(parts, data.batch(0, samples), 0)
    noise = parts.draws.normal(0, batch.samples, "fp8", tuple(batch.latents.shape[1:]))
    scale = torch.full((samples,), 0.5 * (cfg.dmd.guidance_min + cfg.dmd.guidance_max), device=noise.device)
    rows = []
    for value in SIGMAS:
        sigma = torch.full((samples,), value, device=noise.device)
        x = add_noise(batch.latents, noise, sigma, parts.adapter.schedule.alpha(sigma))
        found = []
        for net in (parts.teacher, eight):
            cond, uncond = teacher_predictions(
                parts.adapter, net, x, sigma, batch.cond, scale, parts.adapter.uncond(samples)
            )
            found.append((cond, cond if uncond is None else guided(cond, uncond, scale)))
        (cond, whole), (cond8, whole8) = found
        row = dict(sigma=value, score=relative(cond8, cond), guided=relative(whole8, whole))
        gap = whole - cond  # what the DMD gradient is while the fake is still the teacher; 0 where guidance is embedded
        row["dmd_gradient"] = relative(whole8 - cond, gap) if float(gap.norm()) > 0 else float("nan")
        rows.append(row)
    return rows


def random_teacher(width: int, folder: Path) -> Path:
    """A random network of the embedded teacher's form, `width` channels wide, as a diffusers folder."""
    from diffusers import SD3Transformer2DModel

    from senseflow.models.embedded import teacher_folder

    own: Any = SD3Transformer2DModel.load_config(teacher_folder("") / "transformer")
    sizes = dict(num_layers=RANDOM_LAYERS, num_attention_heads=width // HEAD, attention_head_dim=HEAD)
    torch.manual_seed(0)
    net: Any = SD3Transformer2DModel.from_config({**own, **sizes, "caption_projection_dim": width})
    net.save_pretrained(folder / "transformer")
    return folder


def measure(name: str, cfg: Config, samples: int) -> dict[str, Any]:
    """A teacher's weights in millions, those of its blocks apart, and its errors."""
    parts, data = build(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    blocks = sum(p.numel() for block in parts.adapter.blocks(parts.teacher) for p in block.parameters())
    sizes = dict(weights=sum(p.numel() for p in parts.teacher.parameters()) / 1e6, in_blocks=blocks / 1e6)
    return dict(teacher=name, **sizes, rows=score_errors(cfg, parts, data, samples))


def main(argv: list[str]) -> int:
    own = argparse.ArgumentParser(prog="python -m bench.fp8", description=__doc__, allow_abbrev=False)
    own.add_argument("--samples", type=int, default=16)
    own.add_argument("--random", type=int, nargs="+", default=[], metavar="WIDTH", help=f"multiples of {HEAD}")
    own.add_argument("--json", type=Path)
    mine, rest = own.parse_known_args(argv)
    found = []
    try:
        cfg = parse(rest, __doc__ or "").config
        found.append(measure(cfg.model.teacher or "the embedded one", cfg, mine.samples))
        for width in mine.random:
            with tempfile.TemporaryDirectory() as folder:
                random = replace(cfg, {"model.teacher": str(random_teacher(width, Path(folder)))})
                found.append(measure(f"random, {width} wide, {RANDOM_LAYERS} blocks", random, mine.samples))
    except UserError as error:
        print(f"bench.fp8: {error}", file=sys.stderr)
        return 2
    columns = ["sigma", "score", "guided score", "DMD gradient at the start"]
    for one in found:
        shown = [
            [f"{r['sigma']:g}", *(f"{r[k]:.4f}" for k in ("score", "guided", "dmd_gradient"))] for r in one["rows"]
        ]
        print_table(f"relative error of an 8-bit teacher: {one['teacher']}, {mine.samples} samples", columns, shown)
    if mine.json:
        mine.json.parent.mkdir(parents=True, exist_ok=True)
        where = environment() | dict(command=" ".join(["python", "-m", "bench.fp8", *argv]))
        record = dict(environment=where, preset=cfg.preset, samples=mine.samples, teachers=found)
        mine.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
