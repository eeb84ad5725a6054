"""Whole iterations side by side: `python -m bench.step [PRESET] [--iterations N] [--json FILE] [--any.field VALUE]`.

Every form trains its own copy of the same weights on the same batches and draws, in turns within one process, so a
form's time stands beside another's for the very same rollout length. Losses are compared before anything is timed.
Forms: ours (senseflow.train.iterate), and without one of its savings; released (bench.released, the published order),
and with one of its wastes off at a time; all of them decode in fp32 as published, whatever --model.decode says, but for
`ours, model.decode bf16`; `released, compiled` (tuned-eager: the same with fused AdamW, compiled as by
`--compile blocks`), and tuned, which has every waste off besides; `ours, compile` is compiled too, `ours, graphs` (with
a GPU) is replayed: its networks are called at captures alone, so their pictures are not counted. With `--disc.kind
none` and what bench.modelopt.FLAGS or bench.fastgen.FLAGS has: ours beside nvidia-modelopt's DMD2 or FastGen's, where
that is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from importlib import metadata
from importlib.util import find_spec
from math import nan
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch._dynamo import utils as dynamo

from bench.fastgen import LAST_T, FastGenLoop
from bench.fastgen import commit as fastgen_commit
from bench.harness import environment
from bench.modelopt import ModeloptLoop
from bench.real import made_not_read, sizes_of
from bench.released import ReleasedLoop, Switches
from senseflow.cli import parse
from senseflow.compiling import compile_parts
from senseflow.config import UserError
from senseflow.graphs import Replayed
from senseflow.logs import print_table
from senseflow.models.families import FUSED, fuse_networks
from senseflow.models.vae import decode_in
from senseflow.steps import Parts, encoded
from senseflow.train import build, iterate
from senseflow.updates import Updates
from senseflow_kernels import unfuse_mmdit

Iterate = Callable[[Any, int], dict[str, Any]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEAN = Switches(
    own_features_of_r=False, look_always=False, per_parameter=False, read_back=False, fused_adamw=True,
    fused_blocks=True, kept_reference=True,
)  # fmt: skip

SAVINGS = ("skip_silent", "keep_reference")  # of ours, by fields of disc


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


def own_copy(parts: Parts, cfg: Any = None, frozen: tuple[Any, Any, Any] | None = None) -> tuple[Parts, Counter]:
    """parts with student, fake and D of its own, and what counts its calls. The frozen networks (teacher, backbone,
    adapter) are shared, or those given. cfg: fuses and compiles by its kernels.fuse and kernels.compile."""
    mine = replace(
        parts, student=copy.deepcopy(parts.student), fake=copy.deepcopy(parts.fake), disc=copy.deepcopy(parts.disc)
    )
    if frozen is not None:
        mine.teacher, mine.vfm, mine.adapter = frozen
    if cfg is not None:
        set_up(mine, cfg)
    counted: Any = Counted(mine)
    mine.adapter = counted
    if mine.vfm is not None:
        mine.vfm = CountedBackbone(mine.vfm, counted.counts)
    return mine, counted.counts


def set_up(parts: Parts, cfg: Any) -> None:
    """The networks' blocks fused or not, then compiled or not, as the config's kernels say."""
    device = next(parts.student.parameters()).device
    nets = (parts.student, parts.fake, parts.teacher)
    if not fuse_networks(cfg.kernels, cfg.model.family, device, *nets) and cfg.model.family in FUSED:
        for net in nets:
            unfuse_mmdit(net)  # type: ignore[arg-type]
    compile_parts(parts, cfg)


def copies(cfg: Any, parts: Parts) -> Callable[[Any], tuple[Parts, Counter]]:
    """own_copy by config; forms of the same kernels.fuse and kernels.compile share their frozen networks."""
    kinds: dict[tuple[str, str], tuple[Any, Any, Any]] = {
        (cfg.kernels.fuse, cfg.kernels.compile): (parts.teacher, parts.vfm, parts.adapter)
    }

    def made(own: Any) -> tuple[Parts, Counter]:
        kind = (own.kernels.fuse, own.kernels.compile)
        if kind not in kinds:
            adapter = copy.copy(parts.adapter)
            adapter.vae = copy.deepcopy(parts.adapter.vae)
            kinds[kind] = copy.deepcopy(parts.teacher), copy.deepcopy(parts.vfm), adapter
        return own_copy(parts, own, kinds[kind])

    return made


def recipes_of(cfg: Any) -> dict[str, Switches | None]:
    """Form -> switches of the published order; None: another loop, by name."""
    recipes: dict[str, Switches | None] = {"ours": None, "ours, compile": None, "ours, kernels.fuse false": None}
    if torch.cuda.is_available():
        recipes |= {"ours, graphs": None, "ours, compile, graphs": None}
    if cfg.disc.kind == "none":  # DMD2 without a GAN
        return recipes | {"modelopt": None, "fastgen": None}
    recipes |= {f"ours, disc.{field} false": None for field in SAVINGS} | {"released": Switches()}
    if cfg.model.family != "embedded":
        recipes["ours, model.decode bf16"] = None
    for f in fields(Switches):
        value = not getattr(Switches(), f.name)
        recipes[f"released, {f.name} {str(value).lower()}"] = replace(Switches(), **{f.name: value})
    return recipes | {"released, compiled": Switches(fused_adamw=True), "tuned": LEAN}


def forms(cfg: Any, parts: Parts, only: list[str]) -> dict[str, tuple[Iterate, Counter]]:
    """Name -> (one iteration, its counts). Raises UserError for a name that is none."""
    recipes, mine_of = recipes_of(cfg), copies(cfg, parts)
    if unknown := [name for name in only if name not in recipes]:
        raise UserError(f"--only {unknown[0]!r}: allowed is {', '.join(recipes)}")
    peers = {"modelopt": cfg.rollout.backward_prob == 1, "fastgen": cfg.rollout.backward_prob == 0}
    made: dict[str, tuple[Iterate, Counter]] = {}
    for name in only or [n for n in recipes if n not in peers or (peers[n] and find_spec(n))]:
        switches = recipes[name]
        how = "blocks" if name == "tuned" or "compile" in name else cfg.kernels.compile
        plain = name in peers or name.endswith("fuse false") or (switches is not None and not switches.fused_blocks)
        own = replace(cfg, kernels=replace(cfg.kernels, compile=how, fuse="false" if plain else cfg.kernels.fuse))
        for field in SAVINGS:
            if name == f"ours, disc.{field} false":
                own = replace(own, disc=replace(own.disc, **{field: False}))
        mine, counts = mine_of(own)
        if name.endswith("decode bf16"):
            adapter: Any = copy.copy(mine.adapter.adapter)  # type: ignore[attr-defined]
            adapter.vae = copy.deepcopy(adapter.vae)
            decode_in(adapter.vae, torch.bfloat16)
            mine.adapter.adapter = adapter  # type: ignore[attr-defined]
        if switches is not None:
            made[name] = ReleasedLoop(own, mine, switches).iterate, counts
        elif name == "modelopt":
            made[name] = ModeloptLoop(own, mine, told=warm_up(own)).iterate, counts
        elif name == "fastgen":
            made[name] = FastGenLoop(own, mine, told=warm_up(own)).iterate, counts
        elif "graphs" in name:
            made[name] = Replayed(own, mine, Updates(own, mine), iterate), counts
        else:
            updates = Updates(own, mine)
            made[name] = (lambda b, i, c=own, p=mine, u=updates: iterate(c, p, u, b, i)), counts
    return made


def warm_up(cfg: Any) -> int:
    """Iterations before the timed ones: two cycles; with a GPU enough that every kind has been captured."""
    return (12 if torch.cuda.is_available() else 2) * cfg.train.gen_every


def check(rows: dict[str, list[dict[str, float]]], reference: str, every: int) -> None:
    """Raises AssertionError where a form's losses are not those of `reference`: to 1e-4 while weights are the same, to
    1 % on later iterations (Adam's first steps are signs, which rounding can turn). The peers' fakes learn on a
    picture made anew after the student's update, ours on the one before it: 5 % from the first of these on, and so
    where pictures are decoded in bf16."""
    for name, losses in rows.items():
        for i, (mine, theirs) in enumerate(zip(losses, rows[reference], strict=True)):
            loose = (name in ("modelopt", "fastgen") and i + 1 >= every) or name.endswith("decode bf16")
            for key in mine.keys() & theirs.keys() & {"dmd", "isg", "adv", "fake", "disc"}:
                bound = (5e-2 if loose else 1e-4 if i == 0 else 1e-2) * max(abs(theirs[key]), 1e-2)
                assert abs(mine[key] - theirs[key]) <= bound, f"{name}, iteration {i}: {key} {mine[key]} {theirs[key]}"


def measure(cfg: Any, parts: Parts, data: Any, only: list[str], iterations: int, clock: str) -> dict[str, Any]:
    """Seconds per form and iteration, of the warm-up (compiling) together, pictures through each network."""
    if "fastgen" in only:
        parts.anchors = [min(a, LAST_T) for a in parts.anchors]
    parts.adapter.uncond(1)  # encoded once, for every copy of the adapter
    made, now = forms(cfg, parts, only), CLOCKS[clock]
    warm = warm_up(cfg)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    warming = dict.fromkeys(made, 0.0)
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
                warming[name] += now() - start
                losses[name].append({k: float(v) for k, v in found.items()})
    assert dynamo.counters["stats"]["unique_graphs"] == graphs, "something was compiled while it was timed"
    pictures = {name: dict(counts) for name, (_, counts) in made.items()}
    return dict(seconds=seconds, pictures=pictures, warm=warm, seconds_of_warm_up=warming)


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
    return found | ({"fastgen": fastgen_commit()} if find_spec("fastgen") else {})


def main(argv: list[str]) -> int:
    """Prints the table; writes the raw times with --json."""
    own = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__, allow_abbrev=False)
    own.add_argument("--iterations", type=int, default=20, help="timed ones, after two cycles of warm-up")
    own.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of this process, where others share the cores"
    )
    own.add_argument("--only", nargs="+", default=[], help="forms")
    own.add_argument("--random", action="store_true", help="the preset's public sizes, random weights: see bench.real")
    own.add_argument("--network", default="{}", help='with --random, JSON: changes of its config: {"num_layers": 4}')
    own.add_argument("--vae", default="{}", help="with --random, JSON: changes of the VAE's")
    own.add_argument("--backbone", type=int, nargs=2, default=(1024, 24), metavar=("WIDTH", "DEPTH"))
    own.add_argument("--json", type=Path, help="file for the raw times; default: none")
    mine, rest = own.parse_known_args(argv)
    try:
        cfg = parse([*rest, *(["--teacher", "random"] if mine.random else [])], __doc__ or "").config
        cfg = replace(cfg, model=replace(cfg.model, decode="fp32"))  # as published; in bf16 is a row of its own
        if cfg.train.threads > 0:
            torch.set_num_threads(cfg.train.threads)
        device, source = torch.device("cuda" if torch.cuda.is_available() else "cpu"), nullcontext()
        if mine.random:
            source = made_not_read(cfg, sizes_of(cfg.preset, mine.network, mine.vae, mine.backbone), device)
        with source:
            parts, data = build(cfg, device)
            found = measure(cfg, parts, data, mine.only, mine.iterations, mine.clock)
    except UserError as error:
        print(f"bench.step: {error}", file=sys.stderr)
        return 2
    rows = summary(found, cfg.train.gen_every, cfg.data.batch)
    title = f"{cfg.preset}, batch {cfg.data.batch}, {mine.iterations} iterations each"
    print_table(title, COLUMNS, [cells(row) for row in rows])
    if mine.json:
        where = environment() | dict(command=f"python -m bench.step {shlex.join(argv)}", versions=versions())
        head = dict(environment=where, preset=cfg.preset, batch=cfg.data.batch, gen_every=cfg.train.gen_every)
        mine.json.parent.mkdir(parents=True, exist_ok=True)
        mine.json.write_text(json.dumps(head | dict(clock=mine.clock, rows=rows, **found), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
