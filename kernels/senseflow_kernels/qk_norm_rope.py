"""Queries, keys and values of joint attention: RMSNorm of q and k, RoPE, both streams in one sequence.

With x a head's row of D values, w its stream's weight and (c, s) the token's row of the RoPE table:

    y = w x / sqrt(mean(x^2) + eps),   out[2i] = c[2i] y[2i] - s[2i] y[2i+1],   out[2i+1] = c[2i+1] y[2i+1] + s[2i+1] y[2i]

One launch reads q, k and v of every stream (views of a GEMM's packed output) and writes [B, N, heads, D]. The backward
is one more, which writes d(q, k, v) into one packed buffer a stream, and a small one where a weight wants its gradient.
It saves the pre-norm views alone: rstd comes from values it reads anyway, so keeping it would only add bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from senseflow_kernels._launch import INTERPRET, blocks_of, fused, jit, launch, power_of_2, rounded, tl

Rope = tuple[Tensor, Tensor]


class QKV(NamedTuple):
    """One stream's projections and norm weights.

    q, k, v: [B, N_i, heads * head_dim], any batch and row strides, the last dimension contiguous (else copied);
    q_weight, k_weight: [head_dim], or None for no norm of that tensor. k and v None: q is packed, see `packed`.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None

    @classmethod
    def packed(cls, qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None) -> QKV:
        """A stream whose q, k and v are the thirds of one [B, N_i, 3 * heads * head_dim].

        Its gradient is then the packed buffer itself, where three views of it would have theirs joined by a copy.
        """
        return cls(qkv, None, None, q_weight, k_weight)

    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.k is None or self.v is None:
            q, k, v = self.q.chunk(3, -1)
            return q, k, v
        return self.q, self.k, self.v


class Call(NamedTuple):
    """What is not a tensor. parts: per stream how many tensors hold it: 1 packed, 3, or 2 where v passes by; norms: per
    stream whether q and k are normalised."""

    parts: Sequence[int]
    norms: Sequence[bool]
    heads: int
    eps: float


