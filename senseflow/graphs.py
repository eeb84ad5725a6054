"""CUDA graphs of whole iterations: `--graphs auto|off|on`. One launch instead of thousands, for what is launch-bound.

An iteration is one of a few kinds, which the host knows beforehand from `Draws`: generator's or critic's, each rollout
length or forward noising, silent or not. The first of a kind runs as it is, the second is captured and replayed (a
capture runs nothing), and so is every later one: no iteration is run in vain, and none twice. What changes from one to
the next lies in device memory that stays where it is: the batch, the iteration's number, from which `Draws` makes
noises, times, anchors and guidance, and the learning rates. Gradients stay where they are too, for the optimizer's
table of addresses is made on the host: one more network's gradients in memory than without graphs.

On several GPUs that hold their networks whole (DDP) NCCL's sums of gradients and losses are part of a graph; the ranks
meet the same kinds in the same order, for `Draws` tells all of them the same, and what one cannot capture none replays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from senseflow.config import Config, UserError
from senseflow.data.batches import Batch
from senseflow.dist import World
from senseflow.models.adapter import Condition
from senseflow.steps import Parts, is_silent
from senseflow.updates import Updates

log = logging.getLogger("senseflow")
Iterate = Callable[[Config, Parts, Updates, Batch, int], dict[str, Tensor]]
Kind = tuple[bool, int | None, bool]
GRADIENTS = 0.02  # of the device's memory, at most, in `auto`


def reason_against(cfg: Config, device: torch.device, profile: bool = False, sharded: bool = False) -> str | None:
    """Why iterations of this run cannot be captured, in words; None where they can."""
    if device.type != "cuda":
        return f"there are none on {device.type}"
    if profile:
        return "--profile times phases, and a replay has none"
    if sharded:
        return "hooks on the host gather sharded networks; with dist.mode ddp ranks hold them whole"
    for name, value, allowed in (
        ("optim.name", cfg.optim.name, "senseflow"), ("optim.in_backward", cfg.optim.in_backward, False),
        ("optim.host", cfg.optim.host, False), ("ida.mode", cfg.ida.mode, "fixed"),
        ("data.buckets", cfg.data.buckets, False),
    ):  # fmt: skip
        if value != allowed:
            return f"{name} = {value!r}: its host part is not in a graph, {allowed!r} is"
    return None


def advance(
    cfg: Config, parts: Parts, updates: Updates, iterate: Iterate, profile: bool = False
) -> Callable[[Batch, int], dict[str, Tensor]]:
    """What runs the next iteration: (batch, iteration) -> metrics. By graphs where kernels.graphs says so: on: or a
    UserError; auto: or, said once, as it is. The same on all ranks, all of which must call this."""
    wanted = cfg.kernels.graphs
    device = next(parts.student.parameters()).device
    reason = reason_against(cfg, device, profile, parts.world.sharded)
    if wanted == "on" and reason:
        raise UserError(f"kernels.graphs = 'on': {reason}; allowed is auto or off")
    if wanted == "auto" and reason is None:
        reason = too_much(updates, torch.cuda.get_device_properties(device).total_memory)
    if wanted != "off":
        reason = agreed(parts.world, reason)
    if wanted != "off" and reason is None:
        return Replayed(cfg, parts, updates, iterate)
    if wanted == "auto" and device.type == "cuda":
        log.warning("iterations run without CUDA graphs: %s", reason)
    return lambda batch, iteration: iterate(cfg, parts, updates, batch, iteration)


def agreed(world: World, reason: str | None) -> str | None:
    """This rank's reason against graphs, or that another one has one."""
    (against,) = world.most(float(reason is not None))
    return reason or ("another rank cannot" if against else None)


def too_much(updates: Updates, memory: int) -> str | None:
    """Why `auto` leaves a run as it is: gradients that stay would take a share of the memory that networks of that size
    want for themselves, and their kernels are long enough to launch one by one. None: they take little."""
    size = sum(p.numel() * p.element_size() for params in updates.params.values() for p in params)
    if size <= GRADIENTS * memory:
        return None
    return f"all gradients would stay in memory, {size / 1e9:.1f} GB; --graphs on has them do so"


@dataclass
class Captured:
    """A graph and the tensors that its replay writes."""

    graph: Any
    metrics: dict[str, Tensor]


