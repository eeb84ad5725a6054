"""Students of tiny random pipelines without a training run: the teacher's copy, its weights moved."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_pipelines import write_flux, write_klein, write_sd3, write_sdxl

from senseflow import checkpoint
from senseflow.cli import parse
from senseflow.export import save_student
from senseflow.fields import to_dict
from senseflow.models import lora
from senseflow.models.families import make_adapter

WRITE = {"sd35-medium": lambda f: write_sd3(f, medium=True), "sd35-large": write_sd3, "flux-dev": write_flux,
         "sdxl": write_sdxl, "flux2-klein": write_klein}  # fmt: skip

SMALL = ["--model.side", "64", "--model.dtype", "fp32", "--train.precision", "fp32", "--train.moments", "fp32"]


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
    small = list(SMALL)
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


def make_lora_run(preset: str, teacher: Path, run: Path):
    """A run folder of a LoRA student of rank 2: its merged network, and a checkpoint of A and B with other, raw ones
    beside the EMA. Returns the student, at the EMA."""
    small = [*SMALL, "--model.variant", "lora", "--lora.rank", "2"]
    small += ["--lora.alpha", "3", "--lora.guidance", "2.5", "--lora.targets", "to_q,to_out.0"]
    small += [] if preset == "sdxl" else ["--model.text_length", "16"]
    cfg = parse([preset, "--teacher", str(teacher), "--out", str(run), *small], "").config
    adapter = make_adapter(cfg.model, torch.device("cpu"))
    student, raw = lora.lora_pair(adapter, adapter.load_network(torch.float32), cfg.lora, 0)
    for seed, net in enumerate((student, raw)):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in lora.trainable(net):
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    save_student(run / "student", lora.merged(student), adapter.schedule.anchors(4), cfg, adapter)
    shadow = [p.detach() for p in lora.trainable(student)]
    updates = {"student": lora.trained_state(raw), "ema": {"shadow": shadow}}
    checkpoint.save(run / "checkpoints", 7, {"config": to_dict(cfg), "updates": updates}, 1)
    return student
