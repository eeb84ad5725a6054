"""What a run would hold in memory, from its own code on the meta device: no weights, no GPU, in seconds.

The networks are built from their configs, the optimizers from the networks, and one whole generator iteration of
steps.py, forward and backward, is run under a ledger. So whatever changes what a run holds changes the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.algo.isg import ErrorCurve
from senseflow.config import Config, UserError
from senseflow.data.batches import Batch
from senseflow.draws import Draws
from senseflow.fields import replace
from senseflow.memory import CUDA_ROUNDING, GB, Ledger, Row, device_bytes, nbytes
from senseflow.meta import StandsFor, Uninitialised
from senseflow.models.adapter import Condition
from senseflow.models.embedded import EmbeddedAdapter
from senseflow.models.families import DTYPES, make_adapter, make_networks
from senseflow.models.lora import trainable
from senseflow.models.public import CHECKPOINTS, Checkpoint, build
from senseflow.optim import make_optimizer
from senseflow.steps import Parts, encoded, is_silent, phased
from senseflow.updates import bytes_beside
from senseflow_kernels import planned

META = torch.device("meta")
NAMES = {  # of the parts by the phases that the steps report
    "student": "student", "fake": "fake", "teacher": "teacher", "decode": "VAE", "VFM backbone": "backbone",
    "D heads": "disc", "D features": "disc",
}  # fmt: skip
Iterate = Callable[[Config, Parts, Any, Batch, int], Any]
Discriminator = Callable[[Config, Any, nn.Module, Condition, torch.device], tuple[Any, Any]]


@dataclass(frozen=True)
class Target:
    """What is planned for: devices of one type ("cpu" or "cuda") and their bytes."""

    type: str
    bytes: float
    ranks: int


def target_of(cfg: Config, ranks: int = 1) -> Target:
    """By memory.device_gb and memory.ranks, else the device that is here and the run's ranks."""
    found, size = device_bytes()
    if cfg.memory.device_gb:
        found, size = "cuda", cfg.memory.device_gb * GB
    return Target(found, size, cfg.memory.ranks or ranks)


# -- the networks, from configs alone ------------------------------------------------------------------------------


def public_checkpoint(cfg: Config) -> Checkpoint:
    """The published sizes of a config's teacher: by its hub id, else by the preset's name."""
    by_hub = {c.hub: c for c in CHECKPOINTS.values()}
    found = by_hub.get(cfg.model.teacher) or CHECKPOINTS.get(cfg.preset.removesuffix("-dmd2"))
    if found is None:
        raise UserError(
            f"model.teacher = {cfg.model.teacher!r}: a plan needs a local folder (its config.json files are enough) or "
            f"one of {', '.join(by_hub)}"
        )
    return found


@contextmanager
def config_folder(cfg: Config) -> Iterator[str]:
    """A folder with the teacher's config.json files: its own where it is local, else one made from the published
    sizes."""
    local = Path(cfg.model.teacher or " ").expanduser()
    if cfg.model.family == "embedded" or local.is_dir():
        yield cfg.model.teacher
        return
    public = public_checkpoint(cfg)
    with tempfile.TemporaryDirectory() as folder:
        name = "unet" if "UNet" in public.network[0] else "transformer"
        for part, sizes in ((name, public.network), ("vae", public.vae)):
            build(sizes).save_config(f"{folder}/{part}")
        for number, (kind, config) in enumerate(public.texts, 1):  # an adapter reads widths there
            part = Path(folder) / ("text_encoder" if number == 1 else f"text_encoder_{number}")
            part.mkdir()
            (part / "config.json").write_text(json.dumps({"architectures": [kind], **config}))
        yield folder


class PlannedAdapter:
    """An adapter whose prompts are shapes."""

    def __init__(self, adapter: Any, net: Any, dtype: torch.dtype, guided: bool):
        self._adapter, self._shape, self._dtype, self._guided = adapter, adapter.text_shape(net), dtype, guided
        self.where = META  # of the prompts; bench.memory puts all of it on a GPU

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def prompts(self, batch: int) -> Condition:
        tokens, width, pooled = self._shape
        embeds = torch.zeros(batch, tokens, width, dtype=self._dtype, device=self.where)
        return Condition(embeds, torch.zeros(batch, pooled, dtype=self._dtype, device=self.where))

    def uncond(self, batch: int) -> Condition | None:
        return None if self._guided else self.prompts(batch)


