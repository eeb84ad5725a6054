"""The memory presets of docs/memory.md: `python -m bench.plans [--write docs/memory.md] [NAME ...]`; without a GPU.

For each device the smallest set of switches with which a preset fits it, and the table that --dry-run prints with them.
The ones that leave the host alone have optim.in_backward, which excludes host states.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
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
    "sd35-large-h200-alone": (
        "SD 3.5 Large, one H200 and nothing on the host",
        f"sd35-large --data.batch 1 --optim.in_backward true {ONE_H200}",
    ),
    "sd35-large-8x80": ("SD 3.5 Large, 8 GPUs of 80 GB", f"sd35-large {ONE_80} --memory.ranks 8"),
    "flux-dev-h200": ("FLUX.1-dev, one H200 of 149 GB", f"flux-dev --data.batch 1 {ONE_H200}"),
    "flux-dev-h200-alone": (
        "FLUX.1-dev, one H200 and nothing on the host",
        f"flux-dev --data.batch 1 --optim.in_backward true {ONE_H200}",
    ),
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
    begun = time.perf_counter()
    cfg = parse(typed.split(), "").config
    planner = Planner(cfg, target_of(cfg), iterate, build_discriminator)
    found = smallest(planner, cfg)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_table(*report(found[1] if found else planner.plan(cfg)))
    plan = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    command = f"python -m senseflow.train {typed} {flags(found[0]) if found else ''}".strip()
    verdict = "" if found else "\nIt does not fit, with no set of switches.\n"
    print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return f"### {title}\n{verdict}\n```\n{command} --dry-run\n\n{plan}\n```\n"


def written(page: str, made: dict[str, str]) -> str:
    """The page with the sections `made` by name in place of its own; its others stay, all in the order of PLANS."""
    before, _, rest = page.partition(START)
    old, _, after = rest.partition(END)
    kept = {part.partition("\n")[0]: "### " + part.rstrip() + "\n" for part in old.split("### ")[1:]}
    sections = [made.get(name) or kept.get(title) for name, (title, _) in PLANS.items()]
    return f"{before}{START}\n\n" + "\n".join(filter(None, sections)) + f"\n{END}{after}"


def main(argv: list[str]) -> int:
    own = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__, allow_abbrev=False)
    own.add_argument("names", nargs="*", choices=[*PLANS, []], metavar="NAME")
    own.add_argument("--write", type=Path, help="the page in which these sections are replaced, between its two marks")
    args = own.parse_args(argv)
    os.environ["COLUMNS"] = "120"
    for name in args.names or PLANS:
        text = section(name)
        if args.write:
            args.write.write_text(written(args.write.read_text(), {name: text}))
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
