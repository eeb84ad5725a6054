"""Plans of tiny pipelines: what test_memory.py and test_fp8.py share."""

import pytest
from tiny_pipelines import write_flux, write_klein, write_sd3, write_sdxl

from senseflow.cli import parse
from senseflow.iteration import iterate
from senseflow.planning import Planner, Target
from senseflow.train import build_discriminator

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
WRITE = {
    "sd35-medium": lambda folder: write_sd3(folder, medium=True), "flux-dev": write_flux, "sdxl": write_sdxl,
    "flux2-klein": write_klein,
}  # fmt: skip
HAS_KLEIN = pytest.mark.skipif(not hasattr(diffusers, "Flux2Transformer2DModel"), reason="diffusers without FLUX.2")
REAL = [pytest.param(name, marks=HAS_KLEIN if name == "flux2-klein" else ()) for name in WRITE]
SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "model.dtype=fp32", "train.precision=fp32", "data.batch=2",
    "train.gen_every=1", "model.decode=fp32", "log.tensorboard=false", "log.progress=false", "disc.backbone=",
    "disc.taps=-1,2", "disc.size=56", "disc.width=32", "disc.downsample=1", "ema.decay=0.5", "rollout.backward_prob=0",
)]  # fmt: skip


class Folders(dict):
    """Tiny pipelines by preset, each written when first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, preset):
        self[preset] = WRITE[preset](self.make(preset))
        return self[preset]


def config_of(preset, folders, *more):
    """Of a tiny pipeline; `tiny` is the embedded preset as it is, in a small batch."""
    if preset == "tiny":
        return parse([preset, "--data.batch=4", "--train.gen_every=1", "--rollout.backward_prob=0", *more], "").config
    return parse([preset, "--teacher", str(folders[preset]), *SMALL, *more], "").config


def planner_of(cfg, **target):
    return Planner(cfg, Target(**({"type": "cpu", "bytes": 1e12, "ranks": 1} | target)), iterate, build_discriminator)


def by_part(rows):
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row.part, {})[row.what.partition(",")[0]] = row.device
    return found
