"""Builds a cache of latents, prompt embeddings and pixels.

    python -m senseflow.prepare [PRESET] --data PATH --out CACHE

Stop it at any time and run it again: it goes on. `python -m senseflow.train [PRESET] --data CACHE` trains from it.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from senseflow import __version__
from senseflow.cli import convert, extra_named, parse
from senseflow.config import Config, UserError
from senseflow.data import shards
from senseflow.data.cache import is_cache, setting_fields
from senseflow.data.samples import Skipped
from senseflow.data.stream import Items, choose
from senseflow.encoding import LATENT_DTYPES, Maker, Options, space
from senseflow.models.identity import identity
from senseflow.section import describe

HELP = {
    "out": "the cache's folder",
    "latents": "posterior (mean and logvar: sampled anew each time it is seen) | mean",
    "latents_dtype": "fp32 | fp16 | bf16 | auto: fp16 where model.dtype is bf16, else fp32",
    "pixels": "short side of the uint8 pixels kept for the discriminator; -1: as they are; 0: none",
    "shard": "samples (and prompts) a file",
    "batch": "pictures encoded at once",
    "processes": "0: one a GPU, or one",
    "features": "keep the backbone's features of each picture too (their size is said first)",
    "teacher_samples": "prompts alone: this many steps of the teacher make the pictures; 0: none",
    "verify": "reread every file of a finished cache, then stop",
}


def arguments(argv: list[str]) -> tuple[Options, Config]:
    """prepare's own flags, and the others as train has them. Raises UserError."""
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Options)}
    rest, found = [], {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        field = name.replace("-", "_")
        if not word.startswith("--") or field not in kinds:
            rest.append(word)
            continue
        if kinds[field] is bool:
            found[field] = True
            continue
        if not given:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value: {describe(kinds[field])}")
            value = words.pop(0)
        found[field] = convert(name, kinds[field], value)
    if any(word in ("-h", "--help") for word in rest):
        takes = {k: "a switch" if kind is bool else f"default {getattr(Options, k)!r}" for k, kind in kinds.items()}
        lines = [f"  --{k.replace('_', '-'):<20} {text} [{takes[k]}]" for k, text in HELP.items()]
        print((__doc__ or "").strip() + "\n\n" + "\n".join(lines))
        print("\nBesides, every setting of a run: see python -m senseflow.train --help")
        sys.exit(0)
    options, cfg = Options(**found), parse(rest, "").config
    if not options.out:
        raise UserError("--out is missing: name the cache's folder")
    for field, allowed in (("latents", ("posterior", "mean")), ("latents_dtype", ("auto", *LATENT_DTYPES))):
        if getattr(options, field) not in allowed:
            raise UserError(
                f"--{field.replace('_', '-')} {getattr(options, field)!r}: allowed is {' | '.join(allowed)}"
            )
    for field, low in (("shard", 1), ("batch", 1), ("processes", 0), ("teacher_samples", 0), ("pixels", -1)):
        if getattr(options, field) < low:
            raise UserError(f"--{field.replace('_', '-')} {getattr(options, field)}: allowed is {low} or more")
    if not cfg.data.path and not options.verify:
        raise UserError("--data is missing: name a folder of pictures or another source")
    if is_cache(cfg.data.path):
        raise UserError(f"--data {cfg.data.path} is a cache already: train with it")
    if cfg.data.crop != "center":
        raise UserError("data.crop = 'random': a cache holds one crop; allowed is center")
    if options.latents_dtype == "auto":
        options = replace(options, latents_dtype="fp16" if cfg.model.dtype == "bf16" else "fp32")
    return options, cfg


class Progress:
    """A line every ten seconds: samples done, a second, time left."""

    def __init__(self, kind: str, total: int, done: int):
        self.kind, self.total, self.first, self.done = kind, total, done, done
        self.began = self.spoke = time.monotonic()

    def add(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.spoke >= 10:
            self.spoke = now
            self.say()

    def say(self) -> None:
        rate = (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - self.done) / rate / 60 if rate else 0
        print(f"{self.kind} {self.done:,}/{self.total:,}  {rate:.1f}/s  {left:.1f} min left", flush=True)


class Plan:
    """Which shards of a kind there are to make: their number, their samples (or prompts), what each is of. That of
    prompts can be made once the image shards are there."""

    def __init__(self, kind: str, options: Options, items: Items):
        self.kind, self.size, self.folder = kind, options.shard, Path(options.out)
        self.samples = len(items.selection.keep)
        self.shards = math.ceil(self.samples / self.size)
        self.captions: list[str] = []
        if kind == "prompts":
            self.captions = list(shards.distinct_captions(self.folder, self.shards))
            self.samples = len(self.captions)
            self.shards = math.ceil(self.samples / self.size)

    def captions_of(self, number: int) -> list[str]:
        """The prompts of a prompt shard."""
        return self.captions[number * self.size : (number + 1) * self.size]

    def finished(self, number: int) -> dict[str, Any] | None:
        """A shard's record, where it is there."""
        captions = self.captions_of(number) if self.kind == "prompts" else None
        return shards.finished(self.folder, self.kind, number, captions)

    def done(self) -> int:
        """Samples, or prompts, of the shards that are there."""
        there = (n for n in range(self.shards) if self.finished(n) is not None)
        return sum(min(self.size, self.samples - n * self.size) for n in there)


def make_shards(plan: Plan, maker: Maker, mine: range, count: Any) -> None:
    """Makes those shards of `mine` that are not there. Raises UserError when a file cannot be written, or too many
    samples are unusable."""
    items = maker.items
    skipped, tried = Skipped(items.source.path, len(items.selection.keep)), 0
    for number in mine:
        record = plan.finished(number)
        if record is None:
            if plan.kind == "images":
                tensors, record = maker.images_of(number, count)
            else:
                tensors, record = maker.prompts_of(plan.captions_of(number), count)
                record["captions"] = shards.digest_of(plan.captions_of(number))
            with shards.writing(plan.folder):
                shards.write_shard(plan.folder, plan.kind, number, tensors, record)
        if plan.kind == "images":
            tried += len(maker.shard(number))
            skipped.add(shards.skips_of(record), tried)


def _process(kind: str, options: Options, cfg: Config, rank: int, processes: int, done: Any, faults: Any) -> None:
    """One of several processes: every `processes`-th shard. Ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it
    parent = os.getppid()
    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))

    def count(n: int) -> None:
        with done.get_lock():
            done.value += n
        if os.getppid() != parent:
            os._exit(1)

    try:
        device = (
            torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
        )
        with closing(Maker(cfg, options, choose(cfg, quiet=True), device)) as maker:
            plan = Plan(kind, options, maker.items)
            make_shards(plan, maker, range(rank, plan.shards, processes), count)
    except UserError as error:
        faults.put(str(error))


def in_processes(kind: str, options: Options, cfg: Config, processes: int, progress: Progress) -> None:
    """make_shards in several processes. Raises UserError when one of them does, or dies; the others are ended."""
    context = torch.multiprocessing.get_context("spawn")
    done, faults = context.Value("q", 0), context.SimpleQueue()
    running = [
        context.Process(target=_process, args=(kind, options, cfg, rank, processes, done, faults), daemon=True)
        for rank in range(processes)
    ]
    try:
        for process in running:
            process.start()
        while any(p.is_alive() for p in running):
            time.sleep(0.2)
            progress.add(done.value - (progress.done - progress.first))
            if any(p.exitcode for p in running) or not faults.empty():
                break
        if not faults.empty():
            raise UserError(faults.get())
        for rank, process in enumerate(running):
            if process.exitcode:
                raise UserError(
                    f"process {rank} ended with code {process.exitcode}; what is finished stays, run it again"
                )
    finally:
        for process in running:
            if process.is_alive():
                process.terminate()
            process.join()


def settings_of(options: Options, cfg: Config, items: Items, maker: Maker) -> dict[str, Any]:
    """Everything that decides a cache's bytes, as recorded and compared."""
    d, e = cfg.disc, cfg.eval
    out = setting_fields(cfg) | {f"weights.{k}": v for k, v in identity(maker.adapter).items()}
    decoder = "" if maker.decoder is None else maker.decoder.name  # auto's is another where there is a GPU
    out |= {k: getattr(options, k) for k in ("latents", "latents_dtype", "pixels", "shard", "batch")}
    features = {"disc.backbone": d.backbone, "disc.taps": list(d.taps), "disc.size": d.size}
    teacher = {"steps": options.teacher_samples, "guidance": e.teacher_guidance, "shift": e.teacher_shift}
    teacher |= {"decode": cfg.model.decode}
    kind = "source" if items.source.has_images else "teacher" if options.teacher_samples else "none"
    return out | {
        "images": kind, "source": items.fingerprint, "decoder": decoder,
        "features": features if options.features else {}, "teacher_samples": teacher if options.teacher_samples else {},
    }  # fmt: skip


def check_space(plan: Plan, maker: Maker, missing: int) -> None:
    """Says how much what is still to be made takes; raises UserError where the disk has less."""
    if not missing:
        return
    free, prompt = shutil.disk_usage(plan.folder).free, maker.prompt_bytes()
    if plan.kind == "images":
        parts = space(maker)
        needed = sum(parts.values()) * missing
        each = "".join(f"{name} {size / 1e6:.3g} MB, " for name, size in parts.items())
        print(
            f"a sample: {each}its prompt {prompt / 1e6:.3g} MB; {missing:,} to make: {needed / 1e9:.3g} GB, and "
            f"{prompt * missing / 1e9:.3g} GB if each has a prompt of its own; {free / 1e9:.3g} GB are free",
            flush=True,
        )
    else:
        needed = prompt * missing
    if needed > free:
        raise UserError(
            f"cache {plan.folder}: {needed / 1e9:.1f} GB are needed for {missing:,} {plan.kind} and "
            f"{free / 1e9:.1f} GB are free"
        )


def prepare(options: Options, cfg: Config) -> None:
    """Makes what is missing of a cache. Raises UserError."""
    folder, items = Path(options.out), choose(cfg)
    if options.teacher_samples and items.source.has_images:
        raise UserError(
            f"--teacher-samples: data.path = {cfg.data.path!r} has images of its own; allowed are prompts alone"
        )
    cuda = torch.cuda.is_available()
    processes = options.processes or max(torch.cuda.device_count(), 1)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    with shards.locked(folder), closing(Maker(cfg, options, items, device)) as maker:
        with shards.writing(folder):
            shards.begin(folder, settings_of(options, cfg, items, maker))
        plans = {}
        for kind in ("images", "prompts"):
            plan = plans[kind] = Plan(kind, options, items)
            done = plan.done()
            check_space(plan, maker, plan.samples - done)
            progress = Progress(kind, plan.samples, done)
            if processes == 1 or done == plan.samples:
                make_shards(plan, maker, range(plan.shards), progress.add)
            else:
                maker.adapter.free_text()  # the processes have their own
                in_processes(kind, options, cfg, processes, progress)
            progress.done = plan.samples
            progress.say()
        first = shards.finished(folder, "prompts", 0)
        assert first is not None
        extra = dict(
            prompts_per_shard=options.shard, text_dtype=first["text_dtype"],
            fingerprint=items.fingerprint, selected=len(items.selection.keep),
            made_with={"torch": torch.__version__, "senseflow": __version__},
        )  # fmt: skip
        dropped = items.source.dropped
        with shards.writing(folder):
            total = len(items.selection.keep) + sum(s.samples for s in dropped)
            skipped = Skipped(str(folder), total, dropped)
            kept = shards.finish(folder, plans["images"].shards, plans["prompts"].shards, items.sizes, skipped, extra)
    print(f"{kept:,} samples, {plans['prompts'].samples:,} prompts in {folder}; train with --data {folder}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 done, 1 a bad file found by --verify, 2 bad input, 130 interrupted (run it again, it goes on)."""
    try:
        options, cfg = arguments(sys.argv[1:] if argv is None else argv)
        if cfg.train.threads > 0:
            torch.set_num_threads(cfg.train.threads)
        if options.verify:
            counts = shards.verify(Path(options.out))
            print(f"{counts['good']} files as they were written, {counts['bad']} not", flush=True)
            return 1 if counts["bad"] else 0
        with extra_named():
            prepare(options, cfg)
    except UserError as error:
        print(f"senseflow.prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again, it goes on", flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
