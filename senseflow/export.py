"""The student as an ordinary diffusers folder: transformer/, scheduler/, and what we add, senseflow.json."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from senseflow.config import Config
from senseflow.flow import FlowSchedule

SAMPLER_NOTE = "stochastic re-noise at the anchors, no guidance; euler works too"


def make_scheduler(schedule: Any) -> Any:
    """The diffusers scheduler of the re-noise sampler: stochastic flow matching at our shift (an exponential mu is the
    static factor e^mu), or LCM for SDXL, whose last three of four timesteps are ours to pass."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

    if isinstance(schedule, FlowSchedule):
        factor = math.exp(schedule.shift) if schedule.kind == "exponential" else schedule.shift
        return FlowMatchEulerDiscreteScheduler(shift=factor, stochastic_sampling=True)
    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_scaling=1e9)


def save_student(folder: Path, net: Any, anchors: list[float], cfg: Config, adapter: Any) -> None:
    """Writes the student beside the old one and swaps, so that a crash leaves one of the two whole.

    net: a diffusers network; anchors: descending sigmas.
    """
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    net.save_pretrained(partial / adapter.network)
    if cfg.model.family == "embedded" and adapter.vae is not None:
        adapter.vae.save_pretrained(partial / "vae")
    make_scheduler(adapter.schedule).save_pretrained(partial / "scheduler")
    record = dict(
        anchors=anchors, shift=cfg.model.shift, shift_kind=cfg.model.shift_kind,
        family=cfg.model.family, preset=cfg.preset, sampler=SAMPLER_NOTE, model=asdict(cfg.model),
    )  # fmt: skip
    (partial / "senseflow.json").write_text(json.dumps(record, indent=1) + "\n")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