def _check(streams: Sequence[QKV], heads: int, rope: Rope | None) -> None:
    if len(streams) not in (1, 2):
        raise ValueError(f"streams must be one or two, got {len(streams)}")
    first = streams[0].q
    for i, s in enumerate(streams):
        if (s.k is None) != (s.v is None):
            raise ValueError(f"stream {i}: k and v are both given, or both None for a packed q")
        if s.q.dim() != 3 or (s.k is None and s.q.shape[2] % 3):
            raise ValueError(f"stream {i}: q must be [B, N, {'3 * ' * (s.k is None)}width], got {list(s.q.shape)}")
        width = s.q.shape[2] // (3 if s.k is None else 1)
        for name, t in (("k", s.k), ("v", s.v)):
            if t is not None and t.shape != s.q.shape:
                raise ValueError(f"stream {i}: {name} has shape {list(t.shape)}, q has {list(s.q.shape)}")
        for name, t in (("q", s.q), ("k", s.k), ("v", s.v)):
            if t is not None and (t.dtype != first.dtype or t.device != first.device):
                raise ValueError(f"stream {i}: {name} is {t.dtype} on {t.device}, not {first.dtype} on {first.device}")
        if len(s.q) != len(first) or (i and width != streams[0].views()[0].shape[2]):
            raise ValueError(f"stream {i}: batch and width are {[len(s.q), width]}, not those of stream 0")
        if heads < 1 or width % heads or not width:
            raise ValueError(f"stream {i}: width {width} is not {heads} heads of one size")
        for name, w in (("q_weight", s.q_weight), ("k_weight", s.k_weight)):
            if w is not None and tuple(w.shape) != (width // heads,):
                raise ValueError(f"stream {i}: {name} must have shape [{width // heads}], got {list(w.shape)}")
    if rope is None:
        return
    want = (sum(s.q.shape[1] for s in streams), streams[0].views()[0].shape[2] // heads)
    if want[1] % 2 or tuple(rope[0].shape) != want or tuple(rope[1].shape) != want:
        shapes = [list(t.shape) for t in rope]
        raise ValueError(f"rope must be cos and sin of shape {list(want)}, head_dim even; got {shapes}")


# -- torch reference -----------------------------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs. x: [B, N, heads, head_dim]; cos, sin: [N, head_dim], of x's dtype."""
    (even, odd), (c, s) = x.unflatten(-1, (-1, 2)).unbind(-1), (t.unflatten(-1, (-1, 2))[:, None] for t in (cos, sin))
    return torch.stack((even * c[..., 0] - odd * s[..., 0], odd * c[..., 1] + even * s[..., 1]), -1).flatten(-2)


def joint_qkv_reference(
    streams: Sequence[QKV], heads: int, rope: Rope | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain torch: fp32 arithmetic, fp64 where q is fp64, rounded once."""
    views, dtype = [s.views() for s in streams], streams[0].q.dtype
    fp = torch.float64 if dtype == torch.float64 else torch.float32

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(tensors), 1) if len(tensors) > 1 else tensors[0]
        return whole.unflatten(-1, (heads, -1)) if whole.dim() == 3 else whole

    def prepared(tensors: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
        if any(w is not None for w in weights):
            tensors = [t.unflatten(-1, (heads, -1)).to(fp) for t in tensors]
            tensors = [
                t if w is None else t * (t.square().mean(-1, keepdim=True) + eps).rsqrt() * w.to(fp)
                for t, w in zip(tensors, weights, strict=True)
            ]
        out = joined(tensors)
        if rope is not None:
            out = rotated(out.to(fp), rope[0].to(fp), rope[1].to(fp))
        return out.to(dtype).contiguous()

    q = prepared([q for q, _, _ in views], [s.q_weight for s in streams])
    k = prepared([k for _, k, _ in views], [s.k_weight for s in streams])
    return q, k, joined([v for _, _, v in views])


# -- kernels -------------------------------------------------------------------------------------------------------

PROGRAMS = 2048  # of a backward with weight gradients, about: each writes one row of them


@jit
def _row(ptr, offset, D: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 [1, WIDTH]: row `offset` of a [*, D] table; zero beyond D. None of None, as the next one."""
    row = ptr
    if ptr is not None:
        column = tl.arange(0, WIDTH)[None, :]
        row = tl.load(ptr + offset * D + column, column < D, other=0.0).to(tl.float32)
    return row


@jit
def _tile(ptr, at, mask):
    tile = ptr
    if ptr is not None:
        tile = tl.load(ptr + at, mask, other=0.0)
    return tile


@jit
def _pairs(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(even, odd) columns. From a flat tile, that loads and stores stay 128 bits wide; a [..., 2] tile has 32."""
    return tl.split(tile.reshape(ROWS, WIDTH // 2, 2))


@jit
def _rotate(tile, cos, sin, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """RoPE of a [ROWS, WIDTH] tile by one token's [1, WIDTH] row, or its transpose."""
    even, odd = _pairs(tile, ROWS, WIDTH)
    c0, c1 = _pairs(cos, 1, WIDTH)
    s0, s1 = _pairs(sin, 1, WIDTH)
    if TRANSPOSED:
        pair = tl.join(even * c0 + odd * s1, odd * c1 - even * s0)
    else:
        pair = tl.join(even * c0 - odd * s0, odd * c1 + even * s1)
    return pair.reshape(ROWS, WIDTH)


@jit
def _forward_tile(
    x, weight, cos, sin, eps, out_ptr, at, mask,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    y = x.to(tl.float32)
    if weight is not None:
        y = y * tl.rsqrt(tl.sum(y * y, 1) * (1.0 / D) + eps)[:, None] * weight
    if cos is not None:
        y = _rotate(y, cos, sin, False, ROWS, WIDTH)
    tl.store(out_ptr + at, rounded(y, out_ptr.dtype.element_ty, EMULATE), mask)


@jit
def _forward_stream(
    q_ptr, k_ptr, v_ptr, q_batch, q_row, k_batch, k_row, v_batch, v_row, q_weight_ptr, k_weight_ptr,
    cos_ptr, sin_ptr, q_out, k_out, v_out, b, token, position, total, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One token of one stream; position: in the joint sequence."""
    q_weight = _row(q_weight_ptr, 0, D, WIDTH)
    k_weight = _row(k_weight_ptr, 0, D, WIDTH)
    cos = _row(cos_ptr, position, D, WIDTH)
    sin = _row(sin_ptr, position, D, WIDTH)
    q_ptr += b * q_batch + token * q_row
    k_ptr += b * k_batch + token * k_row
    if v_out is not None:
        v_ptr += b * v_batch + token * v_row
    start = (b * total + position) * (HEADS * D)
    column = tl.arange(0, WIDTH)[None, :]
    for first in range(0, HEADS, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        at, mask = head * D + column, (head < HEADS) & (column < D)
        q = tl.load(q_ptr + at, mask, other=0.0)
        k = tl.load(k_ptr + at, mask, other=0.0)
        if v_out is not None:
            tl.store(v_out + start + at, tl.load(v_ptr + at, mask), mask)
        _forward_tile(q, q_weight, cos, sin, eps, q_out + start, at, mask, D, ROWS, WIDTH, EMULATE)
        _forward_tile(k, k_weight, cos, sin, eps, k_out + start, at, mask, D, ROWS, WIDTH, EMULATE)


@jit
def _forward_kernel(
    xs, strides, weights, cos_ptr, sin_ptr, q_out, k_out, v_out, counts, total, eps,
    STREAMS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (token, b). xs: q, k, v of each stream; strides: batch and row of each; weights: q's, k's."""
    position, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    eps = tl.cast(eps, tl.float32)  # python floats stay fp64 in the interpreter of Triton 3.6
    token = position
    for s in tl.static_range(STREAMS):  # pyright: ignore[reportGeneralTypeIssues]
        if (token >= 0) & (token < counts[s]):
            _forward_stream(
                xs[3 * s], xs[3 * s + 1], xs[3 * s + 2], strides[6 * s], strides[6 * s + 1], strides[6 * s + 2],
                strides[6 * s + 3], strides[6 * s + 4], strides[6 * s + 5], weights[2 * s], weights[2 * s + 1],
                cos_ptr, sin_ptr, q_out, k_out, v_out, b, token, position, total, eps, HEADS, D, ROWS, WIDTH, EMULATE,
            )  # fmt: skip
        token -= counts[s]


@jit
def _backward_tile(
    grad, x, weight, cos, sin, eps, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """(dx, dy x / rms: what summed over rows is the weight's gradient). With g = dy w and r = 1 / rms:
    dx = r g - r^3 x mean(g x)."""
    dy = grad.to(tl.float32)
    if cos is not None:
        dy = _rotate(dy, cos, sin, True, ROWS, WIDTH)
    if weight is None:
        return dy, dy
    x = x.to(tl.float32)
    g = dy * weight
    rms = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)[:, None]
    x = x * rms
    return rms * (g - x * (tl.sum(g * x, 1) * (1.0 / D))[:, None]), dy * x


@jit
def _backward_stream(
    dq_ptr, dk_ptr, dv_ptr, grad_strides, q_ptr, k_ptr, q_batch, q_row, k_batch, k_row, q_weight_ptr, k_weight_ptr,
    cos_ptr, sin_ptr, out, q_partial, k_partial, b, tile, tokens, count, start, eps,
    PARTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Tokens tile * tokens ... of one stream, which starts at `start` in the joint sequence."""
    q_weight = _row(q_weight_ptr, 0, D, WIDTH)
    k_weight = _row(k_weight_ptr, 0, D, WIDTH)
    column = tl.arange(0, WIDTH)[None, :]
    q_sum, k_sum = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    token = tile * tokens
    end = tl.minimum(token + tokens, count)
    while token < end:  # not range(): Triton 3.6's interpreter cannot take a tensor there with NumPy 2.4
        position = start + token
        cos = _row(cos_ptr, position, D, WIDTH)
        sin = _row(sin_ptr, position, D, WIDTH)
        for first in range(0, HEADS, ROWS):
            head = first + tl.arange(0, ROWS)[:, None]
            flat, mask = head * D + column, (head < HEADS) & (column < D)
            at = b * grad_strides[0] + position * grad_strides[1] + head * grad_strides[2] + column
            dq = tl.load(dq_ptr + at, mask, other=0.0)
            at = b * grad_strides[3] + position * grad_strides[4] + head * grad_strides[5] + column
            dk = tl.load(dk_ptr + at, mask, other=0.0)
            x_q = _tile(q_ptr, b * q_batch + token * q_row + flat, mask)
            x_k = _tile(k_ptr, b * k_batch + token * k_row + flat, mask)
            to = (b * count + token) * (PARTS * HEADS * D) + flat
            if out is not None and PARTS == 3:
                at = b * grad_strides[6] + position * grad_strides[7] + head * grad_strides[8] + column
                tl.store(out + to + 2 * HEADS * D, tl.load(dv_ptr + at, mask), mask)
            dq, q_part = _backward_tile(dq, x_q, q_weight, cos, sin, eps, D, ROWS, WIDTH)
            dk, k_part = _backward_tile(dk, x_k, k_weight, cos, sin, eps, D, ROWS, WIDTH)
            if out is not None:
                tl.store(out + to, rounded(dq, out.dtype.element_ty, EMULATE), mask)
                tl.store(out + to + HEADS * D, rounded(dk, out.dtype.element_ty, EMULATE), mask)
            if q_partial is not None:
                q_sum += q_part
            if k_partial is not None:
                k_sum += k_part
        token += 1
    at = (b * tl.cdiv(count, tokens) + tile) * WIDTH + tl.arange(0, WIDTH)
    if q_partial is not None:
        tl.store(q_partial + at, tl.sum(q_sum, 0))
    if k_partial is not None:
        tl.store(k_partial + at, tl.sum(k_sum, 0))


@jit
def _backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, grad_strides, xs, strides, weights, cos_ptr, sin_ptr, outs, partials, counts, tokens, eps,
    STREAMS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (`tokens` tokens of one stream, b). grad_strides: batch, token and head of dq, dk, dv; xs, strides,
    weights: q's and k's of each stream; outs: packed [B, N_i, PARTS, heads, D]; partials: [programs, WIDTH] of each
    weight. An x is None where no norm needs it, an out or a partial where nobody wants it."""
    tile, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    eps = tl.cast(eps, tl.float32)
    start = tl.cast(0, tl.int64)
    for s in tl.static_range(STREAMS):  # pyright: ignore[reportGeneralTypeIssues]
        if outs[s] is not None or partials[2 * s] is not None or partials[2 * s + 1] is not None:
            if (tile >= 0) & (tile * tokens < counts[s]):
                _backward_stream(
                    dq_ptr, dk_ptr, dv_ptr, grad_strides, xs[2 * s], xs[2 * s + 1], strides[4 * s],
                    strides[4 * s + 1], strides[4 * s + 2], strides[4 * s + 3], weights[2 * s], weights[2 * s + 1],
                    cos_ptr, sin_ptr, outs[s], partials[2 * s], partials[2 * s + 1], b, tile, tokens, counts[s], start, eps,
                    PARTS, HEADS, D, ROWS, WIDTH, EMULATE,
                )  # fmt: skip
        tile -= tl.cdiv(counts[s], tokens)
        start += counts[s]


@jit
def _weights_kernel(
    partials, rows, outs, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (COLUMNS columns, weight): the sum of its partials, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    for i in tl.static_range(WEIGHTS):  # pyright: ignore[reportGeneralTypeIssues]
        if tl.program_id(1) == i:
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            first = tl.cast(0, tl.int64)
            while first < rows[i]:
                row = first + tl.arange(0, ROWS)[:, None]
                acc += tl.load(partials[i] + row * WIDTH + column[None, :], row < rows[i], other=0.0)
                first += ROWS
            tl.store(outs[i] + column, rounded(tl.sum(acc, 0), outs[i].dtype.element_ty, EMULATE), column < D)
