"""joint_qkv against the formula in fp64 and diffusers' own attention processors: values, gradients, launches."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from senseflow_kernels import QKV, _launch, _qk_norm_rope, joint_qkv
from senseflow_kernels.qk_norm_rope import _op

EPS = torch.finfo(torch.float32).eps
BF16 = torch.bfloat16
HALF = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-25}  # half an ulp of values in [0.5, 1)
NORM_EPS = 1e-6


def make(
    counts, heads=3, head_dim=16, batch=1, dtype=torch.float32, weight_dtype=None, packed=(), norms=True, device="cpu",
    seed=0,
) -> tuple[list[QKV], list[Tensor]]:  # fmt: skip
    """(streams, leaves): every leaf wants its gradient. packed: which streams are packed; rows of different sizes."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, of=dtype) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, of).requires_grad_()

    streams, leaves = [], []
    for i, n in enumerate(counts):
        width = heads * head_dim
        weights = [leaf(head_dim, of=weight_dtype or dtype) if norms else None for _ in range(2)]
        tensors = [leaf(batch, n, 3 * width)] if i in packed else [leaf(batch, n, width) for _ in range(3)]
        streams.append(QKV.packed(*tensors, *weights) if i in packed else QKV(*tensors, *weights))
        leaves += [*tensors, *(w for w in weights if w is not None)]
    return streams, leaves


