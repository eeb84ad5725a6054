"""Kernels and launches of `joint_qkv`: see qk_norm_rope.py, whose terms these are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from senseflow_kernels._launch import INTERPRET, blocks_of, jit, launch, power_of_2, rounded, tl

# -- kernels -------------------------------------------------------------------------------------------------------

PROGRAMS = 2048  # a tensor in a backward with weight gradients, about: each writes one row of them


@jit
def _turned(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A quarter turn of every pair of columns, (x, y) -> (-y, x): RoPE is cos x + sin turned(x), its transpose
    cos x - turned(sin x). From a flat tile, that loads and stores stay 128 bits wide; a [..., 2] tile has 32."""
    even, odd = tl.split(tile.reshape(ROWS, WIDTH // 2, 2))
    return tl.join(-odd, even).reshape(ROWS, WIDTH)


@jit
def _forward_kernel(
    xs, strides, weights, cos_ptr, sin_ptr, outs, counts, total, eps,
    STREAMS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (token of the joint sequence and which of PARTS: q, k, v; b).

    Of PARTS tensors of each stream, stream by stream: xs, strides (batch and row), weights (None: no norm). outs: q, k
    and v; counts: tokens of each stream, total: of all.
    """
    position, b = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) % PARTS
    eps = tl.cast(eps, tl.float32)  # python floats stay fp64 in the interpreter of Triton 3.6
    column = tl.arange(0, WIDTH)[None, :]
    token = position
    for s in tl.static_range(STREAMS):  # pyright: ignore[reportGeneralTypeIssues]
        if (token >= 0) & (token < counts[s]):
            for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
                if which == i:
                    x_ptr = xs[PARTS * s + i] + b * strides[2 * (PARTS * s + i)]
                    x_ptr += token * strides[2 * (PARTS * s + i) + 1]
                    out_ptr = outs[i] + (b * total + position) * (HEADS * D)
                    for first in range(0, HEADS, ROWS):
                        head = first + tl.arange(0, ROWS)[:, None]
                        at, mask = head * D + column, (head < HEADS) & (column < D)
                        y = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
                        if weights[PARTS * s + i] is not None:
                            weight = tl.load(weights[PARTS * s + i] + column, column < D, other=0.0).to(tl.float32)
                            y = y * tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) * (1.0 / D) + eps) * weight
                        if i < 2 and cos_ptr is not None:
                            cos = tl.load(cos_ptr + position * D + column, column < D, other=0.0).to(tl.float32)
                            sin = tl.load(sin_ptr + position * D + column, column < D, other=0.0).to(tl.float32)
                            y = cos * y + sin * _turned(y, ROWS, WIDTH)
                        tl.store(out_ptr + at, rounded(y, outs[i].dtype.element_ty, EMULATE), mask)
        token -= counts[s]


@jit
def _backward_tokens(
    grad_ptr, grad_row, grad_head, x_ptr, x_row, weight_ptr, cos_ptr, sin_ptr, out_ptr, out_row, partial_ptr,
    token, end, start, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Tokens token ... end - 1 of a stream that starts at `start` in the joint sequence: dx, and dweight's part.

    With g = dy w and r = 1 / rms: dx = r g - r^3 x mean(g x), dweight = sum over rows of r x dy.
    """
    column = tl.arange(0, WIDTH)[None, :]
    acc = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    while token < end:  # not range(): Triton 3.6's interpreter cannot take a tensor there with NumPy 2.4
        for first in range(0, HEADS, ROWS):
            head = first + tl.arange(0, ROWS)[:, None]
            at, mask = head * D + column, (head < HEADS) & (column < D)
            dx = tl.load(grad_ptr + (start + token) * grad_row + head * grad_head + column, mask, other=0.0)
            dx = dx.to(tl.float32)
            x = dx
            if weight_ptr is not None:
                x = tl.load(x_ptr + token * x_row + at, mask, other=0.0).to(tl.float32)
            if cos_ptr is not None:
                cos = tl.load(cos_ptr + (start + token) * D + column, column < D, other=0.0).to(tl.float32)
                sin = tl.load(sin_ptr + (start + token) * D + column, column < D, other=0.0).to(tl.float32)
                dx = cos * dx - _turned(sin * dx, ROWS, WIDTH)
            if weight_ptr is not None:
                r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) * (1.0 / D) + eps)
                x *= r
                if partial_ptr is not None:
                    acc += x * dx
                dx *= tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32)
                dx = r * (dx - x * (tl.sum(x * dx, 1, keep_dims=True) * (1.0 / D)))
            if out_ptr is not None:
                tl.store(out_ptr + token * out_row + at, rounded(dx, out_ptr.dtype.element_ty, EMULATE), mask)
        token += 1
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.arange(0, WIDTH), tl.sum(acc, 0))


