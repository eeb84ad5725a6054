"""The paper's component table on the embedded teacher, several seeds a row: `python -m senseflow.ablate [GROUP ...]`.

    python -m senseflow.ablate core --seeds 0 1 2            # DMD2, +IDA, +ISG, +VFM discriminator, full without IDA
    python -m senseflow.ablate --list                        # all groups and what each row changes
    python -m senseflow.ablate core ttur --report-only       # the report of what is there already

All rows of a group get the same number of student updates from the same teacher, data order and noises of a seed. A run
that is done is kept as one file in --records and never made again; one that was stopped goes on from its checkpoint.
Several processes may share --out and --records: each takes the runs that no other is at.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import senseflow_kernels
from senseflow import checkpoint
from senseflow.ablation.report import write_report
from senseflow.ablation.rows import BASES, GROUPS, Row, command, rows_of
from senseflow.cli import Arguments, parse
from senseflow.config import Config, UserError
from senseflow.fields import from_dict, to_dict
from senseflow.logs import Diverged, Monitors
from senseflow.resuming import FREE, flat
from senseflow.train import train

# Set by this command, or what would make a run another length than its row's.
OWN = ("seed", "out", "train.iterations", "train.minutes", "train.fake_warmup", "train.checkpoint_every",
       "train.keep_last", "eval.every")  # fmt: skip

CURVES = (
    "eval/kid_raw",
    "eval/kid",
    "eval/fd",
    "eval/r1",
    "eval/cosine",
    "fake_real_gap",
    "ida_drift",
    "normaliser",
    "d_accuracy",
    "saturation",
)


def build_parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m senseflow.ablate", description=__doc__, formatter_class=text, allow_abbrev=False
    )
    add = parser.add_argument
    add("groups", nargs="*", default=["core"], help=f"of {', '.join(GROUPS)}, or all; default core")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--updates", type=int, default=24, help="student updates of every run")
    add("--evaluations", type=int, default=4, help="how often a run is scored, at equal distances")
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="changes every run: train.threads=1, data.batch=8, ...")  # fmt: skip
    add("--out", type=Path, default=Path("runs/ablate"), help="the runs themselves: checkpoints, grids")
    add(
        "--records", type=Path, default=Path("docs/ablation"), help="one JSON a finished run, and the report; to commit"
    )
    add("--minutes", type=float, default=0.0, help="start no further run after so long; 0: no limit")
    add("--list", action="store_true", help="print groups and rows, run nothing")
    add("--report-only", action="store_true", help="run nothing")
    add("--keep-runs", action="store_true", help="keep the checkpoints of a run that is done")
    return parser


def settings_of(row: Row, seed: int, args: argparse.Namespace) -> Config:
    """The whole config of one run. Raises UserError for a bad --set."""
    changes = [word for pair in args.set for word in _flag(pair)]
    words = command(row, args.updates, args.evaluations, changes)
    out = args.out / row.name / f"seed{seed}"
    return parse([*words, "--seed", str(seed), "--out", str(out), "--log.tensorboard", "false"], "").config


def _flag(pair: str) -> list[str]:
    name, equals, value = pair.partition("=")
    if not equals or name in OWN:
        raise UserError(f"--set {pair!r}: allowed is FIELD=VALUE of senseflow.train --help, but {', '.join(OWN)}")
    return [f"--{name}", value]


def record_file(args: argparse.Namespace, row: Row, seed: int) -> Path:
    return args.records / "runs" / f"{row.name}-seed{seed}.json"


def same_run(cfg: Config) -> dict[str, Any]:
    """What of a config decides a run's numbers: all but where it lies, how it is shown and what computes it."""
    plain = to_dict(cfg)
    for name in ("out", "log", "preset", "dist", "memory", "kernels"):
        plain.pop(name)
    saving = ("checkpoint_every", "keep_last", "keep_best", "checkpoint_async", "threads")
    for name in {*FREE, *(f"train.{leaf}" for leaf in saving)} - {"data.path"}:
        section, _, leaf = name.partition(".")
        plain[section].pop(leaf)
    return json.loads(json.dumps(plain))


def other_field(was: dict[str, Any], cfg: Config) -> str:
    """The first setting in which a run of config `was` is another than cfg's, or nothing. What `was` does not have
    yet, a field of a later version, has its default."""
    before, now = flat(same_run(from_dict(was))), flat(same_run(cfg))
    return next((f"{k} {before[k]!r}, now {v!r}" for k, v in now.items() if before[k] != v), "")


