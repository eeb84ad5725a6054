"""Everything that changes weights: three optimizers, IDA and the EMA of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from senseflow.algo.ida import AdaptiveLambda, ida_update
from senseflow.config import Config
from senseflow.dist import Leaves, World, local
from senseflow.models.lora import load_trained_state, trainable, trained_state
from senseflow.optim import Ema, apply_if_finite, clip_coefficient, clip_grad_norm_, make_optimizer, scheduled_lr
from senseflow.steps import Parts
from senseflow_kernels import HostAdamW, join_fp32


def _note(world: World, found: Tensor, grad: Tensor) -> None:
    """found becomes above 0 where a gradient is not finite, on any rank."""
    found.copy_(world.mean(torch.maximum(found, (~torch.isfinite(grad).all()).float())))


def bytes_beside(cfg: Config, name: str, p: Tensor) -> float:
    """Device bytes of a weight of a network beside its own: gradient, moments, the other half of a split one."""
    if name not in ("student", "fake", "disc"):
        return 0.0
    if name == "disc" or cfg.optim.name == "torch" or cfg.optim.name == "apex":
        return 3.0 * p.element_size()
    if cfg.optim.name == "torchao-8bit":
        return p.element_size() + 2.03  # fp32 scales of blocks of 256
    gradient = 0 if cfg.optim.in_backward else p.element_size()
    if cfg.optim.host:
        return gradient
    moments = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 2 / 256}[cfg.train.moments]
    return gradient + moments + 2 * (cfg.train.precision == "split" and p.dtype == torch.bfloat16)


def bytes_moved(optimizer: Any, params: Sequence[Tensor], has_ida: bool, ema: Ema | None, name: str) -> float:
    """Bytes that a step of a network reads and writes at the least: its gradient twice (for the norm first), weight and
    moments there and back; with the student's, phi and EMA too."""
    total = 0.0
    for p in params:
        state = optimizer.state.get(p, {}) if hasattr(optimizer, "state") else {}
        kept = [t for key, t in state.items() if key != "step" and isinstance(t, Tensor)]
        there_and_back = p.numel() * p.element_size() + sum(t.numel() * t.element_size() for t in kept)
        if name == "student":
            low = state["low"].numel() * 2 if "low" in state else 0
            there_and_back += (p.numel() * p.element_size() + low) * has_ida + 4 * p.numel() * (ema is not None)
        total += 2 * there_and_back + 2 * p.numel() * p.element_size() * (p.grad is not None)
    return total


