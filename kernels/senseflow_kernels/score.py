"""The DMD score gradient: CFG, prediction -> x0, difference, normaliser and loss, emitted directly.

With x the student's x0 and x_t = alpha x + sigma eps (paper.md 1.1, as in DMD2):

    g = (x0_fake - x0_real) / mean_{C,H,W} |x - x0_real|,   L = 0.5 mean(g^2),   dL/dx = g / numel(x)

No pseudo-target x - g is ever stored: in bf16 that alone loses 17 % of g.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NORMALISERS = ("sample", "batch")
PARAMETERIZATIONS = ("flow", "epsilon")


class ScoreGradient(NamedTuple):
    """grad: fp32 [B, ...]; loss: fp32 scalar; normaliser: fp32 [B]."""

    grad: Tensor
    loss: Tensor
    normaliser: Tensor


class DMDLoss(NamedTuple):
    """loss: fp32 scalar, differentiable in x; normaliser: fp32 [B]; grad_rms: fp32 [B], rms of g per sample."""

    loss: Tensor
    normaliser: Tensor
    grad_rms: Tensor


def _check(x, x_t, fake, cond, uncond, sigma, alpha, guidance, parameterization, normaliser):
    for name, t in (("x_t", x_t), ("fake", fake), ("cond", cond), ("uncond", uncond)):
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, x has {tuple(x.shape)}")
    for name, s in (("sigma", sigma), ("alpha", alpha), ("guidance", guidance)):
        if s is not None and s.shape != x.shape[:1]:
            raise ValueError(f"{name} must have shape [{x.shape[0]}], got {list(s.shape)}")
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization must be one of {PARAMETERIZATIONS}, got {parameterization!r}")
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {NORMALISERS}, got {normaliser!r}")
    if parameterization == "epsilon" and alpha is None:
        raise ValueError("parameterization 'epsilon' needs alpha")
    if uncond is not None and guidance is None:
        raise ValueError("uncond needs guidance")


@torch.no_grad()
def score_gradient(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor | None = None, *,
    sigma: Tensor, alpha: Tensor | None = None, guidance: Tensor | None = None,
    parameterization: str = "flow", normaliser: str = "sample", eps: float = 0.0,
) -> ScoreGradient:  # fmt: skip
    """The gradient g above, its loss and its normaliser; arithmetic in fp32 (fp64 for fp64 inputs).

    x: student's x0 [B, ...]; x_t: its noised form; fake, cond, uncond: predictions of the fake network and of the
    teacher, of x's shape, any floating dtype; sigma, alpha, guidance: [B]. Without uncond the teacher's cond is
    used as it is. normaliser: mean per sample (DMD2) or over the batch; eps is added to it. NaN -> 0 and inf -> the
    largest finite value, as DMD2's nan_to_num. Raises ValueError for other shapes or names.
    """
    _check(x, x_t, fake, cond, uncond, sigma, alpha, guidance, parameterization, normaliser)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def column(s: Tensor) -> Tensor:
        return s.to(dtype).view(-1, *[1] * (x.dim() - 1))

    x, x_t, fake, cond = (t.to(dtype) for t in (x, x_t, fake, cond))
    if uncond is not None:
        assert guidance is not None
        u = uncond.to(dtype)
        cond = u + column(guidance) * (cond - u)
    # x0 = x_t - sigma v, or (x_t - sigma eps) / alpha: in both x0_fake - x0_real = scale (real - fake)
    scale = column(sigma)
    real = x_t - scale * cond
    if parameterization == "epsilon":
        assert alpha is not None
        scale = scale / column(alpha)
        real = real / column(alpha)
    dims = tuple(range(1, x.dim()))
    norm = (x - real).abs().mean(dims)
    if normaliser == "batch":
        norm = norm.mean().expand_as(norm).clone()
    grad = torch.nan_to_num(scale * (cond - fake) / column(norm + eps))
    return ScoreGradient(grad, 0.5 * grad.square().mean(), norm)


class _DMDLoss(torch.autograd.Function):
    """loss with dL/dx = g / numel(x); g is kept, not a target."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dtype = x.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return (grad * (dloss / grad.numel())).to(ctx.dtype), None, None


def dmd_loss(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor | None = None, *,
    sigma: Tensor, alpha: Tensor | None = None, guidance: Tensor | None = None,
    parameterization: str = "flow", normaliser: str = "sample", eps: float = 0.0,
) -> DMDLoss:  # fmt: skip
    """L_DMD of `score_gradient`, differentiable in x alone. Arguments and errors as there."""
    g = score_gradient(
        x, x_t, fake, cond, uncond, sigma=sigma, alpha=alpha, guidance=guidance,
        parameterization=parameterization, normaliser=normaliser, eps=eps,
    )  # fmt: skip
    loss: Any = _DMDLoss.apply(x, g.grad, g.loss)
    rms = g.grad.square().mean(tuple(range(1, x.dim()))).sqrt()
    return DMDLoss(loss, g.normaliser, rms)