def table(tokens: int, head_dim: int, device="cpu", equal_pairs=True) -> tuple[Tensor, Tensor]:
    """cos and sin as diffusers' FLUX gives them; without equal_pairs any numbers."""
    if not equal_pairs:
        cos, sin = torch.randn(2, tokens, head_dim, generator=torch.Generator().manual_seed(5)).to(device)
        return cos, sin
    angle = torch.outer(torch.arange(tokens).double() + 1, 100.0 ** -torch.linspace(0, 1, head_dim // 2).double())
    return tuple(f(angle).repeat_interleave(2, 1).float().to(device) for f in (torch.cos, torch.sin))  # type: ignore


def doubled(streams) -> tuple[list[QKV], list[Tensor]]:
    """The same in fp64, leaves of their own."""
    copies = [QKV(*(None if t is None else t.detach().double().requires_grad_() for t in s)) for s in streams]
    return copies, [t for s in copies for t in s if t is not None]


def matrices(rope, tokens, head_dim, device) -> Tensor:
    """RoPE as one [D, D] matrix a token, fp64; the identity without."""
    if rope is None:
        return torch.eye(head_dim, dtype=torch.float64, device=device).expand(tokens, -1, -1)
    cos, sin = (t.double() for t in rope)
    matrix = torch.diag_embed(cos)
    even = torch.arange(0, head_dim, 2, device=device)
    matrix[:, even, even + 1] = -sin[:, 0::2]
    matrix[:, even + 1, even] = sin[:, 1::2]
    return matrix


def by_definition(streams, heads, rope):
    """(q, k, v) in fp64, and of q and k the sums of absolute terms that make up each value."""
    total = sum(s.q.shape[1] for s in streams)
    outs, terms = [], []
    for i in range(3):
        rows = []
        for s in streams:
            x = s.views()[i].double().unflatten(-1, (heads, -1))
            w = (s.q_weight, s.k_weight, None)[i]
            rows.append(x if w is None else w.double() * x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt())
        y = torch.cat(rows, 1)
        matrix = matrices(rope if i < 2 else None, total, y.shape[-1], y.device)
        outs.append(torch.einsum("nij,bnhj->bnhi", matrix, y))
        terms.append(torch.einsum("nij,bnhj->bnhi", matrix.abs(), y.detach().abs()))
    return outs, terms


def gradient_terms(streams, heads, rope, grads) -> list[Tensor]:
    """For every leaf of `make` the sum of absolute terms that its gradient is made of, in fp64."""
    total, start, found = sum(s.q.shape[1] for s in streams), 0, []
    for s in streams:
        n = s.q.shape[1]
        of_x, of_w = [], []
        for i in range(3):
            x = s.views()[i].detach().double().unflatten(-1, (heads, -1))
            matrix = matrices(rope if i < 2 else None, total, x.shape[-1], x.device)[start : start + n]
            dy = torch.einsum("nij,bnhi->bnhj", matrix.abs(), grads[i][:, start : start + n].double().abs())
            w = (s.q_weight, s.k_weight, None)[i]
            if w is not None:
                r = (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
                hat, g = (x * r).abs(), dy * w.detach().double().abs()
                of_w.append((dy * hat).sum((0, 1, 2)))
                dy = r * (g + hat * (g * hat).mean(-1, keepdim=True))
            of_x.append(dy.flatten(2))
        found += ([torch.cat(of_x, -1)] if s.k is None else of_x) + of_w
        start += n
    return found


def close(value: Tensor, truth: Tensor, terms: Tensor, times: int) -> None:
    """|error| <= times eps of the absolute terms, and half an ulp of the value's dtype."""
    half = HALF[value.dtype] * torch.exp2(torch.frexp(truth.detach()).exponent.double())
    if value.dtype == torch.float16:
        half = half.clamp_min(2**-25)  # subnormals
    bound = times * EPS * terms + half
    error = (value.double() - truth).abs()
    assert value.shape == truth.shape and (error <= bound).all(), f"{(error / bound).max().item():.2f} of the bound"


def check(streams, leaves, heads, rope) -> None:
    """Outputs and every gradient against fp64.

    8 eps: a tree sum of D <= 128 squares (4 after the root), root, three products, RoPE's sum. 16 eps: two such sums
    and twice the products; weights: sums of at most some hundred rows, mostly in a tree.
    """
    out = joint_qkv(streams, heads, rope=rope)
    copies, wide = doubled(streams)
    truth, terms = by_definition(copies, heads, rope)
    for value, exact, size in zip(out, truth, terms, strict=True):
        close(value, exact, size, 8)
    assert torch.equal(out[2].double(), truth[2])  # v is copied
    grads = [torch.randn_like(o) for o in out]
    found = torch.autograd.grad(out, leaves, grads)
    exact = torch.autograd.grad(truth, wide, [g.double() for g in grads])
    for value, want, size in zip(found, exact, gradient_terms(streams, heads, rope, grads), strict=True):
        close(value, want, size, 16)


@pytest.mark.parametrize(
    ("counts", "rope", "kind"),
    [
        ((2, 1), True, dict(packed=(0, 1), batch=2)), ((1, 2), True, dict(head_dim=128, heads=2)),
        ((1, 2), False, dict(head_dim=64, packed=(1,))), ((3,), True, dict(packed=(0,))), ((2,), False, {}),
        ((2, 1), True, dict(heads=1, head_dim=6)), ((2, 1), True, dict(norms=False)),
        ((1, 1), False, dict(norms=False)),
        ((1, 2), True, dict(dtype=BF16, weight_dtype=torch.float32, packed=(0,))),
        ((2, 1), False, dict(dtype=torch.float16)),
    ],
    ids=lambda v: str(v).replace(" ", ""),
)  # fmt: skip
def test_values_and_gradients_against_fp64(counts, rope, kind, device):
    """One launch forward; backward one, and one for the weights."""
    streams, leaves = make(counts, device=device, **kind)
    heads, head_dim = kind.get("heads", 3), kind.get("head_dim", 16)
    cos_sin = table(sum(counts), head_dim, device, equal_pairs=head_dim != 6) if rope else None
    before = _launch.launches["joint_qkv"], _launch.launches["joint_qkv_backward"]
    check(streams, leaves, heads, cos_sin)
    launched = _launch.launches["joint_qkv"] - before[0], _launch.launches["joint_qkv_backward"] - before[1]
    assert launched == (1, 2 if kind.get("norms", True) else 1)


def test_one_norm_without_the_other(device):
    """Stream 0 norms k alone, stream 1 q alone."""
    streams, leaves = make((2, 1), device=device)
    streams = [streams[0]._replace(q_weight=None), streams[1]._replace(k_weight=None)]
    leaves = [leaves[i] for i in (0, 1, 2, 4, 5, 6, 7, 8)]
    check(streams, leaves, 3, table(3, 16, device))


def test_more_heads_than_a_tile_and_several_tokens_a_program(monkeypatch, device):
    """40 heads of 64 are two tiles of 32; 5 tokens over 2 programs."""
    monkeypatch.setattr(_qk_norm_rope, "PROGRAMS", 2)
    streams, leaves = make((1, 4), heads=40, head_dim=64, device=device)
    check(streams, leaves, 40, table(5, 64, device))


# -- diffusers -----------------------------------------------------------------------------------------------------


def compare(theirs, ours, leaves) -> None:
    """q, k, v and the gradients of a random functional of them, in fp32.

    Values are a few units: 1e-5 of them is 40 roundings where `check` counts about ten a side. The gradients go on
    through the same sums in both, so the error of their norm stays as small.
    """
    assert len(theirs) == len(ours) == 3
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    grads = [torch.randn_like(t) for t in theirs]
    found = [torch.autograd.grad(outs, leaves, grads, retain_graph=True) for outs in (theirs, ours)]
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() and a.norm() > 0


def projections(attn, image: Tensor, text: Tensor | None) -> list[QKV]:
    """The module's own projections and weights, image first."""
    found = [QKV(attn.to_q(image), attn.to_k(image), attn.to_v(image), attn.norm_q.weight, attn.norm_k.weight)]
    if text is not None:
        q, k, v = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        found.append(QKV(q, k, v, attn.norm_added_q.weight, attn.norm_added_k.weight))
    return found


def norm_leaves(attn) -> list[Tensor]:
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    norms = [getattr(attn, n) for n in names if getattr(attn, n, None) is not None]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    return [norm.weight for norm in norms]


@pytest.mark.parametrize("double_block", [True, False])
def test_diffusers_flux(double_block, monkeypatch, device):
    """What FluxAttnProcessor hands to attention, text first, with FluxPosEmbed's table; and the single block's."""
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    added = 32 if double_block else None
    attn = flux.FluxAttention(32, heads=2, dim_head=16, bias=True, eps=NORM_EPS, added_kv_proj_dim=added,
                              pre_only=not double_block).to(device)  # fmt: skip
    leaves = [*norm_leaves(attn), attn.to_q.weight, attn.to_k.bias, attn.to_v.weight]
    image, text = torch.randn(1, 3, 32, device=device), torch.randn(1, 2, 32, device=device)
    ids = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], device=device)
    rope = flux.FluxPosEmbed(10000, [4, 6, 6])(ids[0 if double_block else 2 :])
    seen = []
    monkeypatch.setattr(flux, "dispatch_attention_fn", lambda q, k, v, **_: seen.extend((q, k, v)) or v)
    attn.processor(attn, image, text if double_block else None, image_rotary_emb=rope)
    streams = projections(attn, image, text if double_block else None)[::-1]
    compare(seen, joint_qkv(streams, 2, rope=rope, eps=NORM_EPS), leaves)


@pytest.mark.parametrize("joint", [True, False])
def test_diffusers_sd3(joint, monkeypatch, device):
    """What JointAttnProcessor2_0 hands to attention, image first; and SD3.5's second attention, image alone."""
    module = pytest.importorskip("diffusers.models.attention_processor")
    attn = module.Attention(
        query_dim=32, heads=2, dim_head=16, qk_norm="rms_norm", eps=NORM_EPS, bias=True, out_dim=32,
        added_kv_proj_dim=32 if joint else None, context_pre_only=False if joint else None,
        processor=module.JointAttnProcessor2_0(),
    ).to(device)  # fmt: skip
    leaves = [*norm_leaves(attn), attn.to_q.weight, attn.to_k.bias, attn.to_v.weight]
    image, text = torch.randn(1, 3, 32, device=device), torch.randn(1, 2, 32, device=device)
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.extend((q, k, v))
        return attention(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    attn.processor(attn, image, text if joint else None)
    ours = joint_qkv(projections(attn, image, text if joint else None), 2, eps=NORM_EPS)
    compare(seen, [t.transpose(1, 2) for t in ours], leaves)


# -- numerics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """16-bit results are those of the same numbers in fp32, rounded once, to the bit. In the interpreter, whose sums
    run in one order; on a GPU fp32 and 16-bit tiles have different layouts, and the bound against fp64 says it."""
    if torch.cuda.is_available():
        pytest.skip("checked against fp64 on a GPU: test_values_and_gradients_against_fp64")
    results = []
    for fp32 in (False, True):
        streams, _ = make((1, 2), dtype=dtype)
        streams = [QKV(*(t.detach().to(torch.float32 if fp32 else dtype).requires_grad_() for t in s)) for s in streams]
        out = joint_qkv(streams, 3, rope=table(3, 16))
        g = torch.Generator().manual_seed(3)
        grads = [torch.randn(o.shape, generator=g).to(dtype).to(o.dtype) for o in out]
        results.append([*out, *torch.autograd.grad(out, [t for s in streams for t in s], grads)])
    for half, full in zip(*results, strict=True):
        assert half.dtype == dtype and full.dtype == torch.float32
        assert torch.equal(half, full.to(dtype))


def test_runs_are_identical(monkeypatch, device):
    monkeypatch.setattr(_qk_norm_rope, "PROGRAMS", 3)
    streams, leaves = make((2, 3), packed=(1,), device=device)
    rope = table(5, 16, device)
    grads = [torch.randn(1, 5, 3, 16, device=device) for _ in range(3)]
    runs = [(out := joint_qkv(streams, 3, rope=rope)) + torch.autograd.grad(out, leaves, grads) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# -- layouts -------------------------------------------------------------------------------------------------------


def test_views_in_and_strided_gradients_back(device):
    """q, k, v as views of a wider GEMM output with the batch inside; gradients as scaled_dot_product_attention's
    [B, heads, N, D]; a broadcast one, whose last stride is 0, is copied. All equal those of contiguous tensors."""
    wide = torch.randn(2, 2, 208, device=device).transpose(0, 1).requires_grad_()  # 3 * 48 of it are used
    weights = [torch.randn(16, device=device) for _ in range(2)]
    q, k, v = wide[..., 8:56], wide[..., 56:104], wide[..., 104:152]
    views = joint_qkv([QKV(q, k, v, *weights), QKV(q[:, :1], k[:, :1], v[:, :1], *weights)], 3)
    plain = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    dense = joint_qkv([QKV(*plain, *weights), QKV(*(t[:, :1] for t in plain), *weights)], 3)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(views, dense, strict=True))
    dq, dk = (torch.randn(2, 3, 3, 16, device=device).transpose(1, 2) for _ in range(2))
    dv = torch.randn(2, 3, 3, 1, device=device).expand(-1, -1, -1, 16)
    (found,) = torch.autograd.grad(views, wide, [dq, dk, dv])
    exact = torch.autograd.grad(dense, plain, [g.contiguous() for g in (dq, dk, dv)])
    assert torch.equal(found[..., 8:152], torch.cat(exact, -1))
    assert not found[..., :8].any() and not found[..., 152:].any()


def test_gradients_are_views_of_one_buffer_a_stream(device):
    """And a packed stream's gradient is the buffer: no cat behind a chunk."""
    streams, leaves = make((1, 2), packed=(1,), norms=False, device=device)
    out = joint_qkv(streams, 3)
    dq, dk, dv, packed = torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])
    starts = [t.data_ptr() - dq.data_ptr() for t in (dq, dk, dv)]
    assert starts == [0, 48 * 4, 96 * 4] and {t.stride() for t in (dq, dk, dv)} == {(144, 144, 1)}
    assert packed.is_contiguous() and packed.shape == (1, 2, 144)


