"""The adaLN family, every kernel really launched (interpreter, or the GPU): against fp64, diffusers, the torch path."""

import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulate_truth import BF16, FORMS, FP16, FP32, HALF, assert_rounded_once, call, exact, flat, gradients, inputs

from senseflow_kernels import (
    _adaln,
    _launch,
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
    layer_norm_modulate2,
)
from senseflow_kernels.modulate import _op


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter takes its time per program, not per element."""
    if _launch.INTERPRET:
        monkeypatch.setattr(_adaln, "SUM_COLUMNS", 4096)


DTYPES = [  # x, vectors, branch
    *((form, FP32, FP32, FP32) for form in FORMS),
    *((form, BF16, BF16, BF16) for form in ("modulate2", "2 gates+modulate")),
    ("gate+modulate", FP16, FP16, FP16), ("gate+modulate", FP32, BF16, BF16), ("gate+modulate", BF16, FP32, BF16),
]  # fmt: skip


@pytest.mark.parametrize("form, x, vectors, branch", DTYPES, ids=lambda v: str(v).removeprefix("torch."))
def test_values_and_gradients_against_fp64(form, x, vectors, branch, device):
    """Two pieces, the second mostly masked; two programs a sample in the backward; x and branches strided."""
    groups = inputs(form, (1, 5, 1096), x, vectors, device, branch=branch)
    before = _launch.launches.copy()
    out = call(form, groups)
    dout, grads = gradients(out, groups)
    assert _launch.launches - before == {"modulate": 1, "modulate_backward": 1, "modulate_sums": 1}
    assert [t.dtype for t in out] == [x] * len(out)
    assert [t.dtype for t in grads] == [t.dtype for t in flat(groups)]
    assert_rounded_once([*out, *grads], *exact(groups, dout, out[0].detach()))


@pytest.mark.parametrize("shape", [(3, 21, 40), (1, 1, 1), (2, 3, 7), (2, 5, 1000)])
def test_other_shapes_against_fp64(shape, device):
    """Several tokens a program, columns that no vector fits, one column alone (its variance is 0)."""
    groups = inputs("gate+modulate", shape, device=device)
    out = call("gate+modulate", groups)
    dout, grads = gradients(out, groups)
    assert_rounded_once([*out, *grads], *exact(groups, dout, out[0].detach()))


def test_the_fused_form_stores_what_gate_residual_gives(device):
    groups = inputs("gate+modulate", (2, 5, 72), BF16, device=device)
    x_new, y = call("gate+modulate", groups)
    (x,), (gate,), (branch,), (scale,), (shift,) = groups
    alone = gate_residual(x, gate, branch)
    assert torch.equal(x_new, alone)
    again = layer_norm_modulate(alone, scale, shift)
    # the same numbers in another kernel: their sums may take another order, which moves few roundings to bf16
    assert ((y.double() - again.double()).abs() <= 2 * HALF[BF16] * y.double().abs() + 1e-5).all()


def test_transposed_columns_are_copied(device):
    groups = inputs("modulate", (2, 6, 48), device=device)
    x = groups[0][0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = layer_norm_modulate(x, groups[3][0], groups[4][0])
    dout = torch.ones_like(out).expand(2, 6, 48)
    want = call("modulate", groups)
    assert torch.equal(out, want[0])
    (dx,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(dx, torch.autograd.grad(want, groups[0], [dout])[0])
    (dx,) = torch.autograd.grad(layer_norm_modulate(x, groups[3][0], groups[4][0]).sum(), x)  # a gradient of stride 0
    assert torch.equal(dx, torch.autograd.grad(call("modulate", groups), groups[0], [torch.ones_like(out)])[0])


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_against_diffusers(path, device):
    """SD 3.5's dual norm and the final norm as diffusers has them, values and the gradients of x and embedding."""
    from diffusers.models.normalization import AdaLayerNormContinuous, SD35AdaLayerNormZeroX

    x = torch.randn(2, 4, 64, device=device, requires_grad=True)
    emb = torch.randn(2, 64, device=device, requires_grad=True)
    dual = SD35AdaLayerNormZeroX(64).to(device)
    final = AdaLayerNormContinuous(64, 64, elementwise_affine=False, eps=1e-6).to(device)

    def ours():
        shift, scale, _, _, _, _, shift2, scale2, _ = dual.linear(dual.silu(emb)).chunk(9, 1)
        last_scale, last_shift = final.linear(final.silu(emb)).chunk(2, 1)
        return *layer_norm_modulate2(x, scale, shift, scale2, shift2), layer_norm_modulate(x, last_scale, last_shift)

    out = dual(x, emb)
    want = (out[0], out[5], final(x, emb))
    with _launch.torch_path() if path == "torch" else _launch.strict():
        got = ours()
    dout = [torch.randn_like(w) for w in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # values of order 1, a few dozen eps
    for a, b in zip(torch.autograd.grad(got, (x, emb), dout), torch.autograd.grad(want, (x, emb), dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# form, inputs with a gradient by group (x, gates, branches, scales, shifts), launches of the backward
SUBSETS = [
    ("gate+modulate", "x", 1), ("gate+modulate", "branches", 1), ("gate+modulate", "x branches", 1),
    ("gate+modulate", "gates", 2), ("gate+modulate", "scales shifts", 2), ("gate+modulate", "x gates shifts", 2),
    ("modulate2", "x", 1), ("modulate2", "scales", 2), ("gate", "x", 0), ("gate", "branches", 1), ("gate", "gates", 2),
]  # fmt: skip


@pytest.mark.parametrize("form, names, launched", SUBSETS)
def test_only_what_needs_a_gradient(form, names, launched, device):
    """The same values as with all gradients, without the launches and partials of those nobody wants."""
    groups = inputs(form, (1, 5, 64), BF16, device=device)
    _, want = gradients(call(form, groups), groups)
    keep = [name in names.split() for name in ("x", "gates", "branches", "scales", "shifts")]
    some = [[t.detach().requires_grad_(k) for t in group] for group, k in zip(groups, keep, strict=True)]
    out = call(form, some)
    g = torch.Generator().manual_seed(1)
    dout = [torch.randn(o.shape, generator=g).to(o) for o in out]
    before = _launch.launches.total()
    torch.autograd.backward(out, dout)
    assert _launch.launches.total() - before == launched
    for t, w in zip(flat(some), want, strict=True):
        assert t.grad is None if not t.requires_grad else torch.equal(t.grad, w)


@pytest.mark.parametrize("form, used", [("gate+modulate", 0), ("gate+modulate", 1), ("modulate2", 0), ("modulate2", 1)])
def test_an_output_nobody_uses(form, used, device):
    groups = inputs(form, (1, 3, 64), device=device)
    out = call(form, groups)
    zero = [torch.zeros_like(o) for o in out]
    zero[used] = torch.randn_like(out[used])
    want = torch.autograd.grad(out, flat(groups), zero)
    got = torch.autograd.grad(call(form, groups)[used], flat(groups), zero[used], allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert not b.any() if a is None else torch.equal(a, b)


def test_runs_are_identical(device):
    groups = inputs("2 gates+modulate", (2, 9, 40), BF16, device=device)
    runs = []
    for _ in range(2):
        out = call("2 gates+modulate", groups)
        runs.append([*out, *gradients(out, groups)[1]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_the_torch_path(form, device):
    groups = [[t.detach().double().requires_grad_() for t in g] for g in inputs(form, (2, 2, 3), device=device)]
    ends = [0, *torch.tensor([len(g) for g in groups]).cumsum(0).tolist()]

    def run(*tensors):
        return tuple(call(form, [list(tensors[a:b]) for a, b in pairwise(ends)]))

    assert torch.autograd.gradcheck(run, flat(groups), fast_mode=True)


def test_a_second_derivative_of_the_kernels_is_an_error(device):
    groups = inputs("modulate", (1, 4, 16), device=device)
    (dx,) = torch.autograd.grad(call("modulate", groups)[0].square().sum(), groups[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("form", ["modulate2", "gate", "gate+modulate"])
def test_opcheck_and_compile(form, device):
    """The registered op under torch's own checks; compiled without a graph break it gives the eager bits."""
    groups = inputs(form, (1, 2, 16), FP32, BF16, device)
    torch.library.opcheck(_op, (groups[0][0], *groups[1:], 1e-6))
    out = call(form, groups)
    compiled = torch.compile(lambda groups: call(form, groups), fullgraph=True, backend="aot_eager")(groups)
    want, got = ([*o, *gradients(o, groups)[1]] for o in (out, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 4, 16)])
def test_no_tokens(shape, device):
    groups = inputs("gate+modulate", shape, BF16, device=device)
    out = call("gate+modulate", groups)
    _, grads = gradients(out, groups)
    assert [t.shape for t in out] == [shape] * 2
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, flat(groups), strict=True))


def test_long_rows_and_fp64_run_in_torch_and_say_so(caplog, device):
    groups = inputs("modulate", (1, 2, 8200), device=device)
    _launch._said.clear()
    before = _launch.launches.total()
    with caplog.at_level(logging.INFO, "senseflow_kernels"):
        call("modulate", groups)
    assert _launch.launches.total() == before
    reason = "D is 8200, the kernel takes at most 8192"
    assert [r.message for r in caplog.records] == [f"modulate runs in torch, not in Triton: {reason}"]
    with _launch.strict(), pytest.raises(_launch.Unavailable, match=reason):
        call("modulate", groups)
    doubles = [[t.double() for t in g] for g in inputs("modulate", (1, 2, 8), device=device)]
    with _launch.strict(), pytest.raises(_launch.Unavailable, match="float64"):
        call("modulate", doubles)


def test_bad_arguments_are_named():
    x, v = torch.randn(2, 3, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"x must have shape \[B, N, D\]"):
        layer_norm_modulate(x[0], v, v)
    with pytest.raises(ValueError, match=r"shift must have shape \[2, 8\], got \[2, 4\]"):
        layer_norm_modulate(x, v, v[:, :4])
    with pytest.raises(ValueError, match="branch has shape"):
        gate_residual(x, v, x[:, :2])
    with pytest.raises(ValueError, match="floating"):
        gate_residual(x, v, x.long())
    with pytest.raises(ValueError, match="gate2 and branch2"):
        gate_residual_layer_norm_modulate(x, v, x, v, v, gate2=v)


def test_compiled_with_frozen_inputs_and_an_unused_output(device):
    """What the registered backward leaves out: x_new unused, gate and scale frozen."""
    groups = inputs("gate+modulate", (1, 2, 16), BF16, device=device)
    (x,), _, (branch,), _, (shift,) = groups
    groups = [[x], [groups[1][0].detach()], [branch], [groups[3][0].detach()], [shift]]
    compiled = torch.compile(lambda g: call("gate+modulate", g)[1], fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(y.square().sum(), (x, branch, shift))
                 for y in (call("gate+modulate", groups)[1], compiled(groups)))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


SPECIAL = [0.0, float("inf"), float("-inf"), float("nan")]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of inf - inf
@settings(max_examples=12)
@given(
    data=st.data(), form=st.sampled_from(list(FORMS)), batch=st.integers(1, 2), tokens=st.integers(1, 5),
    columns=st.integers(8, 40), x=st.sampled_from([FP32, BF16, FP16]), vectors=st.sampled_from([FP32, None]),
)  # fmt: skip
def test_any_input_like_the_torch_path(data, form, batch, tokens, columns, x, vectors):
    """NaN, infinities and rows of zeros, any small shape and mix of dtypes: the same numbers, the same NaN.

    From 8 columns on: dx is orthogonal to 1 and to xhat, so with 2 it is nothing but rounding.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups = inputs(form, (batch, tokens, columns), x, vectors, device, data.draw(st.integers(0, 99)))
    with torch.no_grad():
        for t in (*groups[0], *groups[2]):
            for _ in range(data.draw(st.integers(0, 2))):
                b, n = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, tokens - 1))
                special = data.draw(st.sampled_from(SPECIAL))
                if special == 0:
                    t[b, n] = 0
                else:
                    t[b, n, data.draw(st.integers(0, columns - 1))] = special
    out = call(form, groups)
    _, grads = gradients(out, groups)
    with _launch.torch_path():
        plain = call(form, groups)
        _, want = gradients(plain, groups)
    # A row of zeros has rstd = 1000, and so its gradients: compared with the largest of the tensor.
    rtol = {FP32: 1e-4, BF16: 2**-6, FP16: 2**-9}[x]
    for a, b in zip([*out, *grads], [*plain, *want], strict=True):
        size = torch.nan_to_num(b.detach().double().abs(), posinf=0.0).max().item()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * size, equal_nan=True)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", [(1, 4608, 3072), (1, 4429, 2432), (2, 333, 1536)])
@pytest.mark.parametrize("form", FORMS)
def test_real_sizes_against_fp64(form, shape, dtype, device):
    groups = inputs(form, shape, dtype, device=device)
    with _launch.strict():
        out = call(form, groups)
        dout, grads = gradients(out, groups)
    assert_rounded_once([*out, *grads], *exact(groups, dout, out[0].detach()))
    again = call(form, groups)
    assert all(torch.equal(a, b) for a, b in zip([*out, *grads], [*again, *gradients(again, groups)[1]], strict=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    """Rows beyond the reach of 32-bit offsets, forward and backward: the last as the same rows on their own."""
    tokens, columns = (2**31 // 3072) + 64, 3072
    if torch.cuda.mem_get_info()[0] < 8 * 2 * tokens * columns:
        pytest.skip("needs 35 GB of free GPU memory")
    scale, shift = torch.randn(2, 1, columns, device=device, dtype=BF16)
    x = torch.randn(1, tokens, columns, device=device, dtype=BF16).requires_grad_()
    y = layer_norm_modulate(x, scale, shift)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x.detach()[:, -32:].clone().requires_grad_()
    want = layer_norm_modulate(last, scale, shift)
    # one ulp of bf16, for kernels compiled for other strides; rows of another address differ altogether
    ulp = dict(rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(y[:, -32:], want, **ulp)
    torch.testing.assert_close(dx[:, -32:], torch.autograd.grad(want, last, want.detach())[0], **ulp)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_in_a_cuda_graph(form, device):
    groups = inputs(form, (2, 70, 192), BF16, device=device)

    def step():
        out = call(form, groups)
        return [*out, *torch.autograd.grad(out, flat(groups), [torch.ones_like(o) for o in out])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t, new in zip(flat(groups), flat(inputs(form, (2, 70, 192), BF16, device=device, seed=5)), strict=True):
            t.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
