"""Whole iterations side by side: `python -m bench.step [PRESET] [--iterations N] [--json FILE] [--any.field VALUE]`.

Every form trains its own copy of the same weights on the same batches and draws, in turns within one process, so a
form's time stands beside another's for the very same rollout length. Losses are compared before anything is timed.
Forms: ours (senseflow.train.iterate), released (bench.released, the published order), released with one of its wastes
off at a time, and tuned (released, all of them off, fused AdamW, compiled as by `--compile blocks`); `ours, compile`
is compiled too, `ours, graphs` (with a GPU) is replayed: its networks are called at captures alone, so their pictures
are not counted. With `--disc.kind none` and what bench.modelopt.FLAGS has: ours beside nvidia-modelopt's DMD2, where
that is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from importlib import metadata
from importlib.util import find_spec
from math import nan
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch._dynamo import utils as dynamo

from bench.harness import environment
from bench.modelopt import ModeloptLoop
from bench.released import ReleasedLoop, Switches
from senseflow.cli import parse
from senseflow.compiling import compile_parts
from senseflow.config import UserError
from senseflow.graphs import Replayed
from senseflow.logs import print_table
from senseflow.steps import Parts, encoded
from senseflow.train import build, iterate
from senseflow.updates import Updates

Iterate = Callable[[Any, int], dict[str, Any]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEAN = Switches(own_features_of_r=False, look_always=False, per_parameter=False, read_back=False, fused_adamw=True)


class Counted:
    """An adapter that counts network calls by name, in pictures (a batch of two per sample is two)."""

    def __init__(self, parts: Parts):
        self.adapter, self.counts = parts.adapter, Counter()
        self.names = {id(parts.student): "student", id(parts.fake): "fake", id(parts.teacher): "teacher"}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def predict(self, net: Any, x: Any, *rest: Any) -> Any:
        self.counts[self.names[id(net)]] += len(x)
        return self.adapter.predict(net, x, *rest)

    def decode(self, latents: Any) -> Any:
        self.counts["decode"] += len(latents)
        return self.adapter.decode(latents)


class CountedBackbone(torch.nn.Module):
    """The frozen backbone, its passes counted in pictures."""

    def __init__(self, vfm: Any, counts: Counter):
        super().__init__()
        self.vfm, self.counts = vfm, counts

    def features(self, pixels: Any, *rest: Any) -> Any:
        self.counts["backbone"] += len(pixels)
        return self.vfm.features(pixels, *rest)


def own_copy(parts: Parts, compiled_by: Any = None) -> tuple[Parts, Counter]:
    """parts with student, fake and D of its own, and what counts its calls. The frozen networks are shared, but for a
    config to compile by: then every network is its own, its blocks compiled as `--compile blocks` has them."""
    mine = replace(
        parts, student=copy.deepcopy(parts.student), fake=copy.deepcopy(parts.fake), disc=copy.deepcopy(parts.disc)
    )
    if compiled_by is not None:
        mine.teacher, mine.vfm = copy.deepcopy(parts.teacher), copy.deepcopy(parts.vfm)
        mine.adapter = copy.copy(parts.adapter)
        mine.adapter.vae = copy.deepcopy(parts.adapter.vae)
        compile_parts(mine, replace(compiled_by, kernels=replace(compiled_by.kernels, compile="blocks")))
    counted: Any = Counted(mine)
    mine.adapter = counted
    if mine.vfm is not None:
        mine.vfm = CountedBackbone(mine.vfm, counted.counts)
    return mine, counted.counts


def forms(cfg: Any, parts: Parts, only: list[str]) -> dict[str, tuple[Iterate, Counter]]:
    """Name -> (one iteration, its counts). Raises UserError for a name that is none."""
    recipes: dict[str, Switches | None] = {"ours": None, "ours, compile": None}
    if torch.cuda.is_available():
        recipes |= {"ours, graphs": None, "ours, compile, graphs": None}
    if cfg.disc.kind == "none":  # DMD2 without a GAN
        recipes["modelopt"] = None
    else:
        recipes["released"] = Switches()
        for f in fields(Switches):
            value = not getattr(Switches(), f.name)
            recipes[f"released, {f.name} {str(value).lower()}"] = replace(Switches(), **{f.name: value})
        recipes["tuned"] = LEAN
    known = list(recipes)
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {unknown[0]!r}: allowed is {', '.join(known)}")
    made: dict[str, tuple[Iterate, Counter]] = {}
    for name in only or [name for name in known if name != "modelopt" or find_spec("modelopt")]:
        compiles = name == "tuned" or "compile" in name
        mine, counts = own_copy(parts, cfg if compiles else None)
        switches = recipes[name]
        if switches is not None:
            made[name] = ReleasedLoop(cfg, mine, switches).iterate, counts
        elif name == "modelopt":
            made[name] = ModeloptLoop(cfg, mine, told=warm_up(cfg)).iterate, counts
        elif "graphs" in name:
            made[name] = Replayed(cfg, mine, Updates(cfg, mine), iterate), counts
        else:
            updates = Updates(cfg, mine)
            made[name] = (lambda b, i, p=mine, u=updates: iterate(cfg, p, u, b, i)), counts
    return made


def warm_up(cfg: Any) -> int:
    """Iterations before the timed ones: two cycles; with a GPU enough that every kind has been captured."""
    return (12 if torch.cuda.is_available() else 2) * cfg.train.gen_every


def check(rows: dict[str, list[dict[str, float]]], reference: str, every: int) -> None:
    """Raises AssertionError where a form's losses are not those of `reference`: to 1e-4 while weights are the same, to
    1 % on later iterations (Adam's first steps are signs, which rounding can turn). modelopt's fake learns on a
    picture made anew after the student's update, ours on the one before it: 5 % from the first of these on."""
    for name, losses in rows.items():
        for i, (mine, theirs) in enumerate(zip(losses, rows[reference], strict=True)):
            after = name == "modelopt" and i + 1 >= every
            for key in mine.keys() & theirs.keys() & {"dmd", "isg", "adv", "fake", "disc"}:
                bound = (1e-4 if i == 0 else 5e-2 if after else 1e-2) * max(abs(theirs[key]), 1e-2)
                assert abs(mine[key] - theirs[key]) <= bound, f"{name}, iteration {i}: {key} {mine[key]} {theirs[key]}"


def measure(cfg: Any, parts: Parts, data: Any, only: list[str], iterations: int, clock: str) -> dict[str, Any]:
    """Seconds per form and iteration, losses of the warm-up, pictures through each network."""
    made, now = forms(cfg, parts, only), CLOCKS[clock]
    warm = warm_up(cfg)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    losses: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    graphs = 0
    for iteration in range(warm + iterations):
        batch = encoded(parts, data.batch(iteration, cfg.data.batch), iteration)
        if iteration == warm:
            check(losses, next(iter(made)), cfg.train.gen_every)
            graphs = dynamo.counters["stats"]["unique_graphs"]
            for _, counts in made.values():
                counts.clear()
        first = iteration % len(made)  # in turns: each form follows each other one's leftovers in the caches
        for name in [*made][first:] + [*made][:first]:
            run = made[name][0]
            start = now()
            found = run(batch, iteration)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if iteration >= warm:
                seconds[name].append(now() - start)
            else:
                losses[name].append({k: float(v) for k, v in found.items()})
    assert dynamo.counters["stats"]["unique_graphs"] == graphs, "something was compiled while it was timed"
    pictures = {name: dict(counts) for name, (_, counts) in made.items()}
    return dict(seconds=seconds, pictures=pictures, warm=warm)


def per_cycle(times: list[float], warm: int, every: int) -> tuple[float, float, float]:
    """(median of critic iterations, of generator iterations, of the mean iteration of a cycle that has one of these),
    in seconds; nan for a kind without an iteration."""
    kinds = [[t for i, t in enumerate(times) if ((warm + i + 1) % every == 0) == gen] for gen in (False, True)]
    critic, generator = (median(kind) if kind else nan for kind in kinds)
    return critic, generator, generator if every == 1 else ((every - 1) * critic + generator) / every


def summary(found: dict[str, Any], every: int, batch: int) -> list[dict[str, Any]]:
    """A row per form: per_cycle's medians in ms, time over that of ours (the first form, where ours is none), the
    median and quartiles of the same over iterations, pictures through each network per picture trained on."""
    base = found["seconds"].get("ours") or next(iter(found["seconds"].values()))
    ours = per_cycle(base, found["warm"], every)[2]
    rows = []
    for name, times in found["seconds"].items():
        critic, generator, mean = per_cycle(times, found["warm"], every)
        low, middle, high = quantiles([t / b for t, b in zip(times, base, strict=True)], n=4)
        counts = {k: n / batch / len(times) for k, n in found["pictures"][name].items()}
        rows.append(dict(
            form=name, critic_ms=1e3 * critic, generator_ms=1e3 * generator, iteration_ms=1e3 * mean,
            over_ours=mean / ours, median_over_ours=middle, quartiles_over_ours=[low, high], pictures=counts,
            iterations=len(times),
        ))  # fmt: skip
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of `summary` as printed."""
    ms = ["" if row[k] != row[k] else f"{row[k]:.0f}" for k in ("critic_ms", "generator_ms", "iteration_ms")]
    low, high = row["quartiles_over_ours"]
    counts = [f"{row['pictures'].get(k, 0):.2f}" for k in ("student", "teacher", "fake", "backbone")]
    return [row["form"], *ms, f"{row['over_ours']:.2f}", f"{low:.2f} to {high:.2f}", *counts]


COLUMNS = ["form", "critic ms", "generator ms", "iteration ms", "time / ours", "quartiles", "student", "teacher",
           "fake", "backbone"]  # fmt: skip


def versions() -> dict[str, str]:
    """Of what the forms run on."""
    found = {}
    for name in ("torch", "diffusers", "nvidia-modelopt"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main(argv: list[str]) -> int:
    """Prints the table; writes the raw times with --json."""
    own = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__, allow_abbrev=False)
    own.add_argument("--iterations", type=int, default=20, help="timed ones, after two cycles of warm-up")
    own.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of this process, where others share the cores"
    )
    own.add_argument("--only", nargs="+", default=[], help="forms")
    own.add_argument("--json", type=Path, help="file for the raw times; default: none")
    mine, rest = own.parse_known_args(argv)
    try:
        cfg = parse(rest, __doc__ or "").config
        if cfg.train.threads > 0:
            torch.set_num_threads(cfg.train.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parts, data = build(cfg, device)
        found = measure(cfg, parts, data, mine.only, mine.iterations, mine.clock)
    except UserError as error:
        print(f"bench.step: {error}", file=sys.stderr)
        return 2
    rows = summary(found, cfg.train.gen_every, cfg.data.batch)
    title = f"{cfg.preset}, batch {cfg.data.batch}, {mine.iterations} iterations each"
    print_table(title, COLUMNS, [cells(row) for row in rows])
    if mine.json:
        where = environment() | dict(command=" ".join(["python -m bench.step", *argv]), versions=versions())
        head = dict(environment=where, preset=cfg.preset, batch=cfg.data.batch, gen_every=cfg.train.gen_every)
        mine.json.parent.mkdir(parents=True, exist_ok=True)
        mine.json.write_text(json.dumps(head | dict(clock=mine.clock, rows=rows, **found), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
