"""Optimizer, learning-rate warm-up, gradient clipping and EMA, all without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def make_adamw(
    params: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:  # fmt: skip
    """torch's fused AdamW, whose `found_inf` skips an update on the device."""
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def warmup_lr(iteration: int, lr: float, warmup: int) -> float:
    """lr, reached linearly over `warmup` iterations."""
    return lr * min(1.0, (iteration + 1) / warmup) if warmup > 0 else lr


@torch.no_grad()
def clip_grad_norm_(params: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scales gradients to a norm of at most max_norm (0: leaves them). Returns the norm before, a 0-d tensor."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def apply_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One optimizer step, or none at all where `finite` (0-d bool) is False: weights, moments and step count then
    keep their bits. No host sync: the fused kernel reads found_inf on the device."""
    found: Any = optimizer
    found.found_inf = (~finite).float().reshape(())
    found.grad_scale = None
    optimizer.step()
    del found.found_inf, found.grad_scale


class Ema:
    """Exponential moving average of parameters, fp32, started from their present values."""

    def __init__(self, params: Sequence[Tensor], decay: float):
        self.decay = decay
        self.shadow = [p.detach().float().clone() for p in params]

    @torch.no_grad()
    def update(self, params: Sequence[Tensor]) -> None:
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in params], 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, params: Sequence[Tensor]) -> None:
        for p, s in zip(params, self.shadow, strict=True):
            p.copy_(s)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(saved)
