"""The fused score gradient: every kernel really launched (interpreter, or the GPU), against fp64 and the reference."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from senseflow_kernels import _launch, dmd_loss, score_gradient
from senseflow_kernels.score import _op, _op_gradient, score_gradient_reference

EPS = torch.finfo(torch.float32).eps
HALF = {torch.bfloat16: 2**-9, torch.float16: 2**-11, torch.float32: 2**-24}  # half an ulp, relative


def inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=g).to(device, dtype) for _ in range(5)]
    sigma, alpha, w = torch.rand(3, shape[0], generator=g).to(device)
    return tensors, dict(sigma=sigma + 0.01, alpha=alpha + 0.1, guidance=8 * w)


def launched(op: str) -> int:
    return _launch.launches[op]


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 20, 20), (3, 4, 7, 9), (64, 5), (2, 4100)])
def test_elementwise_against_fp64(kind, cfg, shape, device):
    """|error| <= 4 eps sum |terms|: the difference cancels, so its own size is no measure of its error."""
    (x, x_t, fake, cond, uncond), kw = inputs(shape, device=device)
    kw["guidance"] = kw["guidance"] if cfg else None
    before = launched("dmd_loss")
    out = score_gradient(x, x_t, fake, cond, uncond if cfg else None, parameterization=kind, **kw)
    assert launched("dmd_loss") == before + 1
    d = [t.double() for t in (x, x_t, fake, cond, uncond)]
    k = {n: None if v is None else v.double() for n, v in kw.items()}
    exact = score_gradient_reference(
        *d[:4], d[4] if cfg else None, k["sigma"], k["alpha"], k["guidance"], kind, "sample", 0.0
    )

    def column(s):
        return s.view(-1, *[1] * (x.dim() - 1))

    a = column(k["alpha"]) if kind == "epsilon" else 1.0
    teacher = d[4].abs() + column(k["guidance"]).abs() * (d[3].abs() + d[4].abs()) if cfg else d[3].abs()
    scale = column(k["sigma"]) / a
    terms = scale * (teacher + d[2].abs())
    parts = d[0].abs() + d[1].abs() / a + scale * teacher  # of |x - x0_real|
    n = x[0].numel()
    # the mean of n terms adds its rounding: 2 eps sqrt(n) is generous for block sums of 2048
    slack = (4 * EPS * parts).flatten(1).mean(1) + 2 * EPS * n**0.5 * exact.normaliser
    assert ((out.normaliser.double() - exact.normaliser).abs() <= slack).all()
    diff = exact.grad * column(exact.normaliser)
    error = (out.grad.double() * column(out.normaliser.double()) - diff).abs()
    assert (error <= 4 * EPS * terms + 2 * EPS * diff.abs()).all()  # 2 eps: the division and its inverse here
    assert (out.grad.double() - exact.grad).norm() <= 1e-6 * exact.grad.norm()
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_norm", ["sample", "batch"])
def test_half_precision_is_rounded_once(dtype, batch_norm, device):
    """dL/dx in bf16 is the fp32 result of the same numbers, rounded once, to the bit."""
    tensors, kw = inputs((3, 4, 9, 11), dtype, device)
    grads = []
    for scale in (dtype, torch.float32):
        x = tensors[0].detach().to(scale).requires_grad_()
        out = dmd_loss(x, *(t.to(scale) for t in tensors[1:]), normaliser=batch_norm, eps=1e-6, **kw)
        (1e3 * out.loss).backward()
        assert x.grad is not None and x.grad.dtype == scale
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1].to(dtype))


@pytest.mark.parametrize("parameterization", ["flow", "epsilon"])
def test_many_tiles(parameterization, monkeypatch, device):
    """A sample of more blocks than the last one reduces at once: programs take several tiles."""
    from senseflow_kernels import score

    monkeypatch.setattr(score, "MAX_BLOCKS", 2)
    tensors, kw = inputs((2, 11_000), device=device)
    out = dmd_loss(*tensors, parameterization=parameterization, **kw)
    with _launch.torch_path():
        want = dmd_loss(*tensors, parameterization=parameterization, **kw)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


SPECIAL = [0.0, -0.0, 1e-38, -1e-44, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 1.0, -2.5]


@given(
    data=st.data(), batch=st.integers(1, 3), n=st.integers(1, 40), cfg=st.booleans(), epsilon=st.booleans(),
    normaliser=st.sampled_from(["sample", "batch"]), eps=st.sampled_from([0.0, 1e-6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), strided=st.booleans(),
)  # fmt: skip
def test_any_input_like_the_reference(data, batch, n, cfg, epsilon, normaliser, eps, dtype, strided):
    """Zeros, infinities, NaN, huge and tiny values, strides: the same numbers, the same rules."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = data.draw(st.integers(0, 1000))
    tensors, kw = inputs((batch, n, 2), dtype, device, seed)
    for t in tensors:
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, batch * n * 2 - 1))
            t.view(-1)[at] = torch.tensor(data.draw(st.sampled_from(SPECIAL))).to(dtype)
    if strided:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    if not cfg:
        tensors[4], kw["guidance"] = None, None
    names = dict(parameterization="epsilon" if epsilon else "flow", normaliser=normaliser, eps=eps)
    out = score_gradient(*tensors, **names, **kw)
    with _launch.torch_path():
        want = score_gradient(*tensors, **names, **kw)
    # fma and the order of sums: a few eps of the largest term, through a division by the normaliser
    for a, b in ((out.normaliser, want.normaliser), (out.loss, want.loss)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-37, equal_nan=True)
    ordinary = want.grad.abs() < 1e37  # beyond, one eps decides between a number and the largest one
    size = want.grad[ordinary].abs().max() if ordinary.any() else 0.0
    bound = 1e-5 * torch.nan_to_num(want.grad.abs()).clamp(max=1e37) + 1e-5 * size
    assert ((out.grad - want.grad).abs() <= bound)[ordinary].all()
    assert (torch.sign(out.grad) == torch.sign(want.grad))[~ordinary].all()
    assert torch.isfinite(out.grad).all()


