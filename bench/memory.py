"""The memory plan beside what is: `python -m bench.memory [PRESET ...] [--json FILE] [--any.field VALUE]`, on a GPU.

Networks of the published sizes with random weights, two whole student iterations with their optimizers, and
torch.cuda.max_memory_allocated of the second beside the plan without its reserve and its batches ahead. Each preset
with the smallest set of switches that makes it fit this GPU. Without presets: sd35-medium, sdxl and sd35-large.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness import environment
from senseflow.cli import parse
from senseflow.config import Config, UserError
from senseflow.fitting import flags, smallest
from senseflow.logs import print_table
from senseflow.memory import GB
from senseflow.planning import (
    Planner,
    busy_iteration,
    planned_batch,
    planned_parts,
    target_of,
)
from senseflow.presets import PRESETS
from senseflow.steps import Parts, encoded
from senseflow.train import build_discriminator, iterate
from senseflow.updates import Updates
from senseflow_kernels import planned

DEFAULT = ("sd35-medium", "sdxl", "sd35-large")


@torch.no_grad()
def materialised(parts: Parts, device: torch.device) -> Parts:
    """Planned parts in memory, in place, with random weights: one network after another."""
    adapter: Any = parts.adapter
    vae = getattr(adapter.vae, "inner", adapter.vae)
    for net in (parts.teacher, parts.student, parts.fake, parts.disc, parts.vfm, vae):
        if net is None:
            continue
        net.to_empty(device=device)
        for p in net.parameters():
            if p.dtype.itemsize > 1:
                p.normal_(std=0.02)
            else:  # float8 has no generator
                p.copy_(torch.full((), 0.02, device=device))
        for b in net.buffers():
            b.fill_(1)
    adapter.where = device
    return parts


def run(cfg: Config, parts: Parts, device: torch.device, times: int = 2) -> list[float]:
    """Seconds of each of some student iterations with everything that they do."""
    updates, seconds = Updates(cfg, parts), []
    number = busy_iteration(cfg, parts)
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        batch = planned_batch(cfg, parts, device)
        iterate(cfg, parts, updates, encoded(parts, batch, number), number)
        updates.ready()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(preset: str, more: list[str]) -> dict[str, Any]:
    """One row: the switches, GB predicted and measured, seconds of the second iteration."""
    cfg = parse([preset, "--data.batch=1", "--ema.decay=0", *more], __doc__ or "").config
    planner = Planner(cfg, target_of(cfg), iterate, build_discriminator)
    found = smallest(planner, cfg)
    if found is None:
        raise UserError(f"{preset} does not fit this GPU, with no set of switches")
    changed, plan = found
    predicted = sum(row.device for row in plan.rows if row.part not in ("data", "text encoders"))
    with planned():
        parts = planned_parts(plan.config, build_discriminator)
    device = torch.device("cuda")
    seconds = run(plan.config, materialised(parts, device), device)
    row = dict(preset=preset, switches=flags(changed), predicted_gb=predicted / GB)
    row["max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / GB
    row["max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / GB
    row["seconds"] = seconds[-1]
    del parts
    torch.cuda.empty_cache()
    return row


def main(argv: list[str]) -> int:
    """Prints the table. 0 where every prediction is within 5 %; 1 where one is not; 2 without a GPU."""
    own = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__, allow_abbrev=False)
    own.add_argument("--json", type=Path)
    mine, rest = own.parse_known_args(argv)
    presets = [word for word in rest if word in PRESETS]
    more = [word for word in rest if word not in presets]
    if not torch.cuda.is_available():
        print("bench.memory: there is no GPU here", file=sys.stderr)
        return 2
    rows = []
    for preset in presets or DEFAULT:
        try:
            rows.append(measure(preset, more))
        except UserError as error:
            print(f"bench.memory: {error}", file=sys.stderr)
    shown = [
        [r["preset"], r["switches"], f"{r['predicted_gb']:.2f}", f"{r['max_memory_allocated_gb']:.2f}",
         f"{r['predicted_gb'] / r['max_memory_allocated_gb'] - 1:+.1%}", f"{r['max_memory_reserved_gb']:.2f}",
         f"{r['seconds']:.2f}"] for r in rows
    ]  # fmt: skip
    columns = ["preset", "switches", "predicted GB", "allocated GB", "off", "reserved GB", "s"]
    print_table(f"memory, batch 1, {torch.cuda.get_device_name()}", columns, shown)
    if mine.json:
        mine.json.parent.mkdir(parents=True, exist_ok=True)
        mine.json.write_text(json.dumps(dict(environment=environment(), rows=rows), indent=1) + "\n")
    good = all(abs(r["predicted_gb"] / r["max_memory_allocated_gb"] - 1) <= 0.05 for r in rows)
    return 0 if rows and good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
