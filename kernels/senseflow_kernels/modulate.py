"""The adaLN family of MMDiT blocks (SD 3.5, FLUX): gated residual, LayerNorm without affine, scale and shift.

    x_new = x + sum_i gate_i branch_i,   y_j = LN(x_new) (1 + scale_j) + shift_j

with gate, scale and shift per sample. x_new is rounded once, to x's dtype, and y is computed from what is stored: the
backward, which reads x_new, mean and rstd back, then differentiates the very numbers of the forward, and the fused
form computes what `gate_residual` followed by `layer_norm_modulate` does. Saved are what was normalised, 8 bytes a
token, the [B, D] vectors, and the branches where a gate has a gradient. On a GPU the forward is one launch, the
backward two: rows, which leave fp32 partial column sums, and their sum, in an order that the shape alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from senseflow_kernels import _adaln
from senseflow_kernels._launch import fused, traced


def _check(x: Tensor, gates: list[Tensor], branches: list[Tensor], scales: list[Tensor], shifts: list[Tensor]) -> None:
    if x.dim() != 3 or not x.shape[2]:
        raise ValueError(f"x must have shape [B, N, D] with D >= 1, got {list(x.shape)}")
    batch, _, columns = x.shape
    for name, tensors in (("gate", gates), ("scale", scales), ("shift", shifts)):
        for t in tensors:
            if t.shape != (batch, columns):
                raise ValueError(f"{name} must have shape [{batch}, {columns}], got {list(t.shape)}")
    for t in branches:
        if t.shape != x.shape:
            raise ValueError(f"branch has shape {tuple(t.shape)}, x has {tuple(x.shape)}")
    for t in (x, *gates, *branches, *scales, *shifts):
        if not t.is_floating_point():
            raise ValueError(f"all tensors must be floating, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"x is on {x.device}, another tensor on {t.device}")


# -- torch reference -----------------------------------------------------------------------------------------------


def modulate_reference(
    x: Tensor, gates: Sequence[Tensor], branches: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor],
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """[x_new where there are branches] + ys in plain torch: fp32 arithmetic, fp64 where x is fp64; x's dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = []
    if branches:
        value = x.to(dtype)
        for gate, branch in zip(gates, branches, strict=True):
            value = torch.addcmul(value, gate.to(dtype)[:, None], branch.to(dtype))
        x = value.to(x.dtype)
        out.append(x)
    if scales:
        normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
        for scale, shift in zip(scales, shifts, strict=True):
            y = torch.addcmul(shift.to(dtype)[:, None], normed, 1 + scale.to(dtype)[:, None])
            out.append(y.to(x.dtype))
    return out


# -- registration --------------------------------------------------------------------------------------------------


def _save(ctx: Any, tensors: Sequence[Sequence[Tensor]], out: Sequence[Tensor], need_gates: bool) -> None:
    """tensors: x, gates, branches, scales, shifts as lists; out: of _adaln.forward."""
    (x,), gates, branches, scales, _ = tensors
    ctx.dtype, ctx.branch_dtype = x.dtype, branches[0].dtype if branches else x.dtype
    ctx.branches, ctx.outputs = len(branches), len(scales)
    normed = (out[0] if branches else x, out[-1]) if scales else ()
    ctx.save_for_backward(*gates, *scales, *normed, *(branches if need_gates else ()))
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, run: Callable[..., list[Tensor]], grads: Sequence[Tensor | None], need_x: bool, need_gates: bool,
    need_branches: bool, need_modulation: bool,
) -> tuple[Tensor | None, list[Any], list[Any], list[Any], list[Any]]:  # fmt: skip
    """Gradients of x, gates, branches, scales, shifts by `run`, _adaln.backward or its op; None where not needed."""
    saved, some = list(ctx.saved_tensors), ctx.branches
    gates, scales = saved[:some], saved[some : some + ctx.outputs]
    rest = saved[some + ctx.outputs :]
    dx_new, dys = (grads[0] if some else None), grads[1 if some else 0 :][: ctx.outputs]
    used = [j for j, dy in enumerate(dys) if dy is not None]  # an output nobody used has no gradient
    x, stats = (rest[0], rest[1]) if used else (None, None)
    branches = rest[2 if ctx.outputs else 0 :] if need_gates else []
    through = not used  # nothing is normalised: dx is dx_new
    if through and dx_new is None:
        return None, [None] * some, [None] * some, [None] * ctx.outputs, [None] * ctx.outputs
    dx = dx_new if through and need_x else None
    need_modulation, own_x = need_modulation and bool(used), need_x and not through
    out: list[Tensor] = []
    if own_x or need_branches or need_gates or need_modulation:
        kept = [dys[j] for j in used]
        out = run(
            x, stats, [scales[j] for j in used], kept, dx_new, gates, branches, ctx.dtype, ctx.branch_dtype,
            own_x, need_branches, need_gates, need_modulation,
        )  # fmt: skip
    parts = iter(out)
    if own_x:
        dx = next(parts)
    dbranches: list[Any] = [next(parts) if need_branches else None for _ in range(some)]
    dscales, dshifts = [None] * ctx.outputs, [None] * ctx.outputs
    for j in used if need_modulation else ():
        dscales[j], dshifts[j] = next(parts), next(parts)  # type: ignore[call-overload]
    dgates: list[Any] = [next(parts) if need_gates else None for _ in range(some)]
    return dx, dgates, dbranches, dscales, dshifts