class Updates:
    """The three optimizers, the EMA and IDA's lambda: everything that changes weights.

    With optim.name "senseflow" the student's step moves the fake by IDA and the EMA in its own pass (and leaves them
    where it is skipped); with the others two sweeps follow it.
    """

    def __init__(self, cfg: Config, parts: Parts):
        t = cfg.train
        self.cfg, self.parts, self.world = cfg, parts, parts.world
        self.params = {
            "student": trainable(parts.student),
            "fake": trainable(parts.fake),
        }
        if parts.disc is not None:
            self.params["disc"] = list(parts.disc.parameters())
        self.leaves = Leaves({name: getattr(parts, name) for name in self.params}, self.params)
        self.lr = {"student": t.lr, "fake": t.fake_lr, "disc": t.disc_lr}
        self.rate = 1.0  # of all learning rates, lowered when a run goes back to a checkpoint
        self.adaptive = AdaptiveLambda(cfg.ida.lam) if cfg.ida.mode == "adaptive" else None
        self.ema = None
        if cfg.ema.decay > 0:
            self.ema = Ema(self.params["student"], cfg.ema.decay, "cpu" if cfg.optim.host else None)
        self.one_pass = cfg.optim.name == "senseflow"
        self.keep_grads = False  # zeroed where they are instead of freed: CUDA graphs need them there
        self.loads = 0  # of checkpoints, after which states have other memory
        self.rates: dict[str, Tensor] = {}  # learning rates on the device, which CUDA graphs read there
        self.optimizers: dict[str, Any] = {}
        for name in ("fake", "student", "disc"):  # the student's update writes the fake, so that comes first
            more: dict[str, Any] = dict(heads=name == "disc", seed=3 * cfg.seed + (name == "fake"))
            if self.one_pass and name == "student":
                more["phi"] = self.optimizers["fake"] if self.has_ida else None
                more["ema"] = None if self.ema is None else self.ema.shadow
            if name in self.params:
                self.optimizers[name] = make_optimizer(cfg, self.params[name], self.lr[name], **more)

    @property
    def has_ida(self) -> bool:
        return self.adaptive is not None or self.cfg.ida.lam < 1

    def scheduled(self, name: str, iteration: int) -> float:
        """The rate of a network in this iteration."""
        t = self.cfg.train
        left = 0.0 if name == "student" else t.cooldown_others
        return self.rate * scheduled_lr(iteration, self.lr[name], t.warmup, t.iterations, t.cooldown, left)

    def lam(self, metrics: dict[str, Tensor]) -> float | Tensor:
        """IDA's lam of this generator iteration, from its fake_real_gap where it adapts. Once for each."""
        if self.adaptive is None:
            return self.cfg.ida.lam
        return self.adaptive.update(self.world.mean(metrics["fake_real_gap"]))

    def step(
        self, loss: Tensor, iteration: int, *names: str, lam: float | Tensor = 1.0, x0: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`step_parts` of a batch in one part."""
        return self.step_parts([(loss, x0)], iteration, *names, lam=lambda: lam)

    def step_parts(
        self, losses: Iterable[tuple[Tensor, Tensor | None]], iteration: int, *names: str,
        lam: Callable[[], float | Tensor] = lambda: 1.0, parts: int = 1,
    ) -> dict[str, Tensor]:  # fmt: skip
        """A backward into the named networks for each part of the batch, then clip and Adam step of each; a network is
        skipped, on every rank alike, where the loss or its gradient norm is not finite on any. Nothing else gets a
        gradient: requires_grad is never toggled.

        losses: of `parts` equal parts, as they are asked for: (mean over the part, x0, what the student's gradients
        come through, or None); with optim.in_backward, which steps on a weight before all gradients are known,
        everything is skipped where the loss or dL/dx0 is not finite, and then each tensor for itself. lam: of IDA,
        asked for after the last loss, right after the student's step (paper.md 1.3), then the EMA.
        """
        self._set_rates(iteration, *names)
        inside = [name for name in names if self.cfg.optim.in_backward and name != "disc"]
        if inside:
            ((loss, x0),) = losses
            return self._step_inside(loss, x0, iteration, names, inside, lam())
        total: Tensor | float = 0.0
        for loss, _ in losses:
            share = loss if parts == 1 else loss / parts
            with self.parts.phase("backward"):
                self.leaves.backward(share, *names)
            total = share.detach() if parts == 1 else total + share.detach()
        self.leaves.clear()
        assert isinstance(total, Tensor)
        for name in names:
            with self.parts.phase("reduce"):
                self.world.reduce_gradients(self.params[name])
        return self._apply(total, iteration, *names, lam=lam())

    def _step_inside(
        self, loss: Tensor, x0: Tensor | None, iteration: int, names: tuple[str, ...], inside: list[str],
        lam: float | Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The step of each weight as its gradient appears, where `inside`; of the others after the backward."""
        found, seen = self.world.mean((~torch.isfinite(loss.detach())).float()), {}
        with self.parts.phase("backward + AdamW"), ExitStack() as stack:
            if x0 is not None and x0.requires_grad:
                stack.callback(x0.register_hook(partial(_note, self.world, found)).remove)
            for name in inside:
                how = dict(found_inf=found, clip=self.cfg.train.clip, **self._followers(name, lam))
                seen[name] = stack.enter_context(self.optimizers[name].in_backward(**how))
            self.leaves.backward(loss, *names)
        self.leaves.clear()
        metrics = {}
        for name, one in seen.items():
            metrics |= {f"{name}_grad_norm": one.norm, f"{name}_skipped": (one.skipped > 0).float()}
            metrics[f"{name}_tensors_skipped"] = one.skipped
        rest = [name for name in names if name not in inside]
        for name in rest:
            self.world.reduce_gradients(self.params[name])
        return metrics | self._apply(loss.detach(), iteration, *rest)

    def coast(self, iteration: int, name: str) -> dict[str, Tensor]:
        """The step of a network whose loss is 0 whatever its weights: moments decay, and move the weights all the same,
        as a backward of zeros would have it."""
        for p in self.params[name]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._set_rates(iteration, name)
        return self._apply(torch.zeros((), device=self.params[name][0].device), iteration, name)

    def _across(self, name: str) -> Callable[[Tensor], Tensor]:
        """From a norm of this rank's part of a network to the whole one."""
        return partial(self.world.norm, sharded=name != "disc")

    def _set_rates(self, iteration: int, *names: str) -> None:
        for name in names:
            for group in self.optimizers[name].param_groups:
                group["lr"] = self.rates[name] if name in self.rates else self.scheduled(name, iteration)

    def _clear(self, params: Sequence[Tensor]) -> None:
        """After a step: no gradient is left, or zeros in its place."""
        if self.keep_grads:
            for p in params:
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = torch.empty_like(p)  # the optimizer would lay out each anew
            torch._foreach_zero_([p.grad for p in params if p.grad is not None])
            return
        for p in params:
            p.grad = None

    def _followers(self, name: str, lam: float | Tensor) -> dict[str, float | Tensor]:
        """What of IDA and EMA a step of one pass does."""
        if name != "student":
            return {}
        return dict(lam=lam, ema_decay=1.0 if self.ema is None else self.ema.decay)

    def _apply(self, loss: Tensor, iteration: int, *names: str, lam: float | Tensor = 1.0) -> dict[str, Tensor]:
        metrics = {}
        loss = self.world.mean(loss)
        for name in names:
            optimizer, params, limit = self.optimizers[name], self.params[name], self.cfg.train.clip
            phase = "clip + AdamW + IDA + EMA" if self.one_pass else "clip + AdamW"
            self.parts.moves(phase, partial(bytes_moved, optimizer, params, self.has_ida, self.ema, name))
            with self.parts.phase(phase):
                norm = clip_grad_norm_(params, 0.0 if self.one_pass else limit, self._across(name))
                finite = torch.isfinite(loss) & torch.isfinite(norm)
                if self.one_pass:
                    how = dict(coefficient=clip_coefficient(norm, limit), **self._followers(name, lam))
                    found = (~finite).float()
                    if isinstance(optimizer, HostAdamW):
                        optimizer.step(found_inf=found, **how)
                    else:
                        optimizer.found_inf = found
                        optimizer.step(**how)
                else:
                    apply_if_finite(optimizer, finite)
                self._clear(params)
            metrics |= {f"{name}_grad_norm": norm, f"{name}_skipped": (~finite).float()}
            if name == "student" and not self.one_pass:
                self._follow(lam)
        return metrics

    def _follow(self, lam: float | Tensor) -> None:
        """IDA right after the generator's step (paper.md 1.3), then the EMA of the student."""
        theta, phi = self.params["student"], self.params["fake"]
        with self.parts.phase("IDA + EMA"):
            if self.has_ida:
                ida_update(phi, theta, lam)
            if self.ema is not None:
                self.ema.update(theta)

    def ready(self, *names: str) -> None:
        """Before these networks (default: all) are read or written: with optim.host, waits for their last update."""
        for name, optimizer in self.optimizers.items():
            if isinstance(optimizer, HostAdamW) and (not names or name in names):
                optimizer.wait()

    def exact(self, name: str) -> Iterator[Tensor]:
        """This rank's part of a network's weights as they are kept, one after another: bf16 and its other half joined
        to fp32."""
        self.ready()
        optimizer = self.optimizers[name]
        lows = optimizer.lows() if self.cfg.train.precision == "split" else [None] * len(self.params[name])
        for p, low in zip(self.params[name], lows, strict=True):
            mine = local(p.detach())
            yield mine if low is None else join_fp32(mine, local(low).to(p.device))

    def state(self) -> dict[str, Any]:
        self.ready()
        named: dict[str, Any] = {"student": trained_state(self.parts.student)}
        named["fake"] = trained_state(self.parts.fake)
        named["rate"] = self.rate
        if self.parts.disc is not None:
            named["disc"] = self.parts.disc.state_dict()
        named["optimizers"] = {k: o.state_dict() for k, o in self.optimizers.items()}
        for name, state in named["optimizers"].items():  # set anew in each step; of CUDA graphs a device tensor
            for group in state["param_groups"]:
                group["lr"] = self.lr[name]
        if self.ema is not None:
            named["ema"] = self.ema.state_dict()
        if self.adaptive is not None:
            named["adaptive"] = self.adaptive.state_dict()
        return named

    def load(self, state: dict[str, Any]) -> None:
        self.ready()
        self.loads += 1
        self.rate = state.get("rate", 1.0)
        load_trained_state(self.parts.student, state["student"])
        load_trained_state(self.parts.fake, state["fake"])
        if self.parts.disc is not None:
            self.parts.disc.load_state_dict(state["disc"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.adaptive is not None:
            self.adaptive.load_state_dict(state["adaptive"])


def drift(updates: Updates) -> Tensor:
    """IDA drift: || phi - theta || / || theta || over what trains, a device scalar. With LoRA that is the distance of
    the effective weights over what the student has learned, as A's rows are orthonormal; 0 before any update."""
    gap, size = [], []
    for phi, theta in zip(updates.exact("fake"), updates.exact("student"), strict=True):  # no second copy of a network
        gap.append(torch._foreach_norm([phi.float() - theta.float()])[0])
        size.append(torch._foreach_norm([theta.float()])[0])
    whole, apart = (updates.world.norm(torch.linalg.vector_norm(torch.stack(x))) for x in (size, gap))
    return apart / whole.clamp_min(1e-12)
