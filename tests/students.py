"""Students of tiny random pipelines without a training run: the teacher's copy, its weights moved."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_pipelines import write_flux, write_sd3, write_sdxl

from senseflow import checkpoint
from senseflow.cli import parse
from senseflow.config import to_dict
from senseflow.export import save_student
from senseflow.models.families import make_adapter

WRITE = {"sd35-medium": lambda f: write_sd3(f, medium=True), "sd35-large": write_sd3, "flux-dev": write_flux,
         "sdxl": write_sdxl}  # fmt: skip


def moved(net, seed: int, by: float = 0.05):
    """Every parameter moved by `by` of its own spread, at random."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * by * (p.std() if p.numel() > 1 else 1.0))
    return net


def make_run(preset: str, teacher: Path, run: Path, *flags: str, ema: bool = False, student: bool = True):
    """A run folder: student/ as the trainer writes it, and one checkpoint whose raw weights, and EMA, differ from it.
    Returns (shipped, raw, EMA) networks."""
    small = ["--model.side", "64", "--model.dtype", "fp32"]
    if preset != "sdxl":
        small += ["--model.text_length", "16"]
    cfg = parse([preset, "--teacher", str(teacher), "--out", str(run), *small, *flags], "").config
    adapter = make_adapter(cfg.model, torch.device("cpu"))
    nets = [moved(adapter.student_of(adapter.load_network(torch.float32)), seed) for seed in range(3)]
    anchors = adapter.schedule.anchors(cfg.model.steps, cfg.model.anchors == "released")
    if student:
        save_student(run / "student", nets[0], anchors, cfg, adapter)
    updates = {"student": nets[1].state_dict()}
    if ema:
        updates["ema"] = {"shadow": [p.detach() for p in nets[2].parameters()]}
    checkpoint.save(run / "checkpoints", 7, {"config": to_dict(cfg), "updates": updates}, 1)
    return nets