def planned_parts(cfg: Config, make_discriminator: Discriminator) -> Parts:
    """Every network of a run on the meta device, in the run's dtypes. Raises UserError as the run would, and for a
    teacher whose sizes are not known."""
    with config_folder(cfg) as source, warnings.catch_warnings(), Uninitialised():
        warnings.simplefilter("ignore")  # a LoRA layer on the meta device is initialised by nobody, which peft notes
        adapter: Any = make_adapter(cfg.model, META, source)
        teacher, student, fake = make_networks(cfg, adapter, META)
        dtype = torch.float32 if isinstance(adapter, EmbeddedAdapter) else DTYPES[cfg.model.dtype]
        adapter = PlannedAdapter(adapter, teacher, dtype, guided=cfg.model.family == "flux")
        with META:
            disc, vfm = make_discriminator(cfg, adapter, fake, adapter.prompts(1), META)
    anchors = adapter.schedule.anchors(cfg.model.steps, cfg.model.anchors == "released")
    parts = Parts(adapter, student, fake, teacher, disc, vfm, anchors, Draws(cfg.seed))
    if cfg.isg.midpoint == "adaptive":
        parts.curve = ErrorCurve(torch.empty(32, device=META), torch.empty(32, device=META))
    return parts


def text_encoder_bytes(cfg: Config) -> float:
    """Of the teacher's text encoders in model.dtype; 0 for the embedded family, whose text is read at the start."""
    if cfg.model.family == "embedded":
        return 0.0
    local = Path(cfg.model.teacher or " ").expanduser()
    if local.is_dir():
        texts = []
        for file in sorted(local.glob("text_encoder*/config.json")):
            config = json.loads(file.read_text())
            texts.append(((config.get("architectures") or ["T5EncoderModel"])[0], config))
    else:
        texts = list(public_checkpoint(cfg).texts)
    with Uninitialised():
        weights = [p for text in texts for p in build(text).parameters()]
    return float(sum(p.numel() for p in {id(p): p for p in weights}.values()) * DTYPES[cfg.model.dtype].itemsize)


def shards(cfg: Config, ranks: int) -> int:
    """Over how many ranks student, fake and teacher are split: dist.shard of them, all, or none where each is whole."""
    whole = cfg.dist.mode == "ddp" or (cfg.dist.mode == "auto" and cfg.model.variant == "lora")
    return 1 if whole else min(cfg.dist.shard or ranks, ranks)


# -- what stays ----------------------------------------------------------------------------------------------------


def optimizer_rows(cfg: Config, parts: Parts, ranks: int) -> list[Row]:
    """Moments, other halves and the EMA, from optimizers built on the meta device as the run builds them."""
    nets: dict[str, list[Any]] = {"student": trainable(parts.student), "fake": trainable(parts.fake)}
    if parts.disc is not None:
        nets["disc"] = list(parts.disc.parameters())
    split = {"student": shards(cfg, ranks), "fake": shards(cfg, ranks), "disc": 1}
    rows, host = [], cfg.optim.host
    for name, params in nets.items():
        n, where = split[name], host and name != "disc"
        if cfg.optim.name != "senseflow":
            states = sum(p.numel() * (bytes_beside(cfg, name, p) - p.element_size()) for p in params)
            rows.append(Row(name, f"moments ({cfg.optim.name})", states / n))
            continue
        plain = replace(cfg, {"optim.host": False})  # the same states, wherever they lie
        state = make_optimizer(plain, params, 0.0, heads=name == "disc").state
        kinds = {"moments": [s[k] for s in state.values() for k in s if k.startswith("exp_avg")],
                 "other half of the weights": [s["low"] for s in state.values() if "low" in s]}  # fmt: skip
        for what, tensors in kinds.items():
            size = nbytes(tensors, n)
            rows.append(Row(name, what, 0 if where else size, size if where else 0))
        if where:  # HostAdamW's masters, and the buffers that gradients are copied to
            rows.append(Row(name, "weights and gradients on the host", 0, 2 * nbytes(params, n)))
    if cfg.ema.decay > 0:
        size = nbytes((torch.empty_like(p, dtype=torch.float32) for p in nets["student"]), split["student"])
        rows.append(Row("student", "EMA, fp32", 0 if host else size, size if host else 0))
    return rows


def weight_rows(cfg: Config, parts: Parts, ranks: int) -> list[Row]:
    """Weights and buffers of each network, each tensor at the first that holds it (LoRA: the teacher)."""
    seen: set[int] = set()
    rows = []
    split = shards(cfg, ranks)
    vae = getattr(parts.adapter.vae, "inner", parts.adapter.vae)
    for name, net, n in (("teacher", parts.teacher, split), ("student", parts.student, split),
                         ("fake", parts.fake, split), ("disc", parts.disc, 1), ("backbone", parts.vfm, 1),
                         ("VAE", vae, 1)):  # fmt: skip
        if net is None:
            continue
        own = [t for t in itertools.chain(net.parameters(), net.buffers()) if id(t) not in seen]
        seen |= {id(t) for t in own}
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in own if t.numel() > 256})
        rows.append(Row(name, f"weights, {', '.join(kinds)}", nbytes(own, n)))
    return rows


