"""The student as it is looked at and shipped: its EMA where there is one, whole where it is sharded; xi(t) as drawn."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from senseflow.algo.isg import ErrorCurve
from senseflow.config import Config
from senseflow.dist import local, whole
from senseflow.export import save_student
from senseflow.models.lora import is_lora, merged, save_lora, shared_copy, trainable
from senseflow.steps import Parts
from senseflow.updates import Updates


def skeleton_of(net: nn.Module) -> nn.Module:
    """A copy of a network without its numbers: parameters on the meta device. Buffers are net's own."""
    memo: dict[int, Any] = {id(b): b for b in net.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo)


def student_for_use(parts: Parts, updates: Updates) -> nn.Module:
    """The network to look at and to ship, unsharded: the EMA where there is one, else the student itself."""
    updates.ready()
    if updates.ema is None:
        return parts.student
    net = shared_copy(parts.student)
    updates.ema.copy_to(trainable(net))
    return net


@contextmanager
def looking(parts: Parts, updates: Updates) -> Iterator[nn.Module]:
    """The network to look at. A sharded student has the EMA's values inside, on every rank, and its own again after."""
    if not parts.world.sharded or updates.ema is None:
        yield student_for_use(parts, updates)
        return
    mine = [local(p.detach()) for p in updates.params["student"]]
    kept = [p.clone() for p in mine]
    try:
        torch._foreach_copy_(mine, [local(s) for s in updates.ema.shadow])
        yield parts.student
    finally:
        torch._foreach_copy_(mine, kept)


@torch.no_grad()
def unsharded(parts: Parts, updates: Updates) -> nn.Module | None:
    """The network to ship as a plain one, on the CPU of rank 0; None on the others. All ranks must ask."""
    values = dict(parts.student.state_dict())
    if updates.ema is not None:
        names = {id(p): name for name, p in parts.student.named_parameters()}
        shadows = zip(updates.params["student"], updates.ema.shadow, strict=True)
        values |= {names[id(p)]: s for p, s in shadows}
    kinds = {name: t.dtype for name, t in parts.student.state_dict().items()}
    state = {}
    for name, value in values.items():  # one after another: no rank holds the whole network on its device
        full = whole(value).to(kinds[name])
        if parts.world.main:
            state[name] = full.cpu()
    if not parts.world.main:
        return None
    assert parts.skeleton is not None
    net = copy.deepcopy(parts.skeleton)
    net.load_state_dict(state, assign=True)
    return net


def ship(cfg: Config, parts: Parts, updates: Updates, out: Path) -> None:
    """Writes out/student, and the LoRA of a LoRA student; on rank 0. All ranks must ask."""
    updates.ready()
    if parts.world.sharded:
        net = unsharded(parts, updates)
    else:
        net = student_for_use(parts, updates) if parts.world.main else None
    if net is None:
        return
    if is_lora(net):
        save_lora(net, out / "lora" / "pytorch_lora_weights.safetensors")
        net = merged(net)
    save_student(out / "student", net, parts.anchors, cfg, parts.adapter)


def save_curve(curve: ErrorCurve, anchors: list[float], out: Path) -> None:
    """xi(sigma), the teacher's measured reconstruction error, as xi.json and xi.png with the anchors marked."""
    from matplotlib.figure import Figure

    points = {"sigma": curve.sigmas.tolist(), "xi": curve.xi.tolist()}
    (out / "xi.json").write_text(json.dumps(points) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="sigma", ylabel="mean (x0_hat - x0)^2")
    axes.plot(points["sigma"], points["xi"])
    for anchor in anchors:
        axes.axvline(anchor, linewidth=0.5, color="grey")
    figure.savefig(out / "xi.png")