def test_the_rules_for_nan_and_infinity(device):
    """As torch.nan_to_num on diff / mean: by hand, sample by sample."""
    x = torch.zeros(6, 4, device=device)
    x_t, fake, cond = torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x)
    fake[0, 1] = float("inf")  # the mean knows nothing of fake: -inf -> the lowest number
    cond[1, 2] = float("nan")  # the mean is NaN: the whole sample is 0
    cond[2, 0] = float("inf")  # the mean is inf: 0 elsewhere, inf / inf = NaN -> 0
    x[3] = x_t[3]  # mean 0 and diff 0: 0 / 0 -> 0
    fake[4] = -1.0
    fake[5] = torch.tensor([torch.nan, -2.0, -2.0, -2.0])  # that element is 0, in g as in its rms
    out = dmd_loss(x.requires_grad_(), x_t, fake, cond, sigma=torch.ones(6, device=device))
    g = score_gradient(x.detach(), x_t, fake, cond, sigma=torch.ones(6, device=device)).grad
    lowest = torch.finfo(torch.float32).min
    want = torch.zeros(6, 4)
    want[0, 1], want[4], want[5, 1:] = lowest, 1.0, 2.0
    assert torch.equal(g.cpu(), want)
    torch.testing.assert_close(out.grad_rms[1:].cpu(), torch.tensor([0, 0, 0, 1, 3**0.5]), rtol=1e-6, atol=0)
    assert out.grad_rms[0] == float("inf")
    assert torch.isinf(out.loss)