def communication_row(cfg: Config, parts: Parts, ranks: int) -> Row:
    """Of FSDP2 with a block a unit: two blocks gathered (one in use, the next on its way), the rest of the network
    gathered, one block's gradients before and after their cast to fp32 for the reduction. Whole networks: one bucket
    of all gradients."""
    if ranks == 1:
        return Row("communication", "", 0)
    if shards(cfg, ranks) == 1:
        return Row("communication", "gradient buckets", nbytes(trainable(parts.student)))
    net: Any = parts.student
    adapter: Any = parts.adapter
    blocks = [list(b.parameters()) for b in adapter.blocks(net)]
    inside = {id(p) for block in blocks for p in block}
    numbers = max(sum(p.numel() for p in block) for block in blocks)
    rest = sum(p.numel() for p in net.parameters() if id(p) not in inside)
    width = DTYPES[cfg.model.dtype].itemsize
    return Row(
        "communication", "gathered blocks, gradients to reduce", (2 * width + width + 4) * numbers + width * rest
    )


# -- what comes and goes -------------------------------------------------------------------------------------------


class Backward:
    """Stands where a run has its `Updates`: makes every gradient, and steps on nothing."""

    def __init__(self, parts: Parts, ledger: Ledger):
        self.parts, self.ledger = parts, ledger
        self.params = {"student": trainable(parts.student), "fake": trainable(parts.fake)}
        if parts.disc is not None:
            self.params["disc"] = list(parts.disc.parameters())

    def ready(self, *names: str) -> None: ...

    def coast(self, iteration: int, name: str) -> dict[str, Tensor]:
        return {}

    def lam(self, metrics: dict[str, Tensor]) -> float:
        return 1.0

    def step_parts(self, losses: Any, iteration: int, *names: str, **_: Any) -> dict[str, Tensor]:
        inputs = [p for name in names for p in self.params[name]]
        with ExitStack() as stack:
            for p in inputs:
                hook = p.register_post_accumulate_grad_hook(lambda p: self.ledger.as_gradient(p.grad))  # type: ignore[arg-type]
                stack.callback(hook.remove)
            for loss, _ in losses:
                with self.parts.phase("backward"):
                    loss.backward(inputs=inputs)
        for p in inputs:
            p.grad = None
        return {}


def planned_batch(cfg: Config, parts: Parts, device: torch.device = META) -> Batch:
    """One rank's batch, of pixels that are still to be encoded."""
    a: Any = parts.adapter
    size, side = cfg.data.batch, cfg.model.side
    pixels = torch.zeros(size, 3, side, side, device=device)
    samples = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(pixels, pixels, a.prompts(size), samples, encoded=a.vae is None)


def busy_iteration(cfg: Config, parts: Parts) -> int:
    """The number of an iteration in which the student steps and every term has a weight."""
    turns = range(cfg.train.fake_warmup + cfg.train.gen_every - 1, 10**6, cfg.train.gen_every)
    return next(i for i in itertools.islice(turns, 1000) if not is_silent(parts, cfg, i))


def measured(cfg: Config, parts: Parts, iterate: Iterate, device_type: str) -> Ledger:
    """The ledger of one iteration of `cfg`, whose batch is one rank's."""
    ledger = Ledger(CUDA_ROUNDING if device_type == "cuda" else 1)
    nets = [n for n in (parts.student, parts.fake, parts.teacher, parts.disc, parts.vfm, parts.adapter.vae) if n]
    ledger.known(t for net in nets for t in itertools.chain(net.parameters(), net.buffers()))
    counted = dataclasses.replace(parts)
    phased(counted, ledger)  # type: ignore[arg-type]
    iteration = busy_iteration(cfg, parts)
    with StandsFor(device_type), ledger:
        with ledger.phase("batch"):
            batch = planned_batch(cfg, counted)
        with ledger.phase("encode"):
            batch = encoded(counted, batch, iteration)
        iterate(cfg, counted, Backward(counted, ledger), batch, iteration)
    return ledger


# -- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """rows: of the run's fullest moment. total: their bytes on a device, and the reserve."""

    config: Config
    target: Target
    rows: list[Row]
    total: float

    @property
    def fits(self) -> bool:
        return self.total <= self.target.bytes


# Switches that change neither a network's tensors nor its optimizer's; and those that an iteration does not notice.
PLAIN = {"model.checkpointing": "none", "disc.checkpointing": False, "optim.in_backward": False}
UNSEEN = {"model.teacher_dtype": "model", "disc.moments": "fp32"}  # fp8: a layer made wider at a time weighs little