@jit
def _backward_kernel(
    grads, grad_strides, xs, strides, weights, cos_ptr, sin_ptr, outs, partials, counts, tokens, eps,
    STREAMS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (`tokens` tokens of one stream and which of PARTS: q, k, v; b).

    grads: of q, k, v; grad_strides: batch, token and head of each. Of PARTS tensors of each stream, stream by stream:
    xs, strides and weights as above, xs None without a norm; partials: [programs, WIDTH] of each weight or None. outs:
    of each stream, packed [B, N_i, PARTS, heads, D], or None.
    """
    tile, b = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) % PARTS
    eps = tl.cast(eps, tl.float32)
    start = tl.cast(0, tl.int64)
    for s in tl.static_range(STREAMS):  # pyright: ignore[reportGeneralTypeIssues]
        tiles = (counts[s] + tokens - 1) // tokens
        if (tile >= 0) & (tile < tiles):
            token = tile * tokens
            end = tl.minimum(token + tokens, counts[s])
            for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
                if which == i:
                    grad_ptr = grads[i] + b * grad_strides[3 * i]
                    x_ptr, weight_ptr, partial_ptr = xs[PARTS * s + i], weights[PARTS * s + i], partials[PARTS * s + i]
                    out_ptr = outs[s]
                    if x_ptr is not None:
                        x_ptr += b * strides[2 * (PARTS * s + i)]
                    if partial_ptr is not None:
                        partial_ptr += (b * tiles + tile) * WIDTH
                    if out_ptr is not None:
                        out_ptr += b * counts[s] * (PARTS * HEADS * D) + i * HEADS * D
                    if out_ptr is not None or partial_ptr is not None:
                        if i < 2:
                            _backward_tokens(
                                grad_ptr, grad_strides[3 * i + 1], grad_strides[3 * i + 2], x_ptr,
                                strides[2 * (PARTS * s + i) + 1], weight_ptr, cos_ptr, sin_ptr, out_ptr,
                                PARTS * HEADS * D, partial_ptr, token, end, start, eps, HEADS, D, ROWS, WIDTH, EMULATE,
                            )  # fmt: skip
                        else:
                            _backward_tokens(
                                grad_ptr, grad_strides[3 * i + 1], grad_strides[3 * i + 2], None, 0, None, None, None,
                                out_ptr, PARTS * HEADS * D, None, token, end, start, eps,
                                HEADS, D, ROWS, WIDTH, EMULATE,
                            )  # fmt: skip
        tile -= tiles
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
            acc = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
            first = tl.cast(0, tl.int64)
            while first < rows[i]:
                row = first + tl.arange(0, ROWS)[:, None]
                acc += tl.load(partials[i] + row * WIDTH + column[None, :], row < rows[i], other=0.0)
                first += ROWS
            tl.store(outs[i] + column, rounded(tl.sum(acc, 0), outs[i].dtype.element_ty, EMULATE), column < D)


# -- launches ------------------------------------------------------------------------------------------------------


def blocks(heads: int, head_dim: int) -> dict[str, Any]:
    """16 elements a thread. With more threads than a table's row has values Triton loads the row in the tile's own
    layout; with fewer it goes through shared memory."""
    width = power_of_2(head_dim)
    warps = 8 if width >= 128 else 4
    rows = min(power_of_2(heads), max(1, 16 * 32 * warps // width))
    return dict(HEADS=heads, D=head_dim, ROWS=rows, WIDTH=width, EMULATE=INTERPRET, num_warps=warps)


def registers(num_warps: int, dtype: torch.dtype) -> int:
    """Of a backward thread: 24 or 20 warps an SM at 16 bits. Left alone, ptxas spills a few to have one block more."""
    return 128 if dtype == torch.float32 else 80 if num_warps == 8 else 96


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def spread(present: Sequence[Tensor], norms: Sequence[bool], parts: int = 2) -> list[Tensor | None]:
    """The tensors in order where q's and k's norms are, None elsewhere and for v, with parts a stream."""
    rest = iter(present)
    found = [next(rest) if norm else None for norm in norms]
    return [t for i in range(0, len(found), 2) for t in [*found[i : i + 2], None][:parts]]


def launch_forward(
    views: Sequence[tuple[Tensor, ...]], weights: Sequence[Tensor], rope: Sequence[Tensor], norms: Sequence[bool],
    heads: int, eps: float, parts: int,
) -> list[Tensor]:  # fmt: skip
    """Joint [q, k], or [q, k, v] with 3 parts. weights: those of the norms there are; rope: cos, sin or nothing."""
    xs = [_dense(t) for stream in views for t in stream[:parts]]
    counts, (batch, _, width) = [stream[0].shape[1] for stream in views], xs[0].shape
    outs = [xs[0].new_empty(batch, sum(counts), heads, width // heads) for _ in range(parts)]
    launch(
        "joint_qkv", _forward_kernel, (parts * sum(counts), batch),
        tuple(xs), tuple(n for x in xs for n in x.stride()[:2]),
        tuple(spread([w.contiguous() for w in weights], norms, parts)),
        *([t.contiguous() for t in rope] or (None, None)), tuple(outs), tuple(counts), sum(counts), eps,
        STREAMS=len(views), PARTS=parts, **blocks(heads, width // heads),
    )  # fmt: skip
    return outs


def launch_backward(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], rope: Sequence[Tensor],
    counts: Sequence[int], norms: Sequence[bool], heads: int, eps: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Of what needs says, streams first, then q's and k's weight of each: packed gradients [B, N_i, 2 or 3 * width] and
    the weights' gradients. grads: of q, k and v where it was written; xs: the q and k that are normalised."""
    streams, parts, (batch, total, _, head_dim) = len(counts), len(grads), grads[0].shape
    grads, shape, wanted = [_dense(g) for g in grads], blocks(heads, head_dim), needs[streams:]
    outs = [
        grads[0].new_empty(batch, n, parts * heads * head_dim) if need else None
        for n, need in zip(counts, needs[:streams], strict=True)
    ]
    tokens = blocks_of(batch * total, PROGRAMS) if any(wanted) else 1
    rows = [batch * blocks_of(counts[i // 2], tokens) for i, need in enumerate(wanted) if need]
    partials = [grads[0].new_empty(n, shape["WIDTH"], dtype=torch.float32) for n in rows]
    of_xs = spread([_dense(x) for x in xs], norms, parts)
    launch(
        "joint_qkv_backward", _backward_kernel, (parts * sum(blocks_of(n, tokens) for n in counts), batch),
        tuple(grads), tuple(n for g in grads for n in g.stride()[:3]), tuple(of_xs),
        tuple(n for x in of_xs for n in ((0, 0) if x is None else x.stride()[:2])),
        tuple(spread([w.contiguous() for w in weights], norms, parts)),
        *([t.contiguous() for t in rope] or (None, None)), tuple(outs), tuple(spread(partials, wanted, parts)),
        tuple(counts), tokens, eps,
        STREAMS=streams, PARTS=parts, **shape, maxnreg=registers(shape["num_warps"], grads[0].dtype),
    )  # fmt: skip
    learned = zip(spread(weights, norms), wanted, strict=True)
    dweights = [torch.empty_like(w) for w, need in learned if need and w is not None]
    if dweights:
        columns = min(8, shape["WIDTH"])
        launch(
            "joint_qkv_backward", _weights_kernel, (shape["WIDTH"] // columns, len(dweights)),
            tuple(partials), tuple(rows), tuple(dweights),
            D=head_dim, WIDTH=shape["WIDTH"], ROWS=512, COLUMNS=columns, WEIGHTS=len(dweights), EMULATE=INTERPRET,
            num_warps=8,
        )  # fmt: skip
    return [t for t in outs if t is not None] + dweights