class _Modulate(torch.autograd.Function):
    """The eager path: no dispatcher between Python and the launch. tensors: gates, branches, scales, shifts."""

    @staticmethod
    def forward(ctx: Any, eps: float, some: int, outputs: int, x: Tensor, *tensors: Tensor):
        ends = (0, some, 2 * some, 2 * some + outputs, 2 * (some + outputs))
        ctx.groups = tuple(slice(a, b) for a, b in pairwise(ends))
        gates, branches, scales, shifts = (tensors[part] for part in ctx.groups)
        out = _adaln.forward(x, gates, branches, scales, shifts, eps)
        _save(ctx, [[x], gates, branches, scales, shifts], out, any(ctx.needs_input_grad[4:][ctx.groups[0]]))
        if outputs:
            ctx.mark_non_differentiable(out[-1])
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):  # type: ignore[override]
        need = [any(ctx.needs_input_grad[4:][part]) for part in ctx.groups]
        needs = (ctx.needs_input_grad[3], need[0], need[1], need[2] or need[3])
        dx, *parts = _gradients(ctx, _adaln.backward, grads, *needs)
        flat = [g if n else None for g, n in zip(chain(*parts), ctx.needs_input_grad[4:], strict=True)]
        return None, None, None, dx, *flat


@torch.library.custom_op("senseflow::modulate", mutates_args=())
def _op(
    x: Tensor, gates: Sequence[Tensor], branches: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor],
    eps: float,
) -> list[Tensor]:  # fmt: skip
    return _adaln.forward(x, gates, branches, scales, shifts, eps)


@_op.register_fake
def _(x, gates, branches, scales, shifts, eps):
    out = [x.new_empty(x.shape) for _ in range(bool(branches) + len(scales))]
    return out + [x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32) for _ in range(bool(scales))]


@torch.library.custom_op("senseflow::modulate_backward", mutates_args=())
def _op_backward(
    x: Tensor | None, stats: Tensor | None, scales: Sequence[Tensor], dys: Sequence[Tensor], dx_new: Tensor | None,
    gates: Sequence[Tensor], branches: Sequence[Tensor], dtype: torch.dtype, branch_dtype: torch.dtype,
    need_x: bool, need_branches: bool, need_gates: bool, need_modulation: bool,
) -> list[Tensor]:  # fmt: skip
    return _adaln.backward(
        x, stats, scales, dys, dx_new, gates, branches, dtype, branch_dtype, need_x, need_branches, need_gates,
        need_modulation,
    )  # fmt: skip


@_op_backward.register_fake
def _(
    x, stats, scales, dys, dx_new, gates, branches, dtype, branch_dtype, need_x, need_branches, need_gates,
    need_modulation,
):  # fmt: skip
    like = dys[0] if dx_new is None else dx_new
    rows = [dtype] * need_x + [branch_dtype] * (len(gates) * need_branches)
    columns = [s.dtype for s in scales for _ in range(2 * need_modulation)]
    columns += [g.dtype for g in gates if need_gates]
    sums = [like.new_empty(like.shape[0], like.shape[2], dtype=d) for d in columns]
    return [like.new_empty(like.shape, dtype=d) for d in rows] + sums


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, *groups, _ = inputs
    _save(ctx, [[x], *groups], output, any(g.requires_grad for g in groups[0]))
    ctx.needs = (x.requires_grad, *(any(t.requires_grad for t in group) for group in groups))