class Planner:
    """Plans of one config, and of others with its SWITCHES changed alone. What they share is measured once."""

    def __init__(self, cfg: Config, target: Target, iterate: Iterate, make_discriminator: Discriminator):
        self.target, self.iterate, self.make = target, iterate, make_discriminator
        self._parts: dict[Any, Parts] = {}
        self._ledgers: dict[Any, Ledger] = {}
        self._weights: dict[Any, list[Row]] = {}
        self._states: dict[Any, list[Row]] = {}
        self.text = text_encoder_bytes(cfg)

    def _local(self, cfg: Config) -> Config:
        return replace(cfg, {"data.batch": math.ceil(cfg.data.batch / self.target.ranks)})

    def parts(self, cfg: Config) -> Parts:
        key = (cfg.model, cfg.lora, cfg.disc, cfg.train.precision == "fp32")
        if key not in self._parts:
            with self._device():
                self._parts[key] = planned_parts(cfg, self.make)
        return self._parts[key]

    @contextmanager
    def _device(self) -> Iterator[None]:
        with planned() if self.target.type == "cuda" else ExitStack():
            yield

    def stays(self, cfg: Config) -> list[Row]:
        """Rows that are there from the start to the end."""
        cfg = replace(cfg, PLAIN)
        parts, ranks = self.parts(replace(cfg, UNSEEN)), self.target.ranks
        weights = (cfg.model, cfg.train.precision == "fp32")
        if weights not in self._weights:
            self._weights[weights] = weight_rows(cfg, self.parts(replace(cfg, {"disc.moments": "fp32"})), ranks)
        states = (cfg.train.precision, cfg.train.moments, cfg.disc.moments, cfg.optim, cfg.ema)
        if states not in self._states:
            self._states[states] = [*optimizer_rows(cfg, parts, ranks), communication_row(cfg, parts, ranks)]
        rows = [*self._weights[weights], *self._states[states]]
        if self.text and not cached(cfg):
            rows.append(Row("text encoders", f"weights, {cfg.model.dtype}", self.text))
        return rows

    def least(self, cfg: Config) -> float:
        """Bytes below which no plan of `cfg` is: what stays, and after its backward the student's gradients where they
        are held. Known without running an iteration."""
        size = sum(r.device for r in self.stays(cfg))
        if cfg.optim.in_backward:
            return size
        parts = self.parts(replace(cfg, PLAIN | UNSEEN))
        return size + nbytes(trainable(parts.student)) / shards(cfg, self.target.ranks)

    def ledger(self, cfg: Config) -> Ledger:
        cfg = replace(cfg, UNSEEN)
        key = (cfg.model, cfg.disc, cfg.train.precision == "fp32")
        if key not in self._ledgers:
            with self._device():
                self._ledgers[key] = measured(self._local(cfg), self.parts(cfg), self.iterate, self.target.type)
        return self._ledgers[key]

    def plan(self, cfg: Config) -> Plan:
        stays = self.stays(cfg)
        share = 0.0 if cfg.optim.in_backward else 1 / shards(cfg, self.target.ranks)
        peak = self.ledger(cfg).peak(share)
        rows = [*stays]
        if peak.gradients:
            rows.append(Row("student and fake", "gradients", peak.gradients))
        for phase, size in sorted(peak.parts.items(), key=lambda item: -item[1]):
            what = "activations" if phase in NAMES else "temporary and recomputed" if phase == "backward" else phase
            rows.append(Row(NAMES.get(phase, "step"), what, size))
        rows.append(Row("data", f"{cfg.data.prefetch} batches ahead", cfg.data.prefetch * self._batch(cfg)))
        reserve = cfg.memory.reserve_gb * GB if self.target.type == "cuda" else 0.0
        total = sum(r.device for r in rows)
        start = self.text + sum(r.device for r in stays if r.part == "VAE")
        if start > total:  # the encoders are gone before there is a network
            rows.append(Row("text encoders", "at the start, beyond the step", start - total))
        return Plan(cfg, self.target, rows, max(total, start) + reserve)

    def _batch(self, cfg: Config) -> float:
        batch = planned_batch(self._local(cfg), self.parts(cfg))
        return nbytes([batch.latents, batch.pixels, batch.cond.embeds, batch.cond.pooled])


def cached(cfg: Config) -> bool:
    """Whether prompts are encoded before the loop: a cache, the embedded set, or no source at all (yet)."""
    from senseflow.data.cache import is_cache

    return not cfg.data.path or is_cache(cfg.data.path)
