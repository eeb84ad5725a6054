"""The smallest set of switches with which a run fits a device, and the plan's table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from senseflow.config import Config, UserError
from senseflow.fields import replace, settings
from senseflow.memory import GB, cells
from senseflow.planning import Plan, Planner

# Each: its values from the least thrifty, and what one of them costs beside another flag. The order of equals is that
# of the costs: time first, then exactness, then both.
SWITCHES: tuple[tuple[str, tuple[Any, ...], float], ...] = (
    ("disc.checkpointing", (False, True), 1.0),
    ("model.checkpointing", ("none", "selective", "full"), 1.1),
    ("model.decode", ("fp32", "bf16"), 1.2),
    ("optim.in_backward", (False, True), 1.3),
    ("train.moments", ("fp32", "8bit"), 1.5),
    ("disc.moments", ("fp32", "8bit"), 1.6),
    ("model.teacher_dtype", ("model", "fp8"), 1.7),
    ("train.precision", ("fp32", "split", "stochastic"), 2.0),
    ("optim.host", (False, True), 3.0),
)


def thriftier(cfg: Config) -> Iterator[tuple[dict[str, Any], Config]]:
    """Every config with some switches set thriftier, and those; fewest first, then the least cost."""
    now = {name: value for name, (_, value, _) in settings(cfg).items()}
    choices = []
    for name, values, cost in SWITCHES:
        if now[name] not in values:
            values = (now[name], *values[-1:])
        at = values.index(now[name])
        if name == "train.precision" and at == 0:  # fp32 stays where the arithmetic is fp32
            values, at = values[:1] if cfg.model.dtype == "fp32" else values, 0
        choices.append([(name, value, (cost + 0.1 * k) if k else 0.0) for k, value in enumerate(values[at:])])
    sets = []
    for combination in itertools.product(*choices):
        changed = {name: value for name, value, cost in combination if cost}
        sets.append((len(changed), sum(cost for _, _, cost in combination), changed))
    for _, _, changed in sorted(sets, key=lambda s: s[:2]):
        try:
            yield changed, replace(cfg, changed)
        except UserError:  # two that exclude each other, or another optimizer's
            continue


def smallest(planner: Planner, cfg: Config) -> tuple[dict[str, Any], Plan] | None:
    """(switches, plan) of the smallest set that fits; None where none does."""
    for changed, config in thriftier(cfg):
        if planner.least(config) <= planner.target.bytes:  # else no need to run it
            plan = planner.plan(config)
            if plan.fits:
                return changed, plan
    return None


def flags(changes: dict[str, Any]) -> str:
    """As they are typed."""
    return " ".join(f"--{name} {str(value).lower() if isinstance(value, bool) else value}"
                    for name, value in changes.items())  # fmt: skip


COLUMNS = ("part", "what", "GB on the device", "GB on the host")


def report(plan: Plan) -> tuple[str, Sequence[str], list[list[str]]]:
    """(title, columns, rows) of a plan's table."""
    cfg, target = plan.config, plan.target
    reserve = cfg.memory.reserve_gb * GB if target.type == "cuda" else 0.0
    one = "each of " if target.ranks > 1 else ""
    local = math.ceil(cfg.data.batch / target.ranks)
    what = {"cuda": "GPU", "cpu": "machine without a GPU"}[target.type]
    title = f"memory plan: {cfg.preset} on {one}{target.ranks} {what}{'s' if target.ranks > 1 else ''}, batch {local}"
    return title + (" each" if one else ""), COLUMNS, cells(plan.rows, plan.total, target.bytes, reserve)