class Replayed:
    """Iterations by graphs. With capture=False everything but the capture: the same weights, on a CPU as well."""

    def __init__(self, cfg: Config, parts: Parts, updates: Updates, iterate: Iterate, capture: bool = True):
        self.cfg, self.parts, self.updates, self.iterate, self.capture = cfg, parts, updates, iterate, capture
        device = next(parts.student.parameters()).device
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self.rates = {name: torch.zeros((), dtype=torch.float64, device=device) for name in updates.optimizers}
        self.batch: Batch | None = None
        self.kinds: dict[Kind, Captured | None] = {}  # None: ran once, not captured yet
        self.pool: Any = None
        self.loads = updates.loads
        updates.keep_grads = True
        if capture and device.type == "cuda":
            # one stream for what runs and what is captured: autograd ties gradients to the stream they come on
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            torch.cuda.set_stream(stream)

    def kind(self, iteration: int) -> Kind:
        """What the host decides of an iteration, and a capture holds fast."""
        p, cfg = self.parts, self.cfg
        turn = iteration - cfg.train.fake_warmup
        rollout = p.draws.coin(iteration, cfg.rollout.backward_prob)
        length = p.draws.integer(iteration, len(p.anchors)) if rollout else None
        return turn >= 0 and (turn + 1) % cfg.train.gen_every == 0, length, is_silent(p, cfg, iteration)

    def __call__(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """One iteration; its metrics are to be read before the next one."""
        self._feed(batch, iteration)
        assert self.batch is not None
        if self.loads != self.updates.loads:  # a checkpoint was loaded: counts have other memory than was captured
            self.kinds, self.loads = {}, self.updates.loads
        kind = self.kind(iteration)
        known, draws = self.kinds.get(kind), self.parts.draws
        try:
            draws.clock = self.clock
            if known is None and self.capture and kind in self.kinds:
                known = self.kinds[kind] = self._try(self.batch, iteration)
            if known is None:
                self.kinds[kind] = None
                return self.iterate(self.cfg, self.parts, self.updates, self.batch, iteration)
        finally:
            draws.clock = None
        known.graph.replay()
        return dict(known.metrics)

    def _feed(self, batch: Batch, iteration: int) -> None:
        """The iteration's data into the memory that graphs read. Nothing here waits."""
        if self.batch is None:
            self.batch = _like(batch)
        _copy(self.batch, batch)
        self.clock.fill_(iteration)
        for name, rate in self.rates.items():
            rate.fill_(self.updates.scheduled(name, iteration))
        self.updates.rates = self.rates

    def _try(self, batch: Batch, iteration: int) -> Captured | None:
        """A graph of this iteration; None, and the run goes on without any, where something in it cannot be captured.
        Raises UserError instead with kernels.graphs = on. Nothing has been run then, so nothing is lost."""
        params = [p for some in self.updates.params.values() for p in some]
        before = [p.grad for p in params]
        found, error = None, None
        try:
            found = self._captured(batch, iteration)
        except RuntimeError as caught:
            error = caught
        reason = agreed(self.parts.world, None if error is None else str(error).strip().partition("\n")[0])
        if reason is None:
            return found
        if self.cfg.kernels.graphs == "on":
            raise UserError(f"kernels.graphs = 'on', but an iteration cannot be captured: {reason}") from error
        log.warning("iterations run without CUDA graphs from %d on: %s", iteration, reason)
        self.capture, self.kinds = False, {}
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
        for optimizer in self.updates.optimizers.values():
            optimizer._plans.clear()  # tables that the capture made were never filled
        return None

    def _captured(self, batch: Batch, iteration: int) -> Captured:
        """A graph of this iteration. Raises RuntimeError, CUDA's, where something in it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread goes on with its copies meanwhile
        how: dict[str, Any] = dict(pool=self.pool, capture_error_mode="thread_local")
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), **how):
            metrics = self.iterate(self.cfg, self.parts, self.updates, batch, iteration)
        self.pool = self.pool or graph.pool()
        return Captured(graph, metrics)


def _like(value: Any) -> Any:
    """The same with memory of its own for every device tensor; items stay on the host, and nothing on the device reads
    them."""
    if isinstance(value, Batch):
        own = {f.name: _like(getattr(value, f.name)) for f in fields(value) if f.name != "items"}
        if value.pixels is value.latents:
            own["pixels"] = own["latents"]
        return replace(value, **own, items=None)
    if isinstance(value, Condition):
        return Condition(_like(value.embeds), _like(value.pooled))
    if isinstance(value, list):
        return [_like(v) for v in value]
    return torch.empty_like(value, memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def _copy(target: Any, source: Any) -> None:
    """source's numbers into target's memory. Raises UserError for a batch of another form."""
    if isinstance(target, Batch | Condition):
        for f in fields(target):
            if f.name != "items":
                _copy(getattr(target, f.name), getattr(source, f.name))
        return
    if isinstance(target, list) and isinstance(source, list) and len(target) == len(source):
        for one, other in zip(target, source, strict=True):
            _copy(one, other)
        return
    if isinstance(target, Tensor) and isinstance(source, Tensor):
        if target.shape != source.shape or target.dtype != source.dtype:
            raise UserError(
                f"a batch of {list(source.shape)} {source.dtype} after one of {list(target.shape)} {target.dtype}: "
                "CUDA graphs take one form, --graphs off"
            )
        target.copy_(source, non_blocking=True)
    elif target != source:
        raise UserError(f"a batch with {source!r} after one with {target!r}: CUDA graphs take one form, --graphs off")
