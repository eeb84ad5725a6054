"""Full training at true size on random weights: `python -m bench.real [PRESET] [--iterations N] [--any.field VALUE]`.

The trainer's own `build` and `iterate`. What it would read is made on the device instead: networks of the public
checkpoints' configs (models/public.py), a DINOv2 ViT-L/14, pictures, latents and prompt embeddings. So nothing is
downloaded, and times and memory are those of a training from caches; the losses mean nothing. Prints ms per phase (so
without CUDA graphs, as --profile) and peak GB, and writes bench/results/DEVICE/real/DATE-COMMIT-PRESET.json. Where the
preset does not fit, leaner settings (RUNGS) are tried, and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench import harness
from senseflow import train
from senseflow.cli import parse
from senseflow.compiling import compile_parts
from senseflow.config import Config, UserError
from senseflow.data.batches import Batch
from senseflow.iteration import iterate
from senseflow.logs import print_table
from senseflow.models import flux, flux2, public, sd3, sdxl
from senseflow.models.adapter import Condition
from senseflow.models.vfm import DinoV2
from senseflow.profiling import Profiler
from senseflow.steps import phased
from senseflow.updates import Updates

MODULES = {
    "sd35": (sd3, sd3.SD3Adapter), "flux": (flux, flux.FluxAdapter), "sdxl": (sdxl, sdxl.SDXLAdapter),
    "flux2": (flux2, flux2.Flux2Adapter),
}  # fmt: skip
# The preset as it is, then with fewer activations, then with less beside each weight: docs/precision.md, Memory.
RECOMPUTED = ("--model.checkpointing", "full", "--disc.checkpointing", "true")
LEAN = (*RECOMPUTED, "--train.moments", "8bit", "--optim.in_backward", "true")
RUNGS: tuple[tuple[str, ...], ...] = ((), RECOMPUTED, LEAN, (*LEAN, "--train.precision", "stochastic"))


@dataclass(frozen=True)
class Sizes:
    """What is made: configs of the network and the VAE, (width, depth) of the backbone."""

    network: dict[str, Any]
    vae: dict[str, Any]
    backbone: tuple[int, int] = (1024, 24)


def sizes_of(preset: str, network: str, vae: str, backbone: Sequence[int]) -> Sizes:
    """The public configs, changed by JSON objects. Raises UserError for a preset without, or for no JSON object."""
    name = preset.removesuffix("-dmd2")
    if name not in public.CHECKPOINTS:
        raise UserError(f"preset {preset!r} has no public checkpoint: allowed are {', '.join(public.CHECKPOINTS)}")
    configs = []
    for text, part in ((network, public.CHECKPOINTS[name].network), (vae, public.CHECKPOINTS[name].vae)):
        try:
            configs.append(part[1] | json.loads(text))
        except (ValueError, TypeError):
            raise UserError(f"{text!r} is no JSON object") from None
    return Sizes(*configs, tuple(backbone))  # type: ignore[arg-type]


def random_network(cls: Any, config: dict[str, Any], dtype: torch.dtype, device: str | torch.device) -> Any:
    """A frozen network as its class initialises it, in dtype and on the device from the start."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            net: Any = cls(**config)
    finally:
        torch.set_default_dtype(usual)
    return (net.float() if dtype == torch.float32 else net.bfloat16()).eval().requires_grad_(False)


class RandomData:
    """Batches as a cache gives them: latents, pixels and encoded prompts, all random, on the device."""

    encodes_text = False

    def __init__(self, cfg: Config, adapter: Any, device: torch.device):
        self.side, self.adapter = cfg.model.side, adapter
        self.generator = torch.Generator(device).manual_seed(cfg.seed)

    def example(self) -> Condition:
        return self.adapter.encode_prompts([""])

    def batch(self, iteration: int, size: int) -> Batch:
        g = self.generator
        latents = torch.randn(size, *self.adapter.latent_shape, generator=g, device=g.device)
        pixels = torch.rand(size, 3, self.side, self.side, generator=g, device=g.device) * 2 - 1
        samples = torch.arange(iteration * size, (iteration + 1) * size, device=g.device)
        return Batch(latents, pixels, self.adapter.encode_prompts([""] * size), samples, encoded=True)


