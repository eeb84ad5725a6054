"""The student as an ordinary diffusers folder: transformer/, scheduler/, and what we add, senseflow.json."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from senseflow.config import Config

SAMPLER_NOTE = "stochastic re-noise at the anchors, no guidance; euler works too"


def save_student(folder: Path, net: Any, anchors: list[float], cfg: Config, adapter: Any = None) -> None:
    """Writes the student beside the old one and swaps, so that a crash leaves one of the two whole.

    net: a diffusers SD3Transformer2DModel; anchors: descending sigmas.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    net.save_pretrained(partial / "transformer")
    if getattr(adapter, "vae", None) is not None:
        adapter.vae.save_pretrained(partial / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=cfg.model.shift, stochastic_sampling=True)
    scheduler.save_pretrained(partial / "scheduler")
    record = dict(
        anchors=anchors, shift=cfg.model.shift, shift_kind=cfg.model.shift_kind,
        family=cfg.model.family, preset=cfg.preset, sampler=SAMPLER_NOTE,
    )  # fmt: skip
    (partial / "senseflow.json").write_text(json.dumps(record, indent=1) + "\n")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
