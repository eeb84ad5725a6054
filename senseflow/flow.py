"""Noise schedules: alpha, sigma, shift, anchors, and the ways between x_t, x0 and a network's prediction.

Flow: x_t = (1 - sigma) x0 + sigma eps, the network predicts v = eps - x0.
Epsilon: x_t = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, the network predicts eps.
sigma and alpha are fp32 [B]; x is [B, C, H, W].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

STEPS = (1, 2, 4, 8)
CPU = torch.device("cpu")
RELEASED_FLUX = {4: [1.0, 0.904, 0.759, 0.512]}  # integers / 1000, as released for FLUX


def bcast(s: Tensor, x: Tensor) -> Tensor:
    """s [B] shaped to multiply x [B, ...]."""
    return s.to(x.device).view(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow. `linear` shift s: s u / (1 + (s-1) u) (SD3); `exponential` shift mu:
    e^mu / (e^mu + 1/u - 1) (FLUX)."""

    shift: float = 1.0
    kind: Literal["linear", "exponential"] = "linear"
    parameterization = "flow"

    def _ratio(self) -> float:
        return math.exp(self.shift) if self.kind == "exponential" else self.shift

    def sigma(self, u: Tensor) -> Tensor:
        """Shifted sigma of u in [0, 1], same shape and dtype. sigma(0) = 0 and sigma(1) = 1."""
        s = self._ratio()
        return s * u / (1 + (s - 1) * u)

    def unshift(self, sigma: Tensor) -> Tensor:
        """u in [0, 1] with sigma(u) = sigma, same shape and dtype."""
        s = self._ratio()
        return sigma / (s - (s - 1) * sigma)

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def timestep(self, sigma: Tensor) -> Tensor:
        """What diffusers' flow transformers take as time: 1000 sigma."""
        return sigma * 1000

    def anchors(self, steps: int, released: bool = False) -> list[float]:
        """The student's sigmas, descending: u = 1, (K-1)/K, ..., 1/K, shifted. Raises ValueError for another K."""
        if steps not in STEPS:
            raise ValueError(f"steps must be one of {STEPS}, got {steps}")
        if released and self.kind == "exponential" and steps in RELEASED_FLUX:
            return list(RELEASED_FLUX[steps])
        u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        return self.sigma(u).tolist()


@lru_cache
def constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of the host as a tensor of the device, copied there once: each such copy makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache
def _sdxl_alpha_bar(device: torch.device = CPU) -> Tensor:
    """alpha_bar, fp64 [1000]: SDXL's scaled-linear betas .00085 to .012; computed on the host, kept on each device."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device=CPU) ** 2
    return torch.cumprod(1 - betas, 0).to(device)


@dataclass(frozen=True)
class DiffusionSchedule:
    """SDXL's variance-preserving schedule; sigma = sqrt(1 - alpha_bar), alpha = sqrt(alpha_bar)."""

    parameterization = "epsilon"

    def sigma(self, u: Tensor) -> Tensor:
        """sigma at index floor(1000 u) of the table, u in [0, 1]."""
        index = (u * 1000 + 1e-3).long().clamp(0, 999)  # an fp32 u of 0.249 must not fall to 248
        return (1 - _sdxl_alpha_bar(u.device)[index]).sqrt().to(u.dtype)

    def unshift(self, sigma: Tensor) -> Tensor:
        """u in [0, 1): the index over 1000 whose table entry is nearest, 0 for sigma 0."""
        return (self.timestep(sigma) / 1000).to(sigma.dtype)

    def alpha(self, sigma: Tensor) -> Tensor:
        return (1 - sigma.double().square()).clamp_min(0).sqrt().to(sigma.dtype)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Index int64 of the table whose sigma is nearest."""
        table = (1 - _sdxl_alpha_bar(sigma.device)).sqrt()
        right = torch.searchsorted(table, sigma.double()).clamp(1, 999)
        left_is_nearer = sigma.double() - table[right - 1] < table[right] - sigma.double()
        return torch.where(left_is_nearer, right - 1, right)

    def anchors(self, steps: int, released: bool = False) -> list[float]:
        """sigmas at timesteps 1000 j / K - 1, descending: 999, 749, 499, 249 for four."""
        if steps not in STEPS:
            raise ValueError(f"steps must be one of {STEPS}, got {steps}")
        table = (1 - _sdxl_alpha_bar()).sqrt()
        return [float(table[1000 * j // steps - 1]) for j in range(steps, 0, -1)]


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor, alpha: Tensor | None = None) -> Tensor:
    """x_t = alpha x0 + sigma noise; alpha = 1 - sigma when not given."""
    alpha = 1 - sigma if alpha is None else alpha
    return bcast(alpha, x0) * x0 + bcast(sigma, x0) * noise


def velocity_to_x0(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma v."""
    return x_t - bcast(sigma, x_t) * velocity


def eps_to_x0(x_t: Tensor, eps: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """x0 = (x_t - sigma eps) / alpha."""
    return (x_t - bcast(sigma, x_t) * eps) / bcast(alpha, x_t)


def prediction_to_x0(x_t: Tensor, pred: Tensor, sigma: Tensor, alpha: Tensor, parameterization: str) -> Tensor:
    """x0 from a prediction of either kind."""
    if parameterization == "flow":
        return velocity_to_x0(x_t, pred, sigma)
    return eps_to_x0(x_t, pred, sigma, alpha)


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next = x + (sigma_next - sigma) v."""
    return x + bcast(sigma_next - sigma, x) * velocity


def cfg(cond: Tensor, uncond: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance: uncond + w (cond - uncond), guidance fp32 [B]."""
    return uncond + bcast(guidance, cond) * (cond - uncond)


def omega(sigma: Tensor, law: str, schedule: Any) -> Tensor:
    """Weight of the adversarial terms, fp32 [B], at the student's anchor sigma (paper.md 1.6).

    `paper`: alpha^2. `released-sdxl`: alpha. `one`: 1. `released-sd35`: the released code reads the shifted table from
    its other end, sigma(1 - u + .001)^2 for the anchor sigma(u): .811, .564, .251, 9e-6 at sigma .5, .75, .9, 1.
    Raises ValueError for another law, and for released-sd35 with a schedule that has no shift to read from.
    """
    alpha = schedule.alpha(sigma)
    if law == "paper":
        return alpha.square()
    if law == "released-sdxl":
        return alpha
    if law == "one":
        return torch.ones_like(sigma)
    if law == "released-sd35":
        if not isinstance(schedule, FlowSchedule):
            raise ValueError(
                "omega law released-sd35 reads a flow's shifted table; allowed here: paper, released-sdxl, one"
            )
        return schedule.sigma((1 - schedule.unshift(sigma) + 0.001).clamp(max=1)).square()
    raise ValueError(f"omega law must be paper, released-sd35, released-sdxl or one, got {law!r}")
