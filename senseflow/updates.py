"""Everything that changes weights: three optimizers, IDA and the EMA of the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senseflow.algo.ida import AdaptiveLambda, ida_update
from senseflow.config import Config
from senseflow.optim import Ema, apply_if_finite, clip_grad_norm_, make_adamw, scheduled_lr
from senseflow.steps import Parts


class Updates:
    """The three optimizers, the EMA and IDA's lambda: everything that changes weights."""

    def __init__(self, cfg: Config, parts: Parts):
        t = cfg.train
        self.cfg, self.parts = cfg, parts
        self.params = {
            "student": list(parts.student.parameters()),
            "fake": list(parts.fake.parameters()),
        }
        if parts.disc is not None:
            self.params["disc"] = list(parts.disc.parameters())
        self.lr = {"student": t.lr, "fake": t.fake_lr, "disc": t.disc_lr}
        self.optimizers = {
            name: make_adamw(params, self.lr[name], (t.beta1, t.beta2), t.eps, t.weight_decay)
            for name, params in self.params.items()
        }
        self.ema = Ema(self.params["student"], cfg.ema.decay) if cfg.ema.decay > 0 else None
        self.adaptive = AdaptiveLambda(cfg.ida.lam) if cfg.ida.mode == "adaptive" else None

    def scheduled(self, name: str, iteration: int) -> float:
        """The rate of a network; the cooldown is the student's alone, so that the fake catches up with it."""
        t = self.cfg.train
        return scheduled_lr(iteration, self.lr[name], t.warmup, t.iterations, t.cooldown if name == "student" else 0.0)

    def step(self, loss: Tensor, iteration: int, *names: str) -> dict[str, Tensor]:
        """One backward into the named networks, then clip and Adam step of each; a network is skipped where the loss or
        its gradient norm is not finite. Nothing else gets a gradient: requires_grad is never toggled."""
        with self.parts.phase("backward"):
            loss.backward(inputs=[p for name in names for p in self.params[name]])
        return self._apply(loss.detach(), iteration, *names)

    def coast(self, iteration: int, name: str) -> dict[str, Tensor]:
        """The step of a network whose loss is 0 whatever its weights: moments decay, and move the weights all the same,
        as a backward of zeros would have it."""
        for p in self.params[name]:
            p.grad = torch.zeros_like(p)
        return self._apply(torch.zeros((), device=self.params[name][0].device), iteration, name)

    def _apply(self, loss: Tensor, iteration: int, *names: str) -> dict[str, Tensor]:
        metrics = {}
        with self.parts.phase("clip + AdamW"):
            for name in names:
                norm = clip_grad_norm_(self.params[name], self.cfg.train.clip)
                finite = torch.isfinite(loss) & torch.isfinite(norm)
                optimizer = self.optimizers[name]
                for group in optimizer.param_groups:
                    group["lr"] = self.scheduled(name, iteration)
                apply_if_finite(optimizer, finite)
                optimizer.zero_grad(set_to_none=True)
                metrics |= {f"{name}_grad_norm": norm, f"{name}_skipped": (~finite).float()}
        return metrics

    def after_student(self, metrics: dict[str, Tensor]) -> None:
        """IDA right after the generator's step (paper.md 1.3), then the EMA of the student."""
        theta, phi = self.params["student"], self.params["fake"]
        lam: float | Tensor = self.cfg.ida.lam
        if self.adaptive is not None:
            lam = self.adaptive.update(metrics["fake_real_gap"])
        with self.parts.phase("IDA + EMA"):
            if self.adaptive is not None or self.cfg.ida.lam < 1:
                ida_update(phi, theta, lam)
            if self.ema is not None:
                self.ema.update(theta)

    def state(self) -> dict[str, Any]:
        named: dict[str, Any] = {"student": self.parts.student.state_dict()}
        named["fake"] = self.parts.fake.state_dict()
        if self.parts.disc is not None:
            named["disc"] = self.parts.disc.state_dict()
        named["optimizers"] = {k: o.state_dict() for k, o in self.optimizers.items()}
        if self.ema is not None:
            named["ema"] = self.ema.state_dict()
        if self.adaptive is not None:
            named["adaptive"] = self.adaptive.state_dict()
        return named

    def load(self, state: dict[str, Any]) -> None:
        self.parts.student.load_state_dict(state["student"])
        self.parts.fake.load_state_dict(state["fake"])
        if self.parts.disc is not None:
            self.parts.disc.load_state_dict(state["disc"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.adaptive is not None:
            self.adaptive.load_state_dict(state["adaptive"])
