"""Intra-segment guidance (Eq. 12, paper.md 1.4): the student's one step to the next anchor against a guided half-step
of the teacher followed by the student's own half-step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.algo.dmd import teacher_predictions
from senseflow.flow import add_noise, bcast, cfg, euler_step, prediction_to_x0
from senseflow.models.adapter import Adapter, Condition

CHARBONNIER_C = 1e-3  # as released


def move(adapter: Adapter, x: Tensor, pred: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next, deterministically: an Euler step for flow, DDIM from (x0, eps) for epsilon."""
    if adapter.parameterization == "flow":
        return euler_step(x, pred, sigma, sigma_next)
    alpha, alpha_next = adapter.schedule.alpha(sigma), adapter.schedule.alpha(sigma_next)
    x0 = prediction_to_x0(x, pred, sigma, alpha, "epsilon")
    return bcast(alpha_next, x) * x0 + bcast(sigma_next, x) * pred


def isg_term(
    adapter: Adapter, x_tau: Tensor, pred_student: Tensor, sigma_tau: Tensor, sigma_prev: Tensor,
    sigma_mid: Tensor, cond: Condition, student: nn.Module, teacher: nn.Module,
    guidance: Tensor | None, uncond: Condition | None, loss: str = "charbonnier",
) -> Tensor:  # fmt: skip
    """L_ISG, an fp32 scalar. The gradient goes through pred_student alone, the prediction of the DMD forward.

    x_mid = teacher step from tau to mid; x_tar = student step from mid to tau_prev (both without gradient);
    x_direct = student step from tau to tau_prev. `charbonnier`: mean(sqrt(d^2 + c^2) - c), c = 1e-3; `l2`: mean d^2.
    x [B, C, H, W]; sigmas and guidance fp32 [B]. Raises ValueError for another loss.
    """
    with torch.no_grad():
        v, v_uncond = teacher_predictions(adapter, teacher, x_tau, sigma_tau, cond, guidance, uncond)
        if v_uncond is not None:
            assert guidance is not None
            v = cfg(v, v_uncond, guidance)
        x_mid = move(adapter, x_tau, v, sigma_tau, sigma_mid)
        v_mid = adapter.predict(student, x_mid, sigma_mid, cond)
        x_tar = move(adapter, x_mid, v_mid, sigma_mid, sigma_prev)
    x_direct = move(adapter, x_tau, pred_student, sigma_tau, sigma_prev)
    d = (x_direct - x_tar).float()
    if loss == "l2":
        return d.square().mean()
    if loss == "charbonnier":
        return ((d.square() + CHARBONNIER_C**2).sqrt() - CHARBONNIER_C).mean()
    raise ValueError(f"isg loss must be 'charbonnier' or 'l2', got {loss!r}")


def uniform_midpoint(u: Tensor, tau: Tensor, prev: Tensor, margin: float) -> Tensor:
    """t_mid fp32 [B], uniform in [prev + m, tau - m]; u in [0, 1). All in one space: sigma, or the unshifted index
    over 1000. A segment shorter than 2 m is halved instead."""
    m = torch.minimum(torch.full_like(tau, margin), (tau - prev) / 2)
    return prev + m + u * (tau - prev - 2 * m)


def midpoint_range(
    schedule: Any, sigma_tau: Tensor, sigma_prev: Tensor, margin: float, space: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(lowest, highest) t_mid, fp32 [B] each, in `space`: "sigma" as FLUX's release, "index" as SD 3.5's and SDXL's."""
    if space == "index":
        sigma_tau, sigma_prev = schedule.unshift(sigma_tau), schedule.unshift(sigma_prev)
    zero = torch.zeros_like(sigma_tau)
    low = uniform_midpoint(zero, sigma_tau, sigma_prev, margin)
    return low, uniform_midpoint(zero + 1, sigma_tau, sigma_prev, margin)


@dataclass(frozen=True)
class ErrorCurve:
    """xi(sigma) = E || x0_hat(x_sigma) - x0 ||^2 per element: sigmas [K] ascending, xi [K] >= 0."""

    sigmas: Tensor
    xi: Tensor


@torch.no_grad()
def measure_error_curve(
    adapter: Adapter, teacher: nn.Module, x0: Tensor, cond: Condition, noise: Tensor, sigmas: Tensor
) -> ErrorCurve:  # fmt: skip
    """The teacher's reconstruction error at sigmas [K] on x0 [B, C, H, W] with one noise each."""
    xi = []
    for sigma in sigmas:
        s = sigma.to(x0.device).float().expand(len(x0))
        alpha = adapter.schedule.alpha(s)
        x_t = add_noise(x0, noise, s, alpha)
        pred = adapter.predict(teacher, x_t, s, cond)
        x0_hat = prediction_to_x0(x_t, pred, s, alpha, adapter.parameterization)
        xi.append((x0_hat - x0).float().square().mean())
    return ErrorCurve(sigmas.to(x0.device).float(), torch.stack(xi))


def adaptive_midpoint(u: Tensor, low: Tensor, high: Tensor, curve: ErrorCurve, points: int = 64) -> Tensor:
    """sigma_mid fp32 [B] in [low, high] (sigmas) with density proportional to xi: the half-step lands where the teacher
    is least sure. Inverse of the piecewise-linear distribution on `points` nodes; flat xi: uniform."""
    grid = torch.linspace(0, 1, points, device=u.device)
    nodes = low[:, None] + grid * (high - low)[:, None]  # [B, points]
    right = torch.searchsorted(curve.sigmas, nodes.contiguous()).clamp(1, len(curve.sigmas) - 1)
    s0, s1 = curve.sigmas[right - 1], curve.sigmas[right]
    share = ((nodes - s0) / (s1 - s0)).clamp(0, 1)
    density = torch.lerp(curve.xi[right - 1], curve.xi[right], share) + 1e-12
    mass = (density[:, 1:] + density[:, :-1]) / 2
    cdf = torch.cat([torch.zeros_like(u)[:, None], mass.cumsum(1)], 1)
    cdf = cdf / cdf[:, -1:]
    cell = torch.searchsorted(cdf, u[:, None].contiguous(), right=True).clamp(1, points - 1)
    c0, c1 = cdf.gather(1, cell - 1), cdf.gather(1, cell)
    inside = ((u[:, None] - c0) / (c1 - c0).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(nodes.gather(1, cell - 1), nodes.gather(1, cell), inside).squeeze(1)
