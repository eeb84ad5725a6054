"""Queries, keys and values of joint attention: RMSNorm of q and k, RoPE, both streams in one sequence.

With x a head's row of D values, w its stream's weight and c, s the token's rows of the RoPE table:

    y = w x / sqrt(mean(x^2) + eps),   out = c y + s turned(y),   turned(y)[2i] = -y[2i+1],  turned(y)[2i+1] = y[2i]

One launch reads q, k and v of every stream (views of a GEMM's packed output) and writes [B, N, heads, D]. The backward
is one more, which writes d(q, k, v) into one packed buffer a stream, and a small one where a weight wants its gradient.
It saves the pre-norm views alone: rstd comes from values it reads anyway, so keeping it would only add bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from senseflow_kernels._launch import fused, traced
from senseflow_kernels._qk_norm_rope import launch_backward, launch_forward, spread

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
            if w is not None and (tuple(w.shape) != (width // heads,) or w.device != first.device):
                want = f"of shape [{width // heads}] on {first.device}"
                raise ValueError(f"stream {i}: {name} must be {want}, got {list(w.shape)} on {w.device}")
    tokens = sum(s.q.shape[1] for s in streams)
    if not tokens or not len(first):
        raise ValueError("no tokens: the streams are empty")
    if rope is not None:
        want = (tokens, streams[0].views()[0].shape[2] // heads)
        if want[1] % 2 or any(tuple(t.shape) != want or t.device != first.device for t in rope):
            got = [f"{list(t.shape)} on {t.device}" for t in rope]
            raise ValueError(f"rope must be cos and sin {list(want)} on {first.device}, head_dim even; got {got}")


# -- torch reference -----------------------------------------------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs. x: [B, N, heads, head_dim]; cos, sin: [N, head_dim], of x's dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos[:, None] + torch.stack((-odd, even), -1).flatten(-2) * sin[:, None]


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
                t if w is None else F.rms_norm(t, t.shape[-1:], w.to(fp), eps)
                for t, w in zip(tensors, weights, strict=True)
            ]
        out = joined(tensors)
        if rope is not None:
            out = rotated(out.to(fp), rope[0].to(fp), rope[1].to(fp))
        return out.to(dtype).contiguous()

    q = prepared([q for q, _, _ in views], [s.q_weight for s in streams])
    k = prepared([k for _, k, _ in views], [s.k_weight for s in streams])
    return q, k, joined([v for _, _, v in views])


# -- registration --------------------------------------------------------------------------------------------------


def _views(tensors: Sequence[Tensor], parts: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Per stream (q, k, v), or (q, k) where v passes by."""
    rest = iter(tensors)
    return [next(rest).chunk(3, -1) if n == 1 else tuple(next(rest) for _ in range(n)) for n in parts]


def _needs(of_tensors: Sequence[bool], of_weights: Sequence[bool], parts: Sequence[int], norms: Sequence[bool]):
    """What launch_backward is told: a stream that any of its tensors needs, a weight that is there and needed."""
    tensors, weights = iter(of_tensors), iter(of_weights)
    return [any([next(tensors) for _ in range(n)]) for n in parts] + [norm and next(weights) for norm in norms]


def _gradients(found: Sequence[Tensor], needs: Sequence[bool], parts: Sequence[int], norms: Sequence[bool]):
    """(of tensors, of weights) in the inputs' order, None where not needed."""
    rest = iter(found)
    by_need = [next(rest) if need else None for need in needs]
    tensors: list[Tensor | None] = []
    for n, packed in zip(parts, by_need, strict=False):
        tensors += [packed] if n == 1 else [None] * n if packed is None else packed.chunk(n, -1)
    return tensors, [g for g, norm in zip(by_need[len(parts) :], norms, strict=True) if norm]


def _normed(views: Sequence[tuple[Tensor, ...]], norms: Sequence[bool]) -> list[Tensor]:
    """The pre-norm q and k that the backward reads."""
    return [t for t, norm in zip((t for stream in views for t in stream[:2]), norms, strict=True) if norm]


class _JointQKV(torch.autograd.Function):
    """The eager path: no dispatcher between Python and the launch. flat: tensors, then weights."""

    @staticmethod
    def forward(ctx: Any, call: Call, rope: Sequence[Tensor], *flat: Tensor):
        tensors, weights = flat[: sum(call.parts)], flat[sum(call.parts) :]
        views = _views(tensors, call.parts)
        outs = launch_forward(views, weights, rope, call.norms, call.heads, call.eps, 3 if len(views) > 1 else 2)
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
        found = launch_backward(grads, xs, weights, rope, ctx.counts, norms, heads, eps, needs)
        of_tensors, of_weights = _gradients(found, needs, call.parts, norms)
        return None, None, *of_tensors, *of_weights


@torch.library.custom_op("senseflow::joint_qkv", mutates_args=())
def _op(
    tensors: Sequence[Tensor], weights: Sequence[Tensor], rope: Sequence[Tensor], parts: Sequence[int],
    norms: Sequence[bool], heads: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    return launch_forward(_views(tensors, parts), weights, rope, norms, heads, eps, 2 if parts[0] == 2 else 3)


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
    return launch_backward(grads, xs, weights, rope, counts, norms, heads, eps, needs)


@_op_backward.register_fake
def _(grads, xs, weights, rope, counts, norms, heads, eps, needs):
    batch, _, _, head_dim = grads[0].shape
    width = len(grads) * heads * head_dim
    outs = [grads[0].new_empty(batch, n, width) for n, need in zip(counts, needs, strict=False) if need]
    of_weights = zip(spread(weights, norms), needs[len(counts) :], strict=True)
    return outs + [torch.empty_like(w) for w, need in of_weights if need and w is not None]


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
    if traced(tensors[0]):
        out = _op(tensors, present, table, *call)
    else:
        out = _JointQKV.apply(call, table, *tensors, *present)
    if parts == [2]:
        v = streams[0].v
        assert v is not None
        return *out, v.unflatten(-1, (heads, -1))  # type: ignore[return-value]
    return tuple(out)  # type: ignore[return-value]