def test_one_stream_passes_v_by(device):
    """v of one stream is a view, packed or not; the gradient of a separate v is what came in."""
    for packed in ((), (0,)):
        (stream,), leaves = make((2,), packed=packed, norms=False, device=device)
        out = joint_qkv([stream], 3)
        assert out[2].data_ptr() == stream.views()[2].data_ptr() and torch.equal(out[2].flatten(2), stream.views()[2])
        grads = [torch.randn_like(out[0]) for _ in out]
        found = torch.autograd.grad(out, leaves, grads)
        assert torch.equal(torch.cat(found, -1), torch.cat([g.flatten(2) for g in grads], -1))


@pytest.mark.parametrize("want", [(0,), (3,), (4, 5), (8, 9), (2, 7)], ids=str)
def test_needs_input_grad(want, device):
    """Only what is asked for: no partial sums of frozen weights, no second launch without any."""
    streams, leaves = make((1, 2), device=device)
    rope = table(3, 16, device)
    grads = [torch.randn(1, 3, 3, 16, device=device) for _ in range(3)]
    every = torch.autograd.grad(joint_qkv(streams, 3, rope=rope), leaves, grads)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in want)
    before = _launch.launches["joint_qkv_backward"]
    found = torch.autograd.grad(joint_qkv(streams, 3, rope=rope), [leaves[i] for i in want], grads)
    for value, i in zip(found, want, strict=True):
        torch.testing.assert_close(value, every[i], rtol=1e-5, atol=1e-5)  # another kernel may contract otherwise
    weights = any(i % 5 > 2 for i in want)
    assert _launch.launches["joint_qkv_backward"] - before == 1 + weights


