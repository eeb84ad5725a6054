"""The memory presets of docs/memory.md: `python -m bench.plans [--write docs/memory.md] [NAME ...]`; without a GPU.

For each device the smallest set of switches with which a preset fits it, and the table that --dry-run prints with them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

from senseflow.cli import parse
from senseflow.fitting import flags, report, smallest
from senseflow.logs import print_table
from senseflow.planning import Planner, target_of
from senseflow.train import build_discriminator, iterate

ONE_H200, ONE_80 = "--memory.device_gb 149", "--memory.device_gb 80"
LORA = "--model.variant lora --data.batch 1"
PLANS = {  # name -> (title, what is typed)
    "sd35-large-h200": ("SD 3.5 Large, one H200 of 149 GB", f"sd35-large --data.batch 1 {ONE_H200}"),
    "sd35-large-8x80": ("SD 3.5 Large, 8 GPUs of 80 GB", f"sd35-large {ONE_80} --memory.ranks 8"),
    "flux-dev-h200": ("FLUX.1-dev, one H200 of 149 GB", f"flux-dev --data.batch 1 {ONE_H200}"),
    "flux-dev-8x80": ("FLUX.1-dev, 8 GPUs of 80 GB", f"flux-dev {ONE_80} --memory.ranks 8"),
    "sdxl-80": ("SDXL, one GPU of 80 GB", f"sdxl --data.batch 1 {ONE_80}"),
    "lora-sdxl-24": ("LoRA, SDXL, 24 GB", f"sdxl {LORA} --memory.device_gb 24"),
    "lora-sd35-medium-24": ("LoRA, SD 3.5 Medium, 24 GB", f"sd35-medium {LORA} --memory.device_gb 24"),
    "lora-sd35-large-48": ("LoRA, SD 3.5 Large, 48 GB", f"sd35-large {LORA} --memory.device_gb 48"),
    "lora-flux-dev-48": ("LoRA, FLUX.1-dev, 48 GB", f"flux-dev {LORA} --memory.device_gb 48"),
}
START, END = "<!-- plans: python -m bench.plans --write docs/memory.md -->", "<!-- plans end -->"


def section(name: str) -> str:
    """Markdown of one plan."""
    title, typed = PLANS[name]
    cfg = parse(typed.split(), "").config
    planner = Planner(cfg, target_of(cfg), iterate, build_discriminator)
    found = smallest(planner, cfg)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_table(*report(found[1] if found else planner.plan(cfg)))
    command = f"python -m senseflow.train {typed} {flags(found[0]) if found else ''}".strip()
    verdict = "" if found else "\nIt does not fit, with no set of switches.\n"
    return f"### {title}\n{verdict}\n```\n{command} --dry-run\n\n{out.getvalue().rstrip()}\n```\n"


def main(argv: list[str]) -> int:
    own = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__, allow_abbrev=False)
    own.add_argument("names", nargs="*", choices=[*PLANS, []], metavar="NAME")
    own.add_argument("--write", type=Path, help="the file whose part between the two marks is replaced")
    args = own.parse_args(argv)
    os.environ["COLUMNS"] = "120"
    text = []
    for name in args.names or PLANS:
        text.append(section(name))
        print(text[-1], flush=True)
    if args.write:
        before, _, rest = args.write.read_text().partition(START)
        args.write.write_text(f"{before}{START}\n\n" + "\n".join(text) + f"\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
