"""Implicit distribution alignment: phi <- lam phi + (1 - lam) theta, right after the student's step (1.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from senseflow_kernels import lerp_


def ida_update(phi: Sequence[Tensor], theta: Sequence[Tensor], lam: float | Tensor) -> None:
    """Moves the fake network's parameters towards the student's, matched by position; fp32, one rounding."""
    lerp_(phi, theta, lam)


class AdaptiveLambda:
    """lam by how far the fake lags: an option of ours, beyond the paper.

    The rms g of the normalised score difference is large while the fake has not caught up with the student. With m
    the running mean of g (decay .9, started at the first g) and m_0 its value after WARM updates:

        lam = 1 - (1 - lam0) clip(m / m_0, 1/4, 4), kept in [0, 1]

    so a fake that lags is pulled harder, one that keeps up less; during the first WARM updates lam = lam0. A g that
    is not finite is left out: the student's step is skipped for it too, and one such number in m would stay there
    and reach phi through lam. Everything stays on the device.
    """

    WARM, DECAY = 5, 0.9

    def __init__(self, lam0: float):
        self.lam0 = lam0
        self.mean: Tensor | None = None
        self.reference: Tensor | None = None
        self.updates = 0

    def update(self, gap: Tensor) -> Tensor:
        """gap: 0-d tensor, the mean rms of g this iteration. Returns lam, 0-d."""
        gap = gap.detach().float()
        if self.mean is None or self.reference is None:
            self.mean = self.reference = torch.full_like(gap, torch.nan)  # nan: no finite g seen yet
        mean, reference = self.mean.to(gap.device), self.reference.to(gap.device)
        start = torch.where(mean.isfinite(), mean, gap)
        self.mean = torch.where(gap.isfinite(), torch.lerp(gap, start, self.DECAY), mean)
        self.updates += 1
        # a reference still nan after WARM updates is the first finite mean instead
        warm = torch.full_like(gap, self.updates <= self.WARM, dtype=torch.bool)
        self.reference = torch.where(warm | ~reference.isfinite(), self.mean, reference)
        ratio = (self.mean / self.reference.clamp_min(1e-12)).nan_to_num(nan=1.0).clamp(0.25, 4.0)
        return (1 - (1 - self.lam0) * ratio).clamp(0.0, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return dict(mean=self.mean, reference=self.reference, updates=self.updates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.reference = state["mean"], state["reference"]
        self.updates = state["updates"]
