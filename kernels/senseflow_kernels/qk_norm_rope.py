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

PROGRAMS = 2048  # a tensor in a backward with weight gradients, about: each writes one row of them


@jit
def _table(ptr, row, D: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 [1, WIDTH]: a row of a [*, D] table, zero beyond D; None of None."""
    values = ptr
    if ptr is not None:
        column = tl.arange(0, WIDTH)[None, :]
        values = tl.load(ptr + row * D + column, column < D, other=0.0).to(tl.float32)
    return values


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
def _forward_token(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, position, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """All heads of one token, which x_ptr and out_ptr point at."""
    weight = _table(weight_ptr, 0, D, WIDTH)
    cos = _table(cos_ptr, position, D, WIDTH)
    sin = _table(sin_ptr, position, D, WIDTH)
    column = tl.arange(0, WIDTH)[None, :]
    for first in range(0, HEADS, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        at, mask = head * D + column, (head < HEADS) & (column < D)
        y = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        if weight is not None:
            y = y * tl.rsqrt(tl.sum(y * y, 1) * (1.0 / D) + eps)[:, None] * weight
        if cos is not None:
            y = _rotate(y, cos, sin, False, ROWS, WIDTH)
        tl.store(out_ptr + at, rounded(y, out_ptr.dtype.element_ty, EMULATE), mask)


@jit
def _forward_kernel(
    xs, strides, weights, cos_ptr, sin_ptr, outs, counts, total, eps,
    STREAMS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program (token of the joint sequence and which of PARTS: q, k, v; b). xs: q, k, v of each stream; strides: batch
    and row of each; weights: q's and k's of each stream; outs: q, k, v; counts: tokens of each stream."""
    position, b = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) % PARTS
    eps = tl.cast(eps, tl.float32)  # python floats stay fp64 in the interpreter of Triton 3.6
    to = (b * total + position) * (HEADS * D)
    token = position
    for s in tl.static_range(STREAMS):  # pyright: ignore[reportGeneralTypeIssues]
        for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            if (which == i) & (token >= 0) & (token < counts[s]):
                x_ptr = xs[PARTS * s + i] + b * strides[2 * (PARTS * s + i)] + token * strides[2 * (PARTS * s + i) + 1]
                if i < 2:
                    _forward_token(
                        x_ptr, weights[2 * s + i], cos_ptr, sin_ptr, outs[i] + to, position, eps,
                        HEADS, D, ROWS, WIDTH, EMULATE,
                    )  # fmt: skip
                else:
                    _forward_token(
                        x_ptr, None, None, None, outs[i] + to, position, eps, HEADS, D, ROWS, WIDTH, EMULATE
                    )
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
    weight = _table(weight_ptr, 0, D, WIDTH)
    column = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    while token < end:  # not range(): Triton 3.6's interpreter cannot take a tensor there with NumPy 2.4
        cos = _table(cos_ptr, start + token, D, WIDTH)
        sin = _table(sin_ptr, start + token, D, WIDTH)
        for first in range(0, HEADS, ROWS):
            head = first + tl.arange(0, ROWS)[:, None]
            at, mask = head * D + column, (head < HEADS) & (column < D)
            dx = tl.load(grad_ptr + (start + token) * grad_row + head * grad_head + column, mask, other=0.0)
            dx = dx.to(tl.float32)
            if weight is not None:
                x = tl.load(x_ptr + token * x_row + at, mask, other=0.0).to(tl.float32)
            if cos is not None:
                dx = _rotate(dx, cos, sin, True, ROWS, WIDTH)
            if weight is not None:
                r = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)[:, None]
                x *= r
                if partial_ptr is not None:
                    acc += x * dx
                dx *= weight
                dx = r * (dx - x * (tl.sum(x * dx, 1) * (1.0 / D))[:, None])
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

    grads: of q, k, v; grad_strides: batch, token and head of each; xs, strides, weights: q's and k's of each stream;
    outs: packed [B, N_i, PARTS, heads, D]; partials: [programs, WIDTH] of each weight. An x is None where there is no
    norm, an out or a partial where nobody wants it.
    """
    tile, b = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(1).to(tl.int64)
    which = tl.program_id(0) % PARTS
    eps = tl.cast(eps, tl.float32)
    start = tl.cast(0, tl.int64)
    for s in tl.static_range(STREAMS):  # pyright: ignore[reportGeneralTypeIssues]
        tiles = tl.cdiv(counts[s], tokens)
        token = tile * tokens
        end = tl.minimum(token + tokens, counts[s])
        for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            if (which == i) & (tile >= 0) & (tile < tiles):
                grad_ptr = grads[i] + b * grad_strides[3 * i]
                out_ptr = outs[s]
                if out_ptr is not None:
                    out_ptr += b * counts[s] * (PARTS * HEADS * D) + i * HEADS * D
                if i < 2:
                    x_ptr, partial_ptr = xs[2 * s + i], partials[2 * s + i]
                    if x_ptr is not None:
                        x_ptr += b * strides[2 * (2 * s + i)]
                    if partial_ptr is not None:
                        partial_ptr += (b * tiles + tile) * WIDTH
                    if out_ptr is not None or partial_ptr is not None:
                        _backward_tokens(
                            grad_ptr, grad_strides[3 * i + 1], grad_strides[3 * i + 2], x_ptr,
                            strides[2 * (2 * s + i) + 1], weights[2 * s + i], cos_ptr, sin_ptr, out_ptr,
                            PARTS * HEADS * D, partial_ptr, token, end, start, eps, HEADS, D, ROWS, WIDTH, EMULATE,
                        )  # fmt: skip
                elif out_ptr is not None:
                    _backward_tokens(
                        grad_ptr, grad_strides[3 * i + 1], grad_strides[3 * i + 2], None, 0, None, None, None, out_ptr,
                        PARTS * HEADS * D, None, token, end, start, eps, HEADS, D, ROWS, WIDTH, EMULATE,
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
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            first = tl.cast(0, tl.int64)
            while first < rows[i]:
                row = first + tl.arange(0, ROWS)[:, None]
                acc += tl.load(partials[i] + row * WIDTH + column[None, :], row < rows[i], other=0.0)
                first += ROWS
            tl.store(outs[i] + column, rounded(tl.sum(acc, 0), outs[i].dtype.element_ty, EMULATE), column < D)


# -- launches ------------------------------------------------------------------------------------------------------


def _blocks(heads: int, head_dim: int) -> dict[str, Any]:
    """16 elements a thread. With more threads than a table's row has values Triton loads the row in the tile's own
    layout; with fewer it goes through shared memory."""
    width = power_of_2(head_dim)
    warps = 8 if width >= 128 else 4
    rows = min(power_of_2(heads), max(1, 16 * 32 * warps // width))
    return dict(HEADS=heads, D=head_dim, ROWS=rows, WIDTH=width, EMULATE=INTERPRET, num_warps=warps)


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _spread(present: Sequence[Tensor], where: Sequence[bool]) -> list[Tensor | None]:
    """The tensors in order at the places that say so, None elsewhere."""
    rest = iter(present)
    return [next(rest) if here else None for here in where]


def _views(tensors: Sequence[Tensor], parts: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Per stream (q, k, v), or (q, k) where v passes by."""
    rest = iter(tensors)
    return [next(rest).chunk(3, -1) if n == 1 else tuple(next(rest) for _ in range(n)) for n in parts]