@pytest.mark.parametrize("normaliser", ["sample", "batch"])
def test_an_eps_as_large_as_the_normaliser(normaliser, device):
    """It counts in g, in the loss and in the rms."""
    tensors, kw = inputs((3, 5, 7), device=device)
    options = dict(normaliser=normaliser, eps=1.5, **kw)
    x = tensors[0].clone().requires_grad_()
    out = dmd_loss(x, *tensors[1:], **options)
    out.loss.backward()
    wide = [t.double() for t in (*tensors, kw["sigma"], kw["alpha"], kw["guidance"])]
    exact = score_gradient_reference(*wide, "flow", normaliser, 1.5)
    close = dict(rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(out.loss.double(), exact.loss, **close)
    torch.testing.assert_close(out.grad_rms.double(), exact.grad.square().flatten(1).mean(1).sqrt(), **close)
    torch.testing.assert_close(x.grad.double() * x.numel(), exact.grad, **close)


def test_the_last_program_alone_finishes_and_puts_the_counter_back(monkeypatch, device):
    """One that finishes before finds partial sums missing, on a GPU alone; a counter left would do so next time."""
    from senseflow_kernels import score

    tensors, kw = inputs((3, 4100), device=device)  # 3 blocks a sample
    for start, end in ((0, 0), (-1, 8)):  # with one missing nobody is the last
        counter = torch.full((1,), start, dtype=torch.int32, device=device)
        monkeypatch.setattr(score, "ticket", lambda _, counter=counter: counter)
        dmd_loss(*tensors, **kw)
        assert counter.item() == end


def test_runs_are_identical(device):
    tensors, kw = inputs((2, 4, 40, 40), device=device)
    first, second = (dmd_loss(*tensors, **kw) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fp64_and_the_torch_path_say_so(caplog, device):
    """Another path than the kernel: one line, once, the same values; strict makes it an error."""
    tensors, kw = inputs((2, 50), device=device)
    _launch._said.clear()
    before = launched("dmd_loss")
    with caplog.at_level(logging.INFO, "senseflow_kernels"), _launch.torch_path():
        plain = next(dmd_loss(*tensors, **kw) for _ in range(3))
    assert launched("dmd_loss") == before
    assert [r.message for r in caplog.records] == [
        "dmd_loss runs in torch, not in Triton: the torch path was asked for"
    ]
    for a, b in zip(plain, dmd_loss(*tensors, **kw), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    doubles, k = [t.double() for t in tensors], {n: v.double() for n, v in kw.items()}
    with _launch.strict(), pytest.raises(_launch.Unavailable, match="float64"):
        dmd_loss(*doubles, **k)


def test_dtensors_are_left_to_torch(caplog, device):
    """The address of a DTensor is nobody's."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,))
        tensors, kw = inputs((2, 5), device=device)
        placed = [DTensor.from_local(t, mesh, [Replicate()]) for t in (*tensors, *kw.values())]
        _launch._said.clear()
        with caplog.at_level(logging.INFO, "senseflow_kernels"):
            grad = score_gradient(*placed[:5], **dict(zip(kw, placed[5:], strict=True))).grad
        assert [r.message for r in caplog.records] == [
            "score_gradient runs in torch, not in Triton: the tensors are DTensors"
        ]
        torch.testing.assert_close(grad.to_local(), score_gradient(*tensors, **kw).grad, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_without_triton_one_line_and_the_same_values(monkeypatch, caplog, device):
    tensors, kw = inputs((2, 50), device=device)
    fused = score_gradient(*tensors, **kw)
    monkeypatch.setattr(_launch, "triton", None)
    _launch._said.clear()
    with caplog.at_level(logging.INFO, "senseflow_kernels"):
        plain = score_gradient(*tensors, **kw)
    assert [r.message for r in caplog.records] == [
        "score_gradient runs in torch, not in Triton: Triton is not installed"
    ]
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-5, atol=1e-6)
    assert _launch.reason_against(device) == "Triton is not installed"


def test_a_machine_without_gpu_says_so(monkeypatch):
    """Triton is there, the device is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not _launch.is_available()
    assert "sees no CUDA device" in str(_launch.reason_against("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cfg", [True, False])
def test_opcheck(dtype, cfg, device):
    tensors, kw = inputs((2, 3, 5, 5), dtype, device)
    tensors[0].requires_grad_()
    if not cfg:
        tensors[4], kw["guidance"] = None, None
    args = (*tensors, kw["sigma"], kw["alpha"], kw["guidance"], True, False, 1e-6)
    torch.library.opcheck(_op, args)
    torch.library.opcheck(_op_gradient, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])


def test_compiles_without_a_graph_break(device):
    tensors, kw = inputs((2, 3, 5, 5), device=device)

    def loss(x):
        return 2 * dmd_loss(2 * x, *tensors[1:], **kw).loss

    grads = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = tensors[0].clone().requires_grad_()
        fn(x).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    compiled = torch.compile(score_gradient, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*tensors, **kw), score_gradient(*tensors, **kw), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_a_cuda_graph(dtype, device):
    tensors, kw = inputs((2, 16, 32, 32), dtype, device)
    x = tensors[0].requires_grad_()

    def step():
        x.grad = None
        out = dmd_loss(x, *tensors[1:], **kw)
        out.loss.backward()
        return out.loss

    for _ in range(3):
        step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for seed in (1, 2):
        new, _ = inputs((2, 16, 32, 32), dtype, device, seed)
        with torch.no_grad():
            for t, n in zip(tensors, new, strict=True):
                t.copy_(n)
        graph.replay()
        got = (loss.clone(), x.grad.clone())
        want = step()
        assert torch.equal(got[0], want) and torch.equal(got[1], x.grad)