@contextmanager
def made_not_read(cfg: Config, sizes: Sizes, device: torch.device) -> Iterator[None]:
    """Inside, `train.build` finds random networks, prompts and data where it would read files."""
    module, adapter_class = MODULES[cfg.model.family]
    configs = {"vae": sizes.vae, "transformer": sizes.network, "unet": sizes.network}

    def load(cls: Any, _: Any, subfolder: str, dtype: torch.dtype, where: Any = "cpu", **__: Any) -> Any:
        return random_network(cls, configs[subfolder], dtype, where)

    def encode(self: Any, prompts: Sequence[str]) -> Condition:
        shape = self.text_shape(SimpleNamespace(config=SimpleNamespace(**sizes.network)))
        if hasattr(self, "_widths"):
            self._widths = shape
        if hasattr(type(self), "clip_width"):  # SD 3.5: CLIP ViT-L/14's part of the vector
            self.__dict__["clip_width"] = min(768, shape[2])
        like = dict(dtype=self.dtype, device=device)
        return Condition(torch.randn(len(prompts), *shape[:2], **like), torch.randn(len(prompts), shape[2], **like))

    def backbone(*_: Any) -> DinoV2:
        with device:
            return DinoV2(sizes.backbone[0], sizes.backbone[1], 4 * sizes.backbone[0], 37)

    with ExitStack() as stack:
        for patched in (
            patch.object(module, "load_component", load), patch.object(adapter_class, "encode_prompts", encode),
            patch.object(train, "find_dinov2", backbone),
            patch.object(train, "open_data", lambda _, adapter, *__: RandomData(cfg, adapter, device)),
        ):  # fmt: skip
            stack.enter_context(patched)
        yield


def counted(net: nn.Module | None) -> float:
    return 0.0 if net is None else sum(p.numel() for p in net.parameters()) / 1e6


def run(cfg: Config, sizes: Sizes, iterations: int, device: torch.device) -> dict[str, Any]:
    """One warm cycle, then `iterations` timed ones. Raises torch.OutOfMemoryError where it does not fit."""
    start = time.monotonic()
    with made_not_read(cfg, sizes, device):
        parts, data = train.build(cfg, device)
        updates = Updates(cfg, parts)
        compile_parts(parts, cfg)
        profiler = Profiler(False, Path(), 2 * iterations, iterations)  # its first half is timed, nothing is traced
        phased(parts, profiler)
        built = time.monotonic() - start
        found: list[dict[str, Tensor]] = []
        for i in range(cfg.train.gen_every + iterations):
            profiler.enabled = i >= cfg.train.gen_every
            with profiler.iteration():
                with parts.phase("data"):
                    batch = data.batch(i, cfg.data.batch)
                found.append(iterate(cfg, parts, updates, batch, i))
    names = ("student", "fake", "teacher", "disc", "vfm")
    return dict(
        build_s=built, **timed(profiler, cfg.train.gen_every), memory=memory(profiler),
        millions={name: counted(getattr(parts, name)) for name in names},
        skipped=sum(float(v) for m in found for k, v in m.items() if k.endswith("_skipped")),
        last={k: float(v) for k, v in found[-1].items()},
    )  # fmt: skip


def timed(profiler: Profiler, every: int) -> dict[str, Any]:
    """Of the timed iterations, in ms: both kinds' medians, and every phase's calls, median and sum."""
    steps = [1e3 * span.seconds() for span in profiler.steps]
    kinds = {"critic": [], "generator": []}
    for i, ms in enumerate(steps):
        kinds["generator" if (i + 1) % every == 0 else "critic"].append(ms)
    phases = []
    for name, spans in profiler.spans.items():
        ms = [1e3 * span.seconds() for span in spans]
        phases.append(dict(phase=name, calls=len(ms), median_ms=median(ms), sum_ms=sum(ms),
                           peak_gb=profiler.peak[name] * 2**20 / 1e9))  # fmt: skip
    return dict(
        iterations_ms=steps, phases=sorted(phases, key=lambda p: -p["sum_ms"]),
        **{f"{kind}_ms": median(ms) if ms else None for kind, ms in kinds.items()},
    )  # fmt: skip