def test_unused_output_and_what_is_saved(device):
    """A loss of q alone; and the graph holds the pre-norm q and k, weights and table, not v nor a copy."""
    streams, leaves = make((1, 1), packed=(1,), device=device)
    rope = table(2, 16, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        q, _, _ = joint_qkv(streams, 3, rope=rope)
    inputs = {t.untyped_storage().data_ptr() for t in (*leaves, *rope)}
    assert {t.untyped_storage().data_ptr() for t in saved} <= inputs
    assert streams[0].v.data_ptr() not in {t.data_ptr() for t in saved}  # type: ignore[union-attr]
    dv = torch.autograd.grad(q.square().sum(), leaves)[2]
    assert torch.equal(dv, torch.zeros_like(dv))


# -- paths ---------------------------------------------------------------------------------------------------------


def test_torch_path_in_fp64_against_the_formula_and_by_finite_differences():
    streams, leaves = make((2, 1), heads=2, head_dim=4, dtype=torch.float64, packed=(1,))
    rope = table(3, 4, equal_pairs=False)

    def run(*_):
        return joint_qkv(streams, 2, rope=rope)

    truth, _ = by_definition(streams, 2, rope)
    for value, exact in zip(run(), truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("counts", [(3, 2), (4,)])
def test_torch_path_against_fp64(counts, dtype, device):
    """The path a CPU takes, at the same bounds; its layouts too."""
    for packed in ((), (0,)):
        streams, leaves = make(counts, batch=2, dtype=dtype, packed=packed, device=device)
        with _launch.torch_path():
            check(streams, leaves, 3, table(sum(counts), 16, device))
            q, k, v = joint_qkv(streams, 3)
        assert q.is_contiguous() and k.is_contiguous() and (len(counts) == 1 or v.is_contiguous())


def test_other_paths_say_so(caplog, monkeypatch, device):
    streams, _ = make((1, 1), device=device)
    _launch._said.clear()
    with caplog.at_level(logging.INFO, "senseflow_kernels"):
        with _launch.torch_path():
            for _ in range(2):
                joint_qkv(streams, 3)
        monkeypatch.setattr(_launch, "triton", None)
        joint_qkv(streams, 3)
    assert [r.message for r in caplog.records] == [
        "joint_qkv runs in torch, not in Triton: the torch path was asked for",
        "joint_qkv runs in torch, not in Triton: Triton is not installed",
    ]
    monkeypatch.undo()
    with _launch.strict(), pytest.raises(_launch.Unavailable, match="float64"):
        joint_qkv(doubled(streams)[0], 3)


def test_bad_arguments_are_named():
    streams, _ = make((2, 3))
    cos, sin = table(5, 16)
    first, second = streams
    assert first.k is not None
    bad = [
        ([], dict(), "one or two"), ([first] * 3, dict(), "one or two"),
        ([first._replace(k=None), second], dict(), "stream 0: k and v"),
        ([first, second._replace(v=first.v)], dict(), "stream 1: v has shape"),
        ([first, second._replace(k=second.q.bfloat16())], dict(), "stream 1: k is torch.bfloat16"),
        ([first, QKV(*(t[..., :32] for t in second[:3]))], dict(), "stream 1: batch and width"),
        ([first, second._replace(q_weight=torch.ones(8))], dict(), "stream 1: q_weight must be of shape"),
        ([QKV.packed(torch.zeros(1, 2, 50))], dict(), "stream 0: q must be"),
        ([QKV(*(t[:, :0] for t in first[:3]))], dict(), "no tokens"),
        (streams, dict(heads=5), "not 5 heads"), (streams, dict(rope=(cos[1:], sin[1:])), "rope must be"),
    ]  # fmt: skip
    for given_streams, options, message in bad:
        with pytest.raises(ValueError, match=message):
            joint_qkv(given_streams, **{"heads": 3, **options})


# -- torch.library and torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["two", "packed", "one"])
def test_opcheck(kind, device):
    counts = (1,) if kind == "one" else (1, 1)
    streams, _ = make(counts, heads=1, head_dim=4, dtype=BF16, packed=(0,) if kind == "packed" else (), device=device)
    tensors = [t for s in streams for t in s[: 2 if kind == "one" else 3] if t is not None]
    parts = {"two": [3, 3], "packed": [1, 3], "one": [2]}[kind]
    weights = [w for s in streams for w in s[3:] if w is not None]
    rope = [] if kind == "packed" else list(table(len(counts), 4, device))
    torch.library.opcheck(_op, (tensors, weights, rope, parts, [True] * len(weights), 1, NORM_EPS))


@pytest.mark.parametrize(("counts", "packed"), [((2, 1), (1,)), ((2,), ()), ((2,), (0,))], ids=str)
def test_compiles_without_a_graph_break(counts, packed, device):
    streams, leaves = make(counts, packed=packed, device=device)
    leaves[-1].requires_grad_(False)
    wanted = leaves[:-1]
    rope = table(sum(counts), 16, device)

    def loss(streams):
        q, k, v = joint_qkv([s._replace(q=2 * s.q) for s in streams], 3, rope=rope)
        return (q * k.square() * v).sum()

    eager = torch.autograd.grad(loss(streams), wanted)
    before = _launch.launches["joint_qkv"]
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(streams), wanted)
    assert _launch.launches["joint_qkv"] == before + 1
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@settings(max_examples=10)
@given(
    counts=st.lists(st.integers(1, 2), min_size=1, max_size=2), batch=st.integers(1, 2), heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 10, 32]), norms=st.booleans(), rope=st.booleans(), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, BF16, torch.float16]), packed=st.sets(st.integers(0, 1)),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)  # fmt: skip
