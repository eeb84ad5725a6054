"""What a fraction of a level of white does to KID, and how sure the embedded teacher itself is of white.

    python -m bench.white [--student RUN ...] [--json FILE]

White is where all channels of a picture are above 242 of 255. Printed, and written with --json: the white of the
reference and of students; KID x1000 of the teacher's samples of another seed, as they are and with 30 % of their white
one level darker; and how far the teacher's guided prediction of x0 moves the reference's white, by noise level.
About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from senseflow.algo.rollout import predict_x0
from senseflow.data.emoji import default_names, to_float, to_uint8
from senseflow.draws import Draws
from senseflow.evaluate import REFERENCED, SCORED, SHIPPED_REFERENCE, STUDENT_SEED, Reference
from senseflow.flow import add_noise
from senseflow.metrics import kid
from senseflow.models.embedded import EmbeddedAdapter
from senseflow.sample import load_student, student_samples

ABOVE, SHARE, SIGMAS = 242, 0.3, (0.05, 0.1, 0.3, 0.5, 0.7, 0.9)


def white(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> bool [N, 3, H, W]: the pixels whose channels are all above ABOVE."""
    return (pictures.amin(1, keepdim=True) > ABOVE).expand_as(pictures)


def of_white(pictures: Tensor) -> dict[str, float]:
    """Mean and deviation of the white of uint8 pictures, levels of 255."""
    levels = pictures[white(pictures)].float()
    return dict(mean=float(levels.mean()), std=float(levels.std()))


def kids(reference: Reference, pictures: Tensor) -> dict[str, float]:
    """KID x1000 of uint8 pictures, undithered and dithered, as `Reference.score` has them."""
    x = to_float(pictures)
    return dict(
        undithered=1000 * kid(reference.raw_net(x), reference.raw_features),
        dithered=1000 * kid(reference.net(x, seed=SCORED), reference.features),
    )


@torch.no_grad()
def predicted(adapter: EmbeddedAdapter, pictures: Tensor, guidance: float) -> dict[str, float]:
    """By sigma: mean of the guided prediction less the picture where that is white, levels; every fifth picture."""
    teacher = adapter.load_network().eval()
    some = torch.arange(0, len(pictures), 5)
    cond, x, where = (
        adapter.encode_prompts(default_names()).index(some),
        to_float(pictures[some]),
        white(pictures[some]),
    )
    moved = {}
    for sigma in SIGMAS:
        at = torch.full((len(some),), sigma)
        noisy = add_noise(x, Draws(0).normal(0, some, f"white{sigma}", tuple(x.shape[1:])), at)
        plain = predict_x0(adapter, teacher, noisy, at, cond)
        empty = predict_x0(adapter, teacher, noisy, at, adapter.uncond(len(some)))
        moved[f"{sigma:g}"] = float((empty + guidance * (plain - empty) - x)[where].mean() * 127.5)
    return moved


def measure(students: list[Path]) -> dict[str, Any]:
    reference = Reference(SHIPPED_REFERENCE)
    pictures, own = to_uint8(reference.pictures), load_file(SHIPPED_REFERENCE / "samples.safetensors")["pictures"]
    darker = own - (white(own) & (torch.rand(own.shape, generator=torch.Generator().manual_seed(0)) < SHARE)).byte()
    whites = {"reference": of_white(pictures)}
    for run in students:
        adapter, net, record = load_student(run)
        cond = adapter.encode_prompts(default_names())
        whites[run.name] = of_white(to_uint8(student_samples(adapter, net, record["anchors"], cond, STUDENT_SEED)))
    kid_of = {"as they are": kids(reference, own), "30 % of white one level darker": kids(reference, darker)}
    moved = predicted(EmbeddedAdapter(), pictures, reference.record["guidance"])
    return dict(
        white=whites, kid=kid_of, predicted_minus_picture=moved, seeds=dict(scored=SCORED, reference=REFERENCED)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    text = json.dumps(measure(args.student), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