def memory(profiler: Profiler) -> dict[str, float]:
    """GB (1e9 bytes): the highest peak of a phase; on a GPU what the allocator holds, and what the device has."""
    found = {"peak_gb": max(profiler.peak.values()) * 2**20 / 1e9}
    if torch.cuda.is_available():
        found |= {"reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
                  "device_gb": torch.cuda.get_device_properties(0).total_memory / 1e9}  # fmt: skip
    return found


def first_that_fits(argv: list[str], sizes: Sizes, iterations: int) -> dict[str, Any]:
    """The record of the first rung whose run ends; `fits` false where none does."""
    device = harness.DEVICE
    tried = []
    for rung in RUNGS:
        cfg = parse([argv[0], "--teacher", "random", "--data.batch", "1", *rung, *argv[1:]], "").config
        try:
            return dict(fits=True, rung=list(rung), tried=tried, settings=argv, **run(cfg, sizes, iterations, device))
        except torch.OutOfMemoryError as error:
            tried.append(dict(rung=list(rung), error=str(error).partition(". Of the")[0]))
        gc.collect()  # after the except block, whose error holds the run's frames
        torch.cuda.empty_cache()
        print(f"does not fit: {' '.join(rung) or 'as the preset is'}", flush=True)
    return dict(fits=False, tried=tried, settings=argv)


def show(preset: str, record: dict[str, Any]) -> None:
    if not record["fits"]:
        print(f"{preset} does not fit on {harness.device_name()}, with none of {len(RUNGS)} settings")
        return
    total = sum(record["iterations_ms"])
    rows = [
        [p["phase"], str(p["calls"]), f"{p['median_ms']:.1f}", f"{p['sum_ms'] / total:.1%}", f"{p['peak_gb']:.2f}"]
        for p in record["phases"]
    ]
    title = f"{preset} {' '.join(record['rung'])} on {harness.device_name()}, {len(record['iterations_ms'])} iterations"
    print_table(title, ["phase", "calls", "ms (median)", "share %", "peak GB"], rows)
    kinds = {kind: record[f"{kind}_ms"] for kind in ("critic", "generator")}
    said = ", ".join(f"{kind} iteration {ms:.1f} ms" for kind, ms in kinds.items() if ms is not None)
    held = ", ".join(f"{name} {gb:.2f}" for name, gb in record["memory"].items())
    print(f"{preset}: {said}; {held}; updates skipped {record['skipped']:.0f}")


def write(preset: str, record: dict[str, Any]) -> Path:
    """harness.RESULTS/DEVICE/real/DATE-COMMIT-PRESET.json."""
    env = harness.environment() | dict(command=" ".join(["python", "-m", "bench.real", *sys.argv[1:]]))
    name = f"{env['time'][:10]}-{env['commit']}{'-dirty' if env['dirty'] else ''}-{preset}.json"
    file = harness.RESULTS / harness.device_slug() / "real" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(preset=preset, environment=env, **record), indent=1) + "\n")
    return file


def main(argv: list[str]) -> int:
    """0 where it ran, or was found not to fit; 2 for bad input."""
    own = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__, allow_abbrev=False)
    own.add_argument("--iterations", type=int, default=10, help="timed ones, after a cycle of warm-up")
    own.add_argument("--network", default="{}", help="JSON: changes of the network's public config")
    own.add_argument("--vae", default="{}", help="JSON: changes of the VAE's")
    own.add_argument("--backbone", type=int, nargs=2, default=(1024, 24), metavar=("WIDTH", "DEPTH"))
    mine, rest = own.parse_known_args(argv)
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else "sd35-medium"
    try:
        if mine.iterations < 1:
            raise UserError(f"--iterations {mine.iterations}: allowed is 1 or more")
        sizes = sizes_of(preset, mine.network, mine.vae, mine.backbone)
        record = first_that_fits([preset, *rest], sizes, mine.iterations)
    except UserError as error:
        print(f"bench.real: {error}", file=sys.stderr)
        return 2
    print(f"results: {write(preset, record)}")
    show(preset, record)  # last, for bench.gpu's table
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