def _forward(
    views: Sequence[tuple[Tensor, ...]], weights: Sequence[Tensor], rope: Sequence[Tensor], norms: Sequence[bool],
    heads: int, eps: float, with_v: bool,
) -> list[Tensor]:  # fmt: skip
    """[q, k] or [q, k, v], joint. weights: those of the norms there are; rope: cos, sin or nothing."""
    outputs = 3 if with_v else 2
    xs = [_dense(t) for stream in views for t in stream[:outputs]]
    counts, (batch, _, width) = [stream[0].shape[1] for stream in views], xs[0].shape
    outs = [xs[0].new_empty(batch, sum(counts), heads, width // heads) for _ in range(outputs)]
    launch(
        "joint_qkv", _forward_kernel, (outputs * sum(counts), batch),
        tuple(xs), tuple(n for x in xs for n in x.stride()[:2]), tuple(_spread([w.contiguous() for w in weights], norms)),
        *([t.contiguous() for t in rope] or (None, None)), tuple(outs), tuple(counts), sum(counts), eps,
        STREAMS=len(views), PARTS=outputs, **_blocks(heads, width // heads),
    )  # fmt: skip
    return outs


def _backward(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], rope: Sequence[Tensor],
    counts: Sequence[int], norms: Sequence[bool], heads: int, eps: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Of what needs says, streams first, then q's and k's weight of each: packed gradients [B, N_i, 2 or 3 * width] and
    the weights' gradients. grads: of q, k and v where it was written; xs: the q and k that are normalised."""
    streams, parts, (batch, total, _, head_dim) = len(counts), len(grads), grads[0].shape
    grads = [_dense(g) for g in grads]
    dense = _spread([_dense(x) for x in xs], norms)
    outs = [
        grads[0].new_empty(batch, n, parts * heads * head_dim) if need else None
        for n, need in zip(counts, needs[:streams], strict=True)
    ]
    blocks = _blocks(heads, head_dim)
    tokens = blocks_of(batch * total, PROGRAMS) if any(needs[streams:]) else 1
    rows = [batch * blocks_of(n, tokens) for n in counts for _ in "qk"]
    partials = [
        grads[0].new_empty(n, blocks["WIDTH"], dtype=torch.float32) if need else None
        for n, need in zip(rows, needs[streams:], strict=True)
    ]
    spread = _spread([w.contiguous() for w in weights], norms)
    launch(
        "joint_qkv_backward", _backward_kernel, (parts * sum(blocks_of(n, tokens) for n in counts), batch),
        tuple(grads), tuple(n for g in grads for n in g.stride()[:3]), tuple(dense),
        tuple(n for x in dense for n in ((0, 0) if x is None else x.stride()[:2])), tuple(spread),
        *([t.contiguous() for t in rope] or (None, None)), tuple(outs), tuple(partials), tuple(counts), tokens, eps,
        STREAMS=streams, PARTS=parts, **blocks,
    )  # fmt: skip
    found = [(p, n, w) for p, n, w in zip(partials, rows, spread, strict=True) if p is not None and w is not None]
    dweights = [torch.empty_like(w) for _, _, w in found]
    if found:
        columns = min(8, blocks["WIDTH"])
        launch(
            "joint_qkv_backward", _weights_kernel, (blocks["WIDTH"] // columns, len(found)),
            tuple(p for p, _, _ in found), tuple(n for _, n, _ in found), tuple(dweights),
            D=head_dim, WIDTH=blocks["WIDTH"], ROWS=512, COLUMNS=columns, WEIGHTS=len(found), EMULATE=INTERPRET,
            num_warps=8,
        )  # fmt: skip
    return [t for t in outs if t is not None] + dweights


# -- registration --------------------------------------------------------------------------------------------------


def _needs(of_tensors: Sequence[bool], of_weights: Sequence[bool], parts: Sequence[int], norms: Sequence[bool]):
    """What _backward is told: a stream that any of its tensors needs, a weight that is there and needed."""
    tensors, weights = iter(of_tensors), iter(of_weights)
    return [any([next(tensors) for _ in range(n)]) for n in parts] + [norm and next(weights) for norm in norms]


def _gradients(found: Sequence[Tensor], needs: Sequence[bool], parts: Sequence[int], norms: Sequence[bool]):
    """(of tensors, of weights) in the inputs' order, None where not needed."""
    spread = _spread(found, needs)
    tensors: list[Tensor | None] = []
    for n, packed in zip(parts, spread, strict=False):
        tensors += [packed] if n == 1 else [None] * n if packed is None else packed.chunk(n, -1)
    return tensors, [g for g, norm in zip(spread[len(parts) :], norms, strict=True) if norm]


def _normed(views: Sequence[tuple[Tensor, ...]], norms: Sequence[bool]) -> list[Tensor]:
    """The pre-norm q and k that the backward reads."""
    return [t for t, norm in zip((t for stream in views for t in stream[:2]), norms, strict=True) if norm]


class _JointQKV(torch.autograd.Function):
    """The eager path: no dispatcher between Python and the launch. flat: tensors, then weights."""

    @staticmethod
    def forward(ctx: Any, call: Call, rope: Sequence[Tensor], *flat: Tensor):
        tensors, weights = flat[: sum(call.parts)], flat[sum(call.parts) :]
        views = _views(tensors, call.parts)
        outs = _forward(views, weights, rope, call.norms, call.heads, call.eps, len(views) > 1)
        if call.parts[0] == 1 == len(views):
            outs.append(views[0][2].unflatten(-1, (call.heads, -1)))
        xs = _normed(views, call.norms)
        ctx.save_for_backward(*xs, *weights, *rope)
        ctx.call, ctx.counts = call, [stream[0].shape[1] for stream in views]
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        _, norms, heads, eps = call = ctx.call
        n, saved = sum(norms), ctx.saved_tensors
        xs, weights, rope = saved[:n], saved[n : 2 * n], saved[2 * n :]
        wanted = ctx.needs_input_grad[2:]
        needs = _needs(wanted[: sum(call.parts)], wanted[sum(call.parts) :], call.parts, norms)
        found = _backward(grads, xs, weights, rope, ctx.counts, norms, heads, eps, needs)
        of_tensors, of_weights = _gradients(found, needs, call.parts, norms)
        return None, None, *of_tensors, *of_weights


@torch.library.custom_op("senseflow::joint_qkv", mutates_args=())
def _op(
    tensors: Sequence[Tensor], weights: Sequence[Tensor], rope: Sequence[Tensor], parts: Sequence[int],
    norms: Sequence[bool], heads: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    return _forward(_views(tensors, parts), weights, rope, norms, heads, eps, parts[0] != 2)


@_op.register_fake
def _(tensors, weights, rope, parts, norms, heads, eps):
    views = _views(tensors, parts)
    batch, _, width = views[0][0].shape
    shape = (batch, sum(stream[0].shape[1] for stream in views), heads, width // heads)
    return [tensors[0].new_empty(shape) for _ in range(2 if parts[0] == 2 else 3)]


@torch.library.custom_op("senseflow::joint_qkv_backward", mutates_args=())
def _op_backward(
    grads: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor], rope: Sequence[Tensor],
    counts: Sequence[int], norms: Sequence[bool], heads: int, eps: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return _backward(grads, xs, weights, rope, counts, norms, heads, eps, needs)


@_op_backward.register_fake
def _(grads, xs, weights, rope, counts, norms, heads, eps, needs):
    batch, _, _, head_dim = grads[0].shape
    outs = [grads[0].new_empty(batch, n, len(grads) * heads * head_dim) for n, need in zip(counts, needs, strict=False) if need]
    spread = _spread(weights, norms)
    return outs + [torch.empty_like(w) for w, need in zip(spread, needs[len(counts) :], strict=True) if need and w is not None]


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    tensors, weights, rope, parts, norms, heads, eps = inputs
    views = _views(tensors, parts)
    ctx.save_for_backward(*_normed(views, norms), *weights, *rope)
    ctx.call, ctx.counts = Call(tuple(parts), tuple(norms), heads, eps), [stream[0].shape[1] for stream in views]


def _op_autograd(ctx: Any, grads: Sequence[Tensor]):
    (parts, norms, heads, eps), saved = ctx.call, ctx.saved_tensors
    n = sum(norms)
    xs, weights, rope = list(saved[:n]), list(saved[n : 2 * n]), list(saved[2 * n :])
    needs = _needs(ctx.needs_input_grad[0], ctx.needs_input_grad[1], parts, norms)
    found = _op_backward(list(grads), xs, weights, rope, ctx.counts, norms, heads, eps, needs)
    return *_gradients(found, needs, parts, norms), [None] * len(rope), None, None, None, None


_op.register_autograd(_op_autograd, setup_context=_setup_context)


# -- public --------------------------------------------------------------------------------------------------------


def joint_qkv(
    streams: Sequence[QKV], heads: int, *, rope: Rope | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of joint attention, each [B, N, heads, head_dim], N the streams' tokens together, q's dtype.

    streams: one or two, in the order in which their tokens stand in the sequence (FLUX: text first; SD3: image first),
    of one batch, width, dtype and device. rope: cos and sin, [N, head_dim], in that order too, as diffusers' FLUX makes
    them (interleaved pairs); no gradient to them. `.transpose(1, 2)` is what scaled_dot_product_attention takes.

    Arithmetic in fp32 (fp64 for fp64 inputs), rounded once: diffusers' modules round after the norm and after the
    weight as well. Contiguous, but for v of one stream: that is a view of the stream's own. The gradients of a stream's
    q, k and v are views of one packed buffer; a packed stream's is that buffer. Raises ValueError for other shapes.
    """
    _check(streams, heads, rope)
    table = [] if rope is None else list(rope)
    weights = [w for s in streams for w in (s.q_weight, s.k_weight)]
    present = [w for w in weights if w is not None]
    tensors, parts = [], []
    for s in streams:
        mine = [s.q] if s.k is None or s.v is None else [s.q, s.k] if len(streams) == 1 else [s.q, s.k, s.v]
        tensors += mine
        parts.append(len(mine))
    if not fused("joint_qkv", *tensors, *present, *table):
        return joint_qkv_reference(streams, heads, rope, eps)
    call = Call(parts, [w is not None for w in weights], heads, eps)
    if torch.compiler.is_compiling():
        out = _op(tensors, present, table, *call)
    else:
        out = _JointQKV.apply(call, table, *tensors, *present)
    if parts == [2]:
        v = streams[0].v
        assert v is not None
        return *out, v.unflatten(-1, (heads, -1))  # type: ignore[return-value]
    return tuple(out)  # type: ignore[return-value]