def test_any_shape_is_the_formula(counts, batch, heads, head_dim, norms, rope, seed, dtype, packed, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    streams, leaves = make(counts, heads, head_dim, batch, dtype, None, packed, norms, device, seed)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(scale if leaf.dim() == 3 else 1)
    check(streams, leaves, heads, table(sum(counts), head_dim, device, equal_pairs=seed % 2 == 0) if rope else None)


# -- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["FLUX", "FLUX single", "SD3.5 Large"])
def test_at_full_size_against_the_torch_path(kind, device):
    """bf16 at 1024 px: outputs within an ulp of torch's fp32 arithmetic on the same numbers, weights by their norm."""
    counts, heads, head_dim = {"FLUX": ((512, 4096), 24, 128), "FLUX single": ((4608,), 24, 128),
                               "SD3.5 Large": ((4096, 333), 38, 64)}[kind]  # fmt: skip
    streams, leaves = make(counts, heads, head_dim, dtype=BF16, packed=range(len(counts)), device=device)
    rope = table(sum(counts), head_dim, device) if head_dim == 128 else None
    out = joint_qkv(streams, heads, rope=rope)
    grads = [torch.randn_like(o.transpose(1, 2).contiguous()).transpose(1, 2) for o in out]
    found = torch.autograd.grad(out, leaves, grads)
    with _launch.torch_path():
        want = joint_qkv(streams, heads, rope=rope)
        exact = torch.autograd.grad(want, leaves, grads)
    for a, b in zip(out, want, strict=True):
        # Two fp32 results a few eps apart round to the same bf16 or to neighbours; 1e-5 where RoPE's terms, a few
        # units at most, cancel.
        assert ((a.float() - b.float()).abs() <= 2**-7 * b.float().abs() + 1e-5).all()
    for a, b in zip(found, exact, strict=True):
        # Both round once, to neighbours at worst; nearly all to the same.
        assert (a.float() - b.float()).norm() <= 2**-10 * b.float().norm()


@pytest.mark.gpu
def test_in_a_cuda_graph(device):
    streams, leaves = make((64, 256), 4, 128, dtype=BF16, packed=(1,), device=device)
    rope = table(320, 128, device)
    grads = [torch.randn(1, 320, 4, 128, device=device).to(BF16) for _ in range(3)]

    def step():
        out = joint_qkv(streams, 4, rope=rope)
        return (*out, *torch.autograd.grad(out, leaves, grads))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        _, new = make((64, 256), 4, 128, dtype=BF16, packed=(1,), device=device, seed=seed)
        with torch.no_grad():
            for t, n in zip(leaves, new, strict=True):
                t.copy_(n)
        graph.replay()
        got = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))
