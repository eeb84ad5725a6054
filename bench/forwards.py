"""Forward-equivalents of an iteration, ours and the published order: `python -m bench.forwards [--json FILE]`.

Every kind of iteration (generator's or critic's, each rollout length, forward noising, silent or not) runs once on
small networks of the family's own classes, with hooks that count what goes through each network and what comes back, in
pictures per picture trained on; kinds are weighted by their probability. A forward counts 1; a backward 2 where weights
get a gradient, 1 where it only passes through. TFLOP of a forward at true size: torch's FLOP counter on meta tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import environment
from bench.released import ReleasedLoop, Switches
from senseflow import train
from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.draws import Draws
from senseflow.models import public
from senseflow.models.adapter import Condition
from senseflow.presets import PRESETS
from senseflow.steps import Parts, encoded
from senseflow.updates import Updates

NETWORKS = ("student", "teacher", "fake", "decoder", "backbone", "text", "encoder")
PUBLISHED = Switches(encode_online=True)
# What the published loop spends by bench/released.py's switches: off, one at a time; and what modelopt's adds.
SAVINGS = (("own_features_of_r", False), ("look_always", False), ("encode_online", False), ("own_sample_for_d", True))
SMALL = [
    "--data.batch=2", "--train.gen_every=2", "--train.iterations=128", "--disc.taps=2", "--disc.size=28",
    "--disc.width=8", "--disc.backbone=", "--disc.downsample=1", "--train.precision=fp32", "--model.dtype=fp32",
]  # fmt: skip
LARGE = ["--model.side=64", "--model.text_length=16"]
# tokens and width of a prompt, width of its vector, at the presets' text lengths
PROMPTS = {
    "sd35-medium": (333, 4096, 2048), "sd35-large": (333, 4096, 2048), "flux-dev": (512, 4096, 768),
    "sdxl": (77, 2048, 1280), "flux2-klein": (512, 7680, 7680),
}  # fmt: skip


class Told(Draws):
    """Draws whose host decisions are told: a rollout of `length` steps, or forward noising at one anchor of all."""

    length: int | None = None
    anchor = 0.0

    def coin(self, iteration: int, probability: float) -> bool:
        return self.length is not None

    def integer(self, iteration: int, n: int) -> int:
        assert self.length is not None
        return self.length

    def uniform(self, iteration: int, samples: Tensor, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        found = super().uniform(iteration, samples, stream, shape)
        return torch.full_like(found, self.anchor) if stream == "anchor" else found


def kinds(steps: int, gen_every: int, batch: int, backward: float) -> Iterator[tuple[float, bool, int | None, float]]:
    """(probability, generator's, rollout length or None, where forward noising starts in [0, 1)) of each kind: by
    forward noising all of `batch` start at the pure-noise anchor with probability steps ** -batch."""
    for share, is_gen in ((1 / gen_every, True), (1 - 1 / gen_every, False)):
        for j in range(steps):
            yield share * backward / steps, is_gen, j, 0.0
        silent = steps**-batch
        yield share * (1 - backward) * silent, is_gen, None, 0.0
        yield share * (1 - backward) * (1 - silent), is_gen, None, 0.99


@contextmanager
def counting(parts: Parts) -> Iterator[Counter]:
    """Inside: pictures through each network, forward-equivalents of their backwards included."""
    counts: Counter = Counter()
    adapter, vfm = parts.adapter, parts.vfm
    vae: Any = getattr(adapter.vae, "inner", adapter.vae)
    watched: list[tuple[str, Any]] = [("student", parts.student), ("teacher", parts.teacher), ("fake", parts.fake)]
    if vae is not None:
        watched += [("decoder", vae.decoder), ("encoder", vae.encoder)]
    if vfm is not None:
        watched.append(("backbone", vfm.patchify))

    def came_back(name: str, pictures: int, _: Tensor) -> None:
        counts[name] += pictures

    def hook(name: str, net: nn.Module) -> Callable[..., None]:
        def seen(_m: Any, _i: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            counts[name] += len(out)
            if out.requires_grad:
                weight = 2 if any(p.requires_grad for p in net.parameters()) else 1
                out.register_hook(partial(came_back, name, weight * len(out)))

        return seen

    encode: Any = adapter.encode_prompts

    def counted(prompts: Any) -> Condition:
        counts["text"] += len(prompts)
        return encode(prompts)

    with ExitStack() as stack:
        for name, net in watched:
            stack.callback(net.register_forward_hook(hook(name, net)).remove)
        adapter.encode_prompts = counted  # type: ignore[method-assign]
        stack.callback(lambda: delattr(adapter, "encode_prompts"))
        yield counts


def mean_counts(cfg: Any, parts: Parts, data: Any, run: Callable[[Any, int], Any], law: Any) -> dict[str, float]:
    """Forward-equivalents per picture trained on of each network, over all kinds of iteration. law: a preset's config,
    for its probabilities; cfg: of the small networks, whose every second iteration is a generator's."""
    told = parts.draws
    assert isinstance(told, Told)
    total: Counter = Counter()
    batch = encoded(parts, data.batch(0, cfg.data.batch), 0)
    p = law.rollout.backward_prob
    for share, is_gen, told.length, told.anchor in kinds(law.model.steps, law.train.gen_every, law.data.batch, p):
        with counting(parts) as counts:
            run(batch, 1 if is_gen else 0)
        for name, pictures in counts.items():
            total[name] += share * pictures / cfg.data.batch
    return {name: total[name] for name in NETWORKS}


def true_forwards(preset: str) -> dict[str, float]:
    """TFLOP of one picture's forward through each network at the preset's size; of text, 2 x parameters x tokens."""
    if preset == "tiny":
        return _embedded_forwards()
    checkpoint, config = public.CHECKPOINTS[preset], PRESETS[preset]()
    net, vae = public.build(checkpoint.network), public.build(checkpoint.vae)
    tokens, width, pooled = PROMPTS[preset]
    cls = _adapter_class(config.model.family)
    adapter: Any = object.__new__(cls)
    adapter.dtype, adapter.schedule, adapter.vae = torch.float32, _schedule(config), vae
    side = config.model.side // (16 if config.model.family == "flux2" else 8)
    channels = {"sdxl": 4, "flux2": 128}.get(config.model.family, 16)
    with torch.device("meta"), torch.no_grad():
        x, sigma = torch.zeros(1, channels, side, side), torch.full((1,), 0.5)
        cond = Condition(torch.zeros(1, tokens, width), torch.zeros(1, pooled))
        found = {"student": _tflop(lambda: adapter.predict(net, x, sigma, cond, torch.ones(1)))}
        latent = torch.zeros(1, vae.config.latent_channels, config.model.side // 8, config.model.side // 8)
        found["decoder"] = _tflop(lambda: vae.decode(latent))
        picture = torch.zeros(1, 3, config.model.side, config.model.side)
        found["encoder"] = _tflop(lambda: vae.encode(picture))
        found["backbone"] = _tflop(lambda: _vit_large().features(picture, config.disc.taps, config.disc.size))
    lengths = {"T5EncoderModel": max(tokens - 77, 0) if config.model.family == "sd35" else tokens}
    found["text"] = 0.0
    for name, text in checkpoint.texts:
        encoder: Any = public.build((name, text))
        table = encoder.get_input_embeddings().weight.numel()
        count = sum(p.numel() for p in encoder.parameters()) - table
        length = lengths.get(name, tokens if name.startswith("Qwen") else 77)
        found["text"] += 2e-12 * count * length
    return _same_networks(found)


def _same_networks(found: dict[str, float]) -> dict[str, float]:
    return found | dict(teacher=found["student"], fake=found["student"])


def _tflop(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def _vit_large() -> Any:
    from senseflow.models.vfm import DinoV2

    return DinoV2(1024, 24, 4096, 37)


def _schedule(config: Any) -> Any:
    from senseflow.flow import DiffusionSchedule, FlowSchedule

    return DiffusionSchedule() if config.model.family == "sdxl" else FlowSchedule(config.model.shift)


def _adapter_class(family: str) -> Any:
    from senseflow.models.flux import FluxAdapter
    from senseflow.models.flux2 import Flux2Adapter
    from senseflow.models.sd3 import SD3Adapter
    from senseflow.models.sdxl import SDXLAdapter

    return dict(sd35=SD3Adapter, flux=FluxAdapter, flux2=Flux2Adapter, sdxl=SDXLAdapter)[family]


def _embedded_forwards() -> dict[str, float]:
    from senseflow.models.embedded import EmbeddedAdapter
    from senseflow.models.vfm import DinoV2

    config = PRESETS["tiny"]()
    adapter = EmbeddedAdapter()
    net = adapter.load_network().to("meta")
    with torch.no_grad(), torch.device("meta"):
        picture, cond = torch.zeros(1, 3, 32, 32), Condition(torch.zeros(1, 16, 384), torch.zeros(1, 384))
        found = {"student": _tflop(lambda: adapter.predict(net, picture, torch.ones(1), cond))}
        vit = DinoV2(384, 12, 1536, 37)
        found["backbone"] = _tflop(lambda: vit.features(picture, config.disc.taps, config.disc.size))
    return _same_networks(found | dict(decoder=0.0, encoder=0.0, text=0.0))


@contextmanager
def small_run(preset: str, root: Path) -> Iterator[tuple[Any, Parts, Any]]:
    """(config, parts, data) of the tests' small pipeline of the preset's classes, on a few pictures."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    try:
        import tiny_pipelines as tiny  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    write = {"tiny": tiny.embedded_teacher, "sd35-large": tiny.write_sd3, "flux-dev": tiny.write_flux,
             "sdxl": tiny.write_sdxl, "flux2-klein": tiny.write_klein,
             "sd35-medium": lambda f: tiny.write_sd3(f, medium=True)}  # fmt: skip
    flags = [
        preset,
        "--teacher",
        str(write[preset](root / preset)),
        "--data.images",
        "pictures",
        *SMALL,
        *(LARGE if preset != "tiny" else []),
    ]
    with patch.object(train, "load_variants", tiny.few_pictures):
        cfg = parse(flags, "").config
        parts, data = train.build(cfg, torch.device("cpu"))
        parts.draws = Told(cfg.seed)
        parts.adapter.uncond(1)  # the empty prompt is encoded once a run
        yield cfg, parts, data


def family(preset: str, root: Path) -> dict[str, Any]:
    """Counts of one preset: ours, ours with each saving off (r's features are kept for the embedded data, and for the
    others where a cache holds them), the published order, and it with each waste turned off."""
    tflop, law = true_forwards(preset), PRESETS[preset]()
    found: dict[str, dict[str, float]] = {}
    with small_run(preset, root) as (cfg, parts, data):
        embedded = preset == "tiny"
        ours = {
            "ours": (True, embedded),
            "ours, disc.skip_silent false": (False, embedded),
            "ours, disc.keep_reference false" if embedded else "ours, prepare --features": (True, not embedded),
        }
        for name, (skip, keep) in ours.items():
            mine = replace(cfg, disc=replace(cfg.disc, skip_silent=skip, keep_reference=keep))
            run = partial(train.iterate, mine, parts, Updates(mine, parts))
            found[name] = mean_counts(cfg, parts, data, run, law)
        forms: dict[str, Switches] = {}
        if parts.adapter.parameterization == "flow":
            forms = {
                f"published, {field} {str(on).lower()}": replace(PUBLISHED, **{field: on}) for field, on in SAVINGS
            }
            forms = {"published": PUBLISHED} | forms
        for name, switches in forms.items():
            found[name] = mean_counts(cfg, parts, data, ReleasedLoop(cfg, parts, switches).iterate, law)
    return dict(tflop=tflop, forwards=found)


def table_of(row: dict[str, Any]) -> str:
    """A preset's counts as a markdown table."""
    tflop, found = row["tflop"], row["forwards"]
    used = [n for n in NETWORKS if tflop[n] and any(c[n] for c in found.values())]
    lines = ["| | " + " | ".join(used) + " | TFLOP |", "|---|" + "---|" * (len(used) + 1)]
    lines.append("| TFLOP of one forward | " + " | ".join(f"{tflop[n]:.3g}" for n in used) + " | |")
    for name, counts in found.items():
        total = sum(counts[n] * tflop[n] for n in NETWORKS)
        lines.append(f"| {name} | " + " | ".join(f"{counts[n]:.2f}" for n in used) + f" | {total:.3g} |")
    return "\n".join(lines) + "\n"


def tables(record: dict[str, Any]) -> Iterator[str]:
    """The record in words: markdown, one table per preset."""
    for preset, row in record["presets"].items():
        yield f"{preset}: forward-equivalents per picture and iteration\n"
        yield table_of(row)


def main(argv: list[str]) -> int:
    """Counts, prints, and writes the raw counts with --json; --render FILE prints what a file holds."""
    own = argparse.ArgumentParser(prog="python -m bench.forwards", description=__doc__, allow_abbrev=False)
    own.add_argument("--presets", nargs="+", default=["tiny", *public.CHECKPOINTS], help="presets, default all")
    own.add_argument("--json", type=Path, help="file for the raw counts")
    own.add_argument("--render", type=Path, help="print the tables of a file, and count nothing")
    mine = own.parse_args(argv)
    if mine.render:
        print("\n".join(tables(json.loads(mine.render.read_text()))), end="")
        return 0
    try:
        if unknown := [p for p in mine.presets if p not in ("tiny", *public.CHECKPOINTS)]:
            raise UserError(f"--presets {unknown[0]!r}: allowed are tiny, {', '.join(public.CHECKPOINTS)}")
        with tempfile.TemporaryDirectory() as root:
            where = environment() | dict(command=f"python -m bench.forwards --presets {' '.join(mine.presets)}")
            record = dict(environment=where, presets={p: family(p, Path(root)) for p in mine.presets})
    except UserError as error:
        print(f"bench.forwards: {error}", file=sys.stderr)
        return 2
    print("\n".join(tables(record)), end="")
    if mine.json:
        mine.json.parent.mkdir(parents=True, exist_ok=True)
        mine.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
