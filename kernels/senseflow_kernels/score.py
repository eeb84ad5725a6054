"""The DMD score gradient: CFG, prediction -> x0, difference, normaliser and loss, emitted directly.

With x the student's x0 and x_t = alpha x + sigma eps (paper.md 1.1, as in DMD2):

    g = (x0_fake - x0_real) / mean_{C,H,W} |x - x0_real|,   L = 0.5 mean(g^2),   dL/dx = g / numel(x)

No pseudo-target x - g is ever stored: in bf16 that alone loses 17 % of g. On a GPU the forward is one launch that
reads its inputs once and writes the unnormalised difference; the backward is one more, which applies the scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from senseflow_kernels._launch import (
    INTERPRET,
    blocks_of,
    finite,
    fused,
    jit,
    last_block,
    launch,
    power_of_2,
    rounded,
    ticket,
    tl,
    total,
    traced,
)

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
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x must be [B, ...] and not empty, got shape {tuple(x.shape)}")
    samples = (("x", x), ("x_t", x_t), ("fake", fake), ("cond", cond), ("uncond", uncond))
    scalars = (("sigma", sigma), ("alpha", alpha), ("guidance", guidance))
    for name, t in samples:
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, x has {tuple(x.shape)}")
    for name, s in scalars:
        if s is None and name != "sigma":
            continue
        if not isinstance(s, Tensor) or s.shape != x.shape[:1]:
            found = list(s.shape) if isinstance(s, Tensor) else s
            raise ValueError(f"{name} must have shape [{x.shape[0]}], got {found}")
    for name, t in samples + scalars:
        if t is None:
            continue
        if not t.is_floating_point():
            raise ValueError(f"{name} is {t.dtype}: allowed are floating dtypes")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}")
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization must be one of {PARAMETERIZATIONS}, got {parameterization!r}")
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {NORMALISERS}, got {normaliser!r}")
    if parameterization == "epsilon" and alpha is None:
        raise ValueError("parameterization 'epsilon' needs alpha")
    if uncond is not None and guidance is None:
        raise ValueError("uncond needs guidance")


# -- torch reference -----------------------------------------------------------------------------------------------


@torch.no_grad()
def score_gradient_reference(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor | None, sigma: Tensor, alpha: Tensor | None,
    guidance: Tensor | None, parameterization: str, normaliser: str, eps: float,
) -> ScoreGradient:  # fmt: skip
    """The formula in plain torch: fp32 arithmetic, fp64 where x is fp64."""
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
    norm = (x - real).abs().flatten(1).mean(1)
    if normaliser == "batch":
        norm = norm.mean().expand_as(norm).clone()
    grad = torch.nan_to_num(scale * (cond - fake) / column(norm + eps))
    return ScoreGradient(grad, 0.5 * grad.square().mean(), norm)


# -- kernels -------------------------------------------------------------------------------------------------------

BLOCK = 2048  # elements a program reads at a time: at b = 1, 16x128x128 that is 128 programs on 132 SMs
MAX_BLOCKS = 1024  # programs a sample: what the last one can reduce at once; beyond, a program takes several tiles


@jit
def _forward_kernel(
    x_ptr, xt_ptr, fake_ptr, cond_ptr, uncond_ptr, sigma_ptr, alpha_ptr, guidance_ptr,
    diff_ptr, partial_ptr, norm_ptr, rms_ptr, loss_ptr, counter_ptr,
    n, count, batch, tiles, eps,
    EPSILON: tl.constexpr, PER_BATCH: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """diff = scale (cfg - fake); per block: sum |x - x0_real|, m = max |diff| and sum (diff / m)^2 (no overflow)."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    # python floats stay fp64 in the interpreter of Triton 3.6
    count, eps = tl.cast(count, tl.float32), tl.cast(eps, tl.float32)
    sigma = tl.load(sigma_ptr + b)
    scale = sigma
    if EPSILON:
        alpha = tl.load(alpha_ptr + b)
        scale = tl.div_rn(sigma, alpha)
    distance, top, squares = 0.0, 1e-30, 0.0
    tile = tl.cast(0, tl.int32)
    while tile < tiles:  # not range(): Triton 3.6's interpreter cannot take a tensor there with NumPy 2.4
        offset = (tile * blocks + block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < n
        at = b * n + offset
        x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        x_t = tl.load(xt_ptr + at, mask, other=0.0).to(tl.float32)
        fake = tl.load(fake_ptr + at, mask, other=0.0).to(tl.float32)
        cond = tl.load(cond_ptr + at, mask, other=0.0).to(tl.float32)
        if uncond_ptr is not None:
            uncond = tl.load(uncond_ptr + at, mask, other=0.0).to(tl.float32)
            cond = uncond + tl.load(guidance_ptr + b) * (cond - uncond)
        real = x_t - sigma * cond
        if EPSILON:
            real = tl.div_rn(real, tl.full([BLOCK], 1.0, tl.float32) * alpha)
        diff = scale * (cond - fake)
        tl.store(diff_ptr + at, diff, mask)
        distance += total(tl.where(mask, tl.abs(x - real), 0.0))
        size = tl.where(mask & (diff == diff), tl.abs(diff), 0.0)  # NaN counts 0, as nan_to_num makes it
        new_top = tl.maximum(top, tl.minimum(tl.max(size), 3.4028234663852886e38))
        share = size / new_top
        squares = squares * (top / new_top) * (top / new_top) + total(share * share)
        top = new_top
        tile += 1
    slot = b * blocks + block
    plane = tl.num_programs(1).to(tl.int64) * blocks
    tl.store(partial_ptr + slot, distance)
    tl.store(partial_ptr + plane + slot, top)
    tl.store(partial_ptr + 2 * plane + slot, squares)
    if last_block(counter_ptr, blocks * tl.num_programs(1)):
        _finish(partial_ptr, norm_ptr, rms_ptr, loss_ptr, count, batch, blocks, plane, eps, PER_BATCH, SLOTS)


@jit
def _finish(
    partial_ptr, norm_ptr, rms_ptr, loss_ptr, count, batch, blocks, plane, eps,
    PER_BATCH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """From the partials alone: normaliser, rms of g and the loss, always summed in the same order.

    div_rn: a plain `/` of fp32 is off by two ulps on a GPU, which the loss would take several times over.
    """
    slots = tl.arange(0, SLOTS)
    keep = slots < blocks
    samples = tl.cast(batch, tl.float32)
    mean = 0.0
    if PER_BATCH:
        at = partial_ptr + slots
        i = tl.cast(0, tl.int32)
        while i < batch:
            mean += tl.div_rn(total(tl.load(at, keep, other=0.0, cache_modifier=".cg")), count)
            at += blocks
            i += 1
        mean = tl.div_rn(mean, samples)
    loss = 0.0
    at = partial_ptr + slots
    i = tl.cast(0, tl.int32)
    while i < batch:
        norm = tl.div_rn(total(tl.load(at, keep, other=0.0, cache_modifier=".cg")), count)
        if PER_BATCH:
            norm = mean
        tl.store(norm_ptr + i, norm)
        below = norm + eps
        top = tl.load(at + plane, keep, other=0.0, cache_modifier=".cg")
        squares = tl.load(at + 2 * plane, keep, other=0.0, cache_modifier=".cg")
        ratio = tl.div_rn(top, tl.full([SLOTS], 1.0, tl.float32) * below)
        part = total(tl.where(squares == 0.0, 0.0, squares * ratio * ratio))
        # nan_to_num(diff / NaN) and diff / inf are 0 everywhere
        part = tl.where((below != below) | (below == float("inf")), 0.0, part)
        part = tl.div_rn(part, count)
        tl.store(rms_ptr + i, tl.sqrt_rn(part))
        loss += part
        at += blocks
        i += 1
    tl.store(loss_ptr, tl.div_rn(0.5 * loss, samples))


@jit
def _backward_kernel(
    diff_ptr, norm_ptr, dloss_ptr, dx_ptr, n, numel, eps,
    LOSS: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """dx = nan_to_num(diff / (norm + eps)) * dloss / numel, rounded once; without LOSS g itself."""
    b = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < n
    below = tl.full([BLOCK], 1.0, tl.float32) * (tl.load(norm_ptr + b) + tl.cast(eps, tl.float32))
    g = finite(tl.div_rn(tl.load(diff_ptr + b * n + offset, mask, other=0.0), below))
    if LOSS:
        g = g * tl.div_rn(tl.load(dloss_ptr).to(tl.float32), tl.cast(numel, tl.float32))
    tl.store(dx_ptr + b * n + offset, rounded(g, dx_ptr.dtype.element_ty, EMULATE), mask)


# -- registration --------------------------------------------------------------------------------------------------


def _forward(x, x_t, fake, cond, uncond, sigma, alpha, guidance, epsilon: bool, per_batch: bool, eps: float):
    """(diff fp32 like x, normaliser [B], rms [B], loss []): the launch, or the same four from the reference."""
    if not fused("dmd_loss", x, x_t, fake, cond, uncond):
        args = (x, x_t, fake, cond, uncond, sigma, alpha, guidance)
        names = ("epsilon" if epsilon else "flow", "batch" if per_batch else "sample")
        grad, loss, norm = score_gradient_reference(*args, *names, eps)
        return grad, norm, grad.square().flatten(1).mean(1).sqrt(), loss
    x, x_t, fake, cond = (t.contiguous() for t in (x, x_t, fake, cond))
    uncond = None if uncond is None else uncond.contiguous()
    sigma, alpha, guidance = (None if s is None else s.float().contiguous() for s in (sigma, alpha, guidance))
    batch, n = len(x), x[0].numel()
    tiles = blocks_of(n, BLOCK * MAX_BLOCKS)
    blocks = blocks_of(n, BLOCK * tiles)
    diff = torch.empty_like(x, dtype=torch.float32)
    partial = diff.new_empty(3 * batch * blocks)
    norm, rms, loss = diff.new_empty(batch), diff.new_empty(batch), diff.new_empty(())
    launch(
        "dmd_loss", _forward_kernel, (blocks, batch),
        x, x_t, fake, cond, uncond, sigma, alpha, guidance, diff, partial, norm, rms, loss, ticket(x.device),
        n, float(n), batch, tiles, eps,
        EPSILON=epsilon, PER_BATCH=per_batch, BLOCK=BLOCK, SLOTS=power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return diff, norm, rms, loss


def _scaled(diff: Tensor, norm: Tensor, dloss: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """dL/dx in dtype, or g itself where dloss is None, from what _forward's launch wrote."""
    dx = torch.empty_like(diff, dtype=dtype)
    n = diff[0].numel()
    launch(
        "dmd_loss_backward", _backward_kernel, (blocks_of(n, BLOCK), len(diff)),
        diff, norm, dloss, dx, n, float(diff.numel()), eps,
        LOSS=dloss is not None, BLOCK=BLOCK, EMULATE=INTERPRET, num_warps=4,
    )  # fmt: skip
    return dx


def _backward(diff: Tensor, norm: Tensor, dloss: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if fused("dmd_loss", diff):
        return _scaled(diff, norm, dloss, eps, dtype)
    return (diff * (dloss / diff.numel())).to(dtype)  # the reference's diff is g already


class _DMDLoss(torch.autograd.Function):
    """The eager path: no dispatcher between Python and the launch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any):
        diff, norm, rms, loss = _forward(x, *rest)
        ctx.save_for_backward(diff, norm)
        ctx.eps, ctx.dtype = rest[-1], x.dtype
        ctx.mark_non_differentiable(norm, rms)
        return loss, norm, rms

    @staticmethod
    @once_differentiable  # g is a constant, so another derivative would be wrong rather than missing
    def backward(ctx: Any, dloss: Tensor, *_: Any):  # type: ignore[override]
        diff, norm = ctx.saved_tensors
        return _backward(diff, norm, dloss, ctx.eps, ctx.dtype), *[None] * 10


@torch.library.custom_op("senseflow::dmd_loss", mutates_args=())
def _op(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor | None, sigma: Tensor, alpha: Tensor | None,
    guidance: Tensor | None, epsilon: bool, per_batch: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(x, x_t, fake, cond, uncond, sigma, alpha, guidance, epsilon, per_batch, eps)


@_op.register_fake
def _(x, x_t, fake, cond, uncond, sigma, alpha, guidance, epsilon, per_batch, eps):
    fp = torch.float64 if x.dtype == torch.float64 else torch.float32
    diff = torch.empty(x.shape, dtype=fp, device=x.device)
    return diff, diff.new_empty(len(x)), diff.new_empty(len(x)), diff.new_empty(())


@torch.library.custom_op("senseflow::dmd_loss_backward", mutates_args=())
def _op_backward(diff: Tensor, norm: Tensor, dloss: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return _backward(diff, norm, dloss, eps, dtype)


@_op_backward.register_fake
def _(diff, norm, dloss, eps, dtype):
    return torch.empty_like(diff, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[0], output[1])
    ctx.eps, ctx.dtype = inputs[-1], inputs[0].dtype


def _op_autograd(ctx: Any, _diff, _norm, _rms, dloss: Tensor):
    diff, norm = ctx.saved_tensors
    return _op_backward(diff, norm, dloss, ctx.eps, ctx.dtype), *[None] * 10


_op.register_autograd(_op_autograd, setup_context=_setup_context)


def _gradient(x, x_t, fake, cond, uncond, sigma, alpha, guidance, epsilon: bool, per_batch: bool, eps: float):
    """(g, loss, normaliser): the launch and the one that scales, or the reference."""
    args = (x, x_t, fake, cond, uncond, sigma, alpha, guidance)
    if not fused("score_gradient", x, x_t, fake, cond, uncond):
        names = ("epsilon" if epsilon else "flow", "batch" if per_batch else "sample")
        return score_gradient_reference(*args, *names, eps)
    diff, norm, _, loss = _forward(*args, epsilon, per_batch, eps)
    return _scaled(diff, norm, None, eps, torch.float32), loss, norm


@torch.library.custom_op("senseflow::score_gradient", mutates_args=())
def _op_gradient(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor | None, sigma: Tensor, alpha: Tensor | None,
    guidance: Tensor | None, epsilon: bool, per_batch: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradient(x, x_t, fake, cond, uncond, sigma, alpha, guidance, epsilon, per_batch, eps)


@_op_gradient.register_fake
def _(x, x_t, fake, cond, uncond, sigma, alpha, guidance, epsilon, per_batch, eps):
    fp = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad = torch.empty(x.shape, dtype=fp, device=x.device)
    return grad, grad.new_empty(()), grad.new_empty(len(x))


# -- public --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_gradient(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor | None = None, *,
    sigma: Tensor, alpha: Tensor | None = None, guidance: Tensor | None = None,
    parameterization: str = "flow", normaliser: str = "sample", eps: float = 0.0,
) -> ScoreGradient:  # fmt: skip
    """The gradient g above, its loss and its normaliser; arithmetic in fp32 (fp64 for fp64 inputs).

    x: student's x0 [B, ...]; x_t: its noised form; fake, cond, uncond: predictions of the fake network and of the
    teacher, of x's shape, any floating dtype; sigma, alpha (of `epsilon` alone), guidance: [B]. Without uncond the
    teacher's cond is used as it is, whatever guidance. normaliser: mean per sample (DMD2) or over the batch; eps is
    added to it. NaN -> 0 and inf -> the largest finite value, as DMD2's nan_to_num. Non-contiguous inputs are copied.
    Raises ValueError, naming the argument, for other shapes, dtypes, devices or names.
    """
    _check(x, x_t, fake, cond, uncond, sigma, alpha, guidance, parameterization, normaliser)
    run = _op_gradient if torch.compiler.is_compiling() else _gradient
    names = (parameterization == "epsilon", normaliser == "batch", eps)
    return ScoreGradient(*run(x, x_t, fake, cond, uncond, sigma, alpha, guidance, *names))


def dmd_loss(
    x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor | None = None, *,
    sigma: Tensor, alpha: Tensor | None = None, guidance: Tensor | None = None,
    parameterization: str = "flow", normaliser: str = "sample", eps: float = 0.0,
) -> DMDLoss:  # fmt: skip
    """L_DMD of `score_gradient`, differentiable once and in x alone. Arguments and errors as there."""
    _check(x, x_t, fake, cond, uncond, sigma, alpha, guidance, parameterization, normaliser)
    constants = [None if t is None else t.detach() for t in (x_t, fake, cond, uncond, sigma, alpha, guidance)]
    args = (*constants, parameterization == "epsilon", normaliser == "batch", eps)
    if traced(x):
        _, norm, rms, loss = _op(x, *args)
    else:
        loss, norm, rms = _DMDLoss.apply(x, *args)  # type: ignore[misc]
    return DMDLoss(loss, norm, rms)