def finished(file: Path, cfg: Config) -> bool:
    """Whether this very run is recorded. Raises UserError where one of other settings has its name."""
    if not file.is_file():
        return False
    try:
        was = json.loads(file.read_text())["same"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no record of a run: remove it") from None
    differs = other_field(was, cfg)
    if differs:
        raise UserError(f"{file} is of other settings ({differs}): choose another --records, or remove it")
    return True


def rows_of_run(metrics: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def curves(rows: list[dict[str, float]], gen_every: int, warmup: int) -> dict[str, list[list[float]]]:
    """Metric -> [[student updates so far, value], ...] from a run's rows; the later of two at one place."""
    found: dict[str, dict[float, float]] = {name: {} for name in CURVES}
    for row in rows:
        updates = max(row["iteration"] - warmup, 0) / gen_every
        for name in CURVES:
            if row.get(name) is not None:
                found[name][updates] = row[name]
    return {name: [[x, y] for x, y in points.items()] for name, points in found.items() if points}


def warned(rows: list[dict[str, float]]) -> list[str]:
    """What the run's monitors said of it, each once."""
    monitors = Monitors(max_nonfinite=len(rows) + 1)
    known = [{k: float("nan") if v is None else v for k, v in row.items()} for row in rows]
    return monitors.check(known)


def record(row: Row, seed: int, cfg: Config, out: Path, seconds: float, status: str) -> dict[str, Any]:
    """What is kept of a run: settings, curves, scores at the end, how it ended."""
    import platform

    import torch

    rows = rows_of_run(out / "metrics.jsonl")
    scored = [row for row in rows if "eval/kid" in row]
    if scored and scored[-1]["eval/kid"] is None and status == "done":
        status = "diverged: the last scores are not finite"
    lines = curves(rows, cfg.train.gen_every, cfg.train.fake_warmup)
    last = {name: points[-1][1] for name, points in lines.items() if name.startswith("eval/")}
    best = {
        name: min(v for _, v in points)
        for name, points in lines.items()
        if name in ("eval/kid_raw", "eval/kid", "eval/fd")
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return dict(
        row=row.name, seed=seed, status=status, same=same_run(cfg), final=last, best=best, curves=lines,
        warnings=warned(rows), seconds_of_this_part=round(seconds, 1), device=device, torch=torch.__version__,
        python=platform.python_version(),
    )  # fmt: skip


def one_run(row: Row, seed: int, cfg: Config, args: argparse.Namespace, start: Callable[[Arguments], int]) -> bool:
    """Makes one run, or goes on with it, and records it. A divergence is a result: it is recorded as such. Returns
    whether it ended; Ctrl-C saves it and it does not."""
    out = Path(cfg.out)
    begun = checkpoint.newest(out / "checkpoints")
    if begun:
        if differs := other_field(checkpoint.read_plain(begun)["config"], cfg):
            raise UserError(f"{out} holds a run of other settings ({differs}): choose another --out, or remove it")
    elif out.exists():
        shutil.rmtree(out)  # stopped before its first checkpoint
    now, status = time.monotonic(), "done"
    try:
        if start(Arguments(cfg, resume=begun is not None)) != 0:
            return False
    except Diverged as error:
        status = f"diverged: {str(error).partition(': lower its')[0].partition('; last good')[0]}"
    result = record(row, seed, cfg, out, time.monotonic() - now, status)
    file = record_file(args, row, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(result) + "\n")
    os.replace(partial, file)
    if not args.keep_runs:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return True


@contextmanager
def alone(out: Path) -> Iterator[bool]:
    """Whether this process may make the run of folder `out` now: no other is at it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def run_all(args: argparse.Namespace, start: Callable[[Arguments], int] = train) -> int:
    """Every run of the groups that is not recorded, seed by seed, so that all rows have one seed first. Returns the
    exit status: 0, or 130 after Ctrl-C."""
    rows, began, elsewhere = rows_of(args.groups), time.monotonic(), 0
    plan = [(row, seed, settings_of(row, seed, args)) for seed in dict.fromkeys(args.seeds) for row in rows]
    left = [(row, seed, cfg) for row, seed, cfg in plan if not finished(record_file(args, row, seed), cfg)]
    print(f"{len(plan)} runs, {len(plan) - len(left)} of them done already", flush=True)
    for k, (row, seed, cfg) in enumerate(left, 1):
        if 0 < args.minutes * 60 <= time.monotonic() - began:
            print(f"--minutes {args.minutes:g} are over: {len(left) - k + 1} runs left; the same command goes on")
            break
        with alone(Path(cfg.out)) as free:
            if not free or finished(record_file(args, row, seed), cfg):
                elsewhere += not free
                continue
            print(f"run {k} of {len(left)}: {row.name}, seed {seed}", flush=True)
            if not one_run(row, seed, cfg, args, start):
                print("stopped: the same command goes on")
                return 130
        write_report(args.records, args.groups)
    if elsewhere:
        print(f"{elsewhere} runs were being made by another process", flush=True)
    return 0


def show() -> None:
    """Prints the groups: rows, what each changes, and what it is compared with."""
    for group, rows in GROUPS.items():
        print(f"{group} (compared with {BASES[group]})")
        for row in rows:
            print(f"  {row.name:<24} {row.title:<44} {' '.join(row.flags)}")


def main(argv: list[str] | None = None) -> int:
    """Command line. Bad input is one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        if args.list:
            show()
            return 0
        for name in ("updates", "evaluations"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)}: allowed is 1 or more")
        args.groups = list(GROUPS) if "all" in args.groups else args.groups
        rows_of(args.groups)  # a group of a wrong name, before --report-only leaves it out unsaid
        status = 0 if args.report_only else run_all(args)
        print(f"report: {write_report(args.records, args.groups)}", flush=True)
        return status
    except (UserError, senseflow_kernels.Unavailable) as error:
        print(f"senseflow.ablate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # between two runs, or before one has begun: a run itself saves
        print("stopped: the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