def _op_autograd(ctx: Any, grads: Sequence[Tensor | None]):
    need_x, need_gates, need_branches, need_scales, need_shifts = ctx.needs
    needs = (need_x, need_gates, need_branches, need_scales or need_shifts)
    return *_gradients(ctx, _op_backward, grads, *needs), None


_op.register_autograd(_op_autograd, setup_context=_setup_context)


# -- public --------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor, gates: list[Tensor], branches: list[Tensor], scales: list[Tensor], shifts: list[Tensor], eps: float
) -> list[Tensor]:
    _check(x, gates, branches, scales, shifts)
    limit = None
    if x.shape[2] > _adaln.MAX_COLUMNS:
        limit = f"D is {x.shape[2]}, the kernel takes at most {_adaln.MAX_COLUMNS}"
    if not fused("modulate", x, *gates, *branches, *scales, *shifts, limit=limit):
        return modulate_reference(x, gates, branches, scales, shifts, eps)
    scales, shifts = _alike(scales, shifts)
    gates, branches = _same(gates), _same(branches)
    if traced(x):
        out = _op(x, gates, branches, scales, shifts, eps)
    else:
        tensors = (*gates, *branches, *scales, *shifts)
        out = list(_Modulate.apply(eps, len(gates), len(scales), x, *tensors))  # type: ignore[arg-type]
    return out[:-1] if scales else out


def _same(tensors: list[Tensor]) -> list[Tensor]:
    """All in one dtype: the gradients of both branches are written in one."""
    if len({t.dtype for t in tensors}) < 2:
        return tensors
    return [t.float() for t in tensors]


def _alike(scales: list[Tensor], shifts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    both = _same([*scales, *shifts])
    return both[: len(scales)], both[len(scales) :]


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift, of x's shape and dtype; LN over D, without affine.

    x: [B, N, D]; scale, shift: [B, D], such as the chunks of an adaLN linear's output. fp32, bf16 and fp16 in any mix
    (fp64 in torch), arithmetic in fp32, each result and each gradient rounded once. The strides of B and N are free;
    tensors whose columns are not contiguous are copied. D above 8192 runs in torch. Raises ValueError for other shapes,
    devices, or integers. Differentiable once.
    """
    return _run(x, [], [], [scale], [shift], eps)[0]


def layer_norm_modulate2(
    x: Tensor, scale: Tensor, shift: Tensor, scale2: Tensor, shift2: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`layer_norm_modulate` with two modulations of one norm, as the dual attention of SD 3.5 Medium has: x read once.

    Arguments and errors as there.
    """
    y, y2 = _run(x, [], [], [scale, scale2], [shift, shift2], eps)
    return y, y2


def gate_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate branch, of x's shape and dtype. branch: [B, N, D] as x, gate: [B, D]; dtypes, strides, errors as above.

    The gradient of x is the incoming one, the same tensor.
    """
    return _run(x, [gate], [branch], [], [], 0.0)[0]


def gate_residual_layer_norm_modulate(
    x: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *,
    gate2: Tensor | None = None, branch2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x_new, y): x_new = x + gate branch [+ gate2 branch2], y = LN(x_new) (1 + scale) + shift, both in x's dtype.

    The second branch is the dual attention of SD 3.5 Medium. The next block's first modulate may take the place of
    this block's: then one block's last residual and the next one's norm are one launch. x_new has the bits of
    `gate_residual`. Arguments and errors as there; ValueError for gate2 without branch2.
    """
    if (gate2 is None) != (branch2 is None):
        raise ValueError("gate2 and branch2 go together")
    gates, branches = [gate], [branch]
    if gate2 is not None and branch2 is not None:
        gates, branches = [gate, gate2], [branch, branch2]
    x_new, y = _run(x, gates, branches, [scale], [shift], eps)
    return x_new, y
