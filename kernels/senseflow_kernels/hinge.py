"""Timestep-weighted hinge losses over any number of discriminator heads (paper.md 1.6).

    L_G = -mean_b omega_b mean_k D_bk
    L_D = mean_b omega_b mean_k max(0, 1 - D_bk(real)) + mean_b omega_b mean_k max(0, 1 + D_bk(fake))

k runs over all logits of all heads of a sample. On a GPU losses, gradients and statistics are one launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from senseflow_kernels._launch import blocks_of, fused, jit, last_block, launch, power_of_2, ticket, tl, total, traced


class HingeD(NamedTuple):
    """loss: fp32 scalar with gradients; the rest fp32 scalars without: mean logits, share of right signs."""

    loss: Tensor
    real_mean: Tensor
    fake_mean: Tensor
    accuracy: Tensor


def _heads(logits: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(logits, Tensor):
        raise ValueError(f"logits must be a list of heads, got one tensor of shape {list(logits.shape)}")
    return list(logits)


def _constant(weight: Any) -> Any:
    return weight.detach() if isinstance(weight, Tensor) else weight


def _check(real: list[Tensor], fake: list[Tensor], weight: Tensor | None) -> None:
    heads = real + fake
    if not heads:
        raise ValueError("no heads: logits must hold at least one tensor")
    if any(t.dim() == 0 or not t.is_floating_point() for t in heads):
        raise ValueError(f"heads must be [B, ...] of a floating dtype, got {[(*t.shape, t.dtype) for t in heads]}")
    if len({len(t) for t in heads}) != 1:
        raise ValueError(f"heads have different batches: {[len(t) for t in heads]}")
    if not sum(t.numel() for t in heads):
        raise ValueError("every head is empty")
    if real and fake and sum(t.numel() for t in real) != sum(t.numel() for t in fake):
        raise ValueError("real and fake have different numbers of logits")
    batch = len(heads[0])
    if weight is not None and (not isinstance(weight, Tensor) or tuple(weight.shape) != (batch,)):
        found = list(weight.shape) if isinstance(weight, Tensor) else weight
        raise ValueError(f"weight must have shape [{batch}], got {found}")
    devices = [t.device for t in heads] + ([] if weight is None else [weight.device])
    if len({*devices}) != 1:
        raise ValueError(f"heads and weight are on different devices: {sorted({str(d) for d in devices})}")


# -- torch reference -----------------------------------------------------------------------------------------------


def _joined(logits: Sequence[Tensor]) -> Tensor:
    """fp32 [B, all logits] (fp64 for fp64 heads)."""
    flat = torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in logits], 1)
    return flat if flat.dtype == torch.float64 else flat.float()


def hinge_generator_reference(logits: Sequence[Tensor], weight: Tensor | None) -> Tensor:
    joined = _joined(logits)
    mean = joined.mean(1)
    return -(mean if weight is None else weight.to(joined.dtype) * mean).mean()


def hinge_discriminator_reference(real: Sequence[Tensor], fake: Sequence[Tensor], weight: Tensor | None) -> HingeD:
    r, f = _joined(real), _joined(fake)
    per_sample = (1 - r).relu().mean(1) + (1 + f).relu().mean(1)
    loss = (per_sample if weight is None else weight.to(r.dtype) * per_sample).mean()
    with torch.no_grad():
        accuracy = 0.5 * ((r > 0).to(r.dtype).mean() + (f < 0).to(r.dtype).mean())
        return HingeD(loss, r.mean(), f.mean(), accuracy)


# -- kernel --------------------------------------------------------------------------------------------------------

BLOCK = 2048
MAX_BLOCKS = 256  # programs a sample and head; beyond, a program takes several tiles
SLOTS = 1024  # partial sums the last program reads at a time


@jit
def _kernel(
    heads, sizes, starts, weight_ptr, grad_ptr, partial_ptr, loss_ptr, stats_ptr, counter_ptr, scale, count, tiles,
    HEADS: tl.constexpr, REALS: tl.constexpr, HINGE: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (block, b, head): loss, sum of logits and right signs of its part, and the gradient of every logit.

    heads: pointers, the REALS real ones first; sizes: logits a sample; starts: offset of each head in grad.
    """
    block, b, head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    blocks, programs = tl.num_programs(0), tl.num_programs(0) * tl.num_programs(1) * HEADS
    count, weight = tl.cast(count, tl.float32), tl.cast(scale, tl.float32)
    if weight_ptr is not None:
        weight = weight * tl.load(weight_ptr + b)
    loss, logits, right = 0.0, 0.0, 0.0
    for h in tl.static_range(HEADS):  # pyright: ignore[reportGeneralTypeIssues]
        if head == h:
            sign = 1.0 if h < REALS else -1.0
            tile = tl.cast(0, tl.int32)
            while tile < tiles:  # not range(): see score.py
                offset = (tile * blocks + block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                mask = offset < sizes[h]
                d = tl.load(heads[h] + b * sizes[h] + offset, mask, other=0.0).to(tl.float32)
                if HINGE:
                    gap = 1.0 - sign * d
                    on = mask & ((gap > 0) | (gap != gap))
                    # torch's relu: NaN stays NaN in the loss and lets the gradient through
                    loss += total(tl.where(on, gap, 0.0))
                    grad = tl.where(on, -sign * weight, 0.0)
                else:
                    loss -= total(tl.where(mask, d, 0.0))
                    grad = tl.full([BLOCK], 1.0, tl.float32) * -weight
                logits += total(tl.where(mask, d, 0.0))
                right += total((mask & (sign * d > 0)).to(tl.float32))
                tl.store(grad_ptr + starts[h] + b * sizes[h] + offset, grad, mask)
                tile += 1
    rows = tl.num_programs(1).to(tl.int64) * blocks  # partials of one head
    at = partial_ptr + head * rows + b * blocks + block
    tl.store(at, loss * weight)
    tl.store(at + HEADS * rows, logits)
    tl.store(at + 2 * HEADS * rows, right)
    if last_block(counter_ptr, programs):
        _finish(partial_ptr, loss_ptr, stats_ptr, rows, count, HEADS, REALS, SLOTS)


@jit
def _finish(
    partial_ptr, loss_ptr, stats_ptr, rows, count, HEADS: tl.constexpr, REALS: tl.constexpr, SLOTS: tl.constexpr
):
    """Loss; stats: mean real logit, mean fake logit, share of right signs. Summed in the same order every time."""
    loss, real, fake, right = 0.0, 0.0, 0.0, 0.0
    start = tl.cast(0, tl.int64)
    while start < HEADS * rows:
        at = start + tl.arange(0, SLOTS)
        keep = at < HEADS * rows
        loss += total(tl.load(partial_ptr + at, keep, other=0.0, cache_modifier=".cg"))
        sums = tl.load(partial_ptr + HEADS * rows + at, keep, other=0.0, cache_modifier=".cg")
        real += total(tl.where(at < REALS * rows, sums, 0.0))
        fake += total(tl.where(at < REALS * rows, 0.0, sums))
        right += total(tl.load(partial_ptr + 2 * HEADS * rows + at, keep, other=0.0, cache_modifier=".cg"))
        start += SLOTS
    tl.store(loss_ptr, loss)
    tl.store(stats_ptr, real / count)
    tl.store(stats_ptr + 1, fake / count)
    tl.store(stats_ptr + 2, right / (2 * count))


def _launch_hinge(real: list[Tensor], fake: list[Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    heads = [t.contiguous() for t in (*real, *fake) if t.numel()]
    batch = len(heads[0])
    sizes = [t.numel() // batch for t in heads]
    starts = [sum(sizes[:i]) * batch for i in range(len(sizes))]
    count = batch * (sum(sizes) // (2 if real else 1))  # logits of one side
    block = min(BLOCK, max(128, power_of_2(max(sizes))))
    tiles = blocks_of(max(sizes), block * MAX_BLOCKS)
    blocks = blocks_of(max(sizes), block * tiles)
    grad = torch.empty(sum(sizes) * batch, dtype=torch.float32, device=heads[0].device)
    partial = grad.new_empty(3 * len(heads) * batch * blocks)
    loss, stats = grad.new_empty(()), grad.new_empty(3)
    launch(
        "hinge", _kernel, (blocks, batch, len(heads)),
        tuple(heads), tuple(sizes), tuple(starts), None if weight is None else weight.float().contiguous(),
        grad, partial, loss, stats, ticket(grad.device), 1.0 / count, float(count), tiles,
        HEADS=len(heads), REALS=sum(t.numel() > 0 for t in real), HINGE=bool(real), BLOCK=block, SLOTS=SLOTS,
        num_warps=4,
    )  # fmt: skip
    return loss, stats, grad


# -- registration --------------------------------------------------------------------------------------------------


def _forward(real: list[Tensor], fake: list[Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss; stats [3]: mean real logit, mean fake logit, accuracy; gradients of all logits at dloss = 1, flat).

    fp32 (fp64 for fp64 heads). Without real heads the loss is the generator's, and stats say nothing of them.
    """
    if fused("hinge", *real, *fake):
        return _launch_hinge(real, fake, weight)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (*real, *fake)]
        if real:
            out = hinge_discriminator_reference(leaves[: len(real)], leaves[len(real) :], weight)
            loss, stats = out.loss, torch.stack(out[1:])
        else:
            loss, joined = hinge_generator_reference(leaves, weight), _joined(leaves).detach()
            right = 0.5 * (joined < 0).to(joined.dtype).mean()
            stats = torch.stack([torch.zeros_like(right), joined.mean(), right])
        grads = torch.autograd.grad(loss, leaves)
    return loss.detach(), stats, torch.cat([g.flatten().to(loss.dtype) for g in grads])


def _backward(grad: Tensor, dloss: Tensor, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """dL/dlogits of every head in its own dtype: one multiply over all of them, rounded once; linear in dloss."""
    if len(set(dtypes)) == 1 and not dloss.requires_grad:
        scaled = torch.empty_like(grad, dtype=dtypes[0])
        torch.mul(grad, dloss, out=scaled)
    else:
        scaled = grad * dloss
    parts = scaled.split([shape.numel() for shape in shapes])
    return [p.view(shape).to(dtype) for p, shape, dtype in zip(parts, shapes, dtypes, strict=True)]


class _Hinge(torch.autograd.Function):
    """The eager path: no dispatcher between Python and the launch. heads: the real ones first."""

    @staticmethod
    def forward(ctx: Any, reals: int, weight: Tensor | None, *heads: Tensor):
        loss, stats, grad = _forward(list(heads[:reals]), list(heads[reals:]), weight)
        ctx.save_for_backward(grad)
        ctx.shapes, ctx.dtypes = [t.shape for t in heads], [t.dtype for t in heads]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Any):  # type: ignore[override]
        return None, None, *_backward(ctx.saved_tensors[0], dloss, ctx.shapes, ctx.dtypes)


@torch.library.custom_op("senseflow::hinge", mutates_args=())
def _op(real: Sequence[Tensor], fake: Sequence[Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(list(real), list(fake), weight)


@_op.register_fake
def _(real, fake, weight):
    heads = [*real, *fake]
    fp = torch.float64 if heads[0].dtype == torch.float64 else torch.float32
    grad = heads[0].new_empty(sum(t.numel() for t in heads), dtype=fp)
    return grad.new_empty(()), grad.new_empty(3), grad


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    heads = [*inputs[0], *inputs[1]]
    ctx.save_for_backward(output[2])
    ctx.reals, ctx.shapes, ctx.dtypes = len(inputs[0]), [t.shape for t in heads], [t.dtype for t in heads]


def _op_autograd(ctx: Any, dloss: Tensor, _stats, _grad):
    scaled = (ctx.saved_tensors[0] * dloss).split([shape.numel() for shape in ctx.shapes])
    grads = [p.view(s).to(d) for p, s, d in zip(scaled, ctx.shapes, ctx.dtypes, strict=True)]
    return grads[: ctx.reals], grads[ctx.reals :], None


_op.register_autograd(_op_autograd, setup_context=_setup_context)


# -- public --------------------------------------------------------------------------------------------------------


def _run(real: list[Tensor], fake: list[Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if traced(fake[0]):
        return _op(real, fake, weight)[:2]
    return _Hinge.apply(len(real), weight, *real, *fake)  # type: ignore[return-value]


def hinge_generator(logits: Iterable[Tensor], weight: Tensor | None = None) -> Tensor:
    """L_G: fp32 scalar. logits: heads [B, *], any floating dtype; weight: omega [B]; no gradient to weight.

    Raises ValueError for no heads, no logits at all, other dtypes, unequal batches or devices, or another weight.
    """
    logits, weight = _heads(logits), _constant(weight)
    _check([], logits, weight)
    if not fused("hinge", *logits):
        return hinge_generator_reference(logits, weight)
    return _run([], logits, weight)[0]


def hinge_discriminator(real: Iterable[Tensor], fake: Iterable[Tensor], weight: Tensor | None = None) -> HingeD:
    """L_D and the logit statistics. real, fake: heads [B, *]; weight: omega [B]. Raises ValueError as above."""
    real, fake, weight = _heads(real), _heads(fake), _constant(weight)
    _check(real, fake, weight)
    if not real or not fake:
        raise ValueError("no heads: both real and fake must hold at least one tensor")
    if not fused("hinge", *real, *fake):
        return hinge_discriminator_reference(real, fake, weight)
    loss, stats = _run(real, fake, weight)
    return HingeD(loss, stats[0], stats[1], stats[2])
