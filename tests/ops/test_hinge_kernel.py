"""The fused hinge: the kernel really launched (interpreter, or the GPU), against fp64 and torch's autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from senseflow_kernels import _launch, hinge_discriminator, hinge_generator
from senseflow_kernels.hinge import _op

SIZES = [(7,), (300,), (1, 5, 9), (4100,)]  # one head takes several blocks


def heads(batch, sizes, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, *s, generator=g).to(device, dtype) for s in sizes]


def losses(real, fake, weight, dloss=1.0):
    """[L_D, means, accuracy, L_G] and the gradients of both losses."""
    real, fake = ([t.detach().clone().requires_grad_() for t in side] for side in (real, fake))
    d = hinge_discriminator(real, fake, weight)
    grads = list(torch.autograd.grad(dloss * d.loss, [*real, *fake]))
    generator = hinge_generator(fake, weight)
    grads += torch.autograd.grad(dloss * generator, fake)
    return [t.detach() for t in (*d, generator)], grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [True, False])
def test_against_fp64(dtype, weighted, device):
    real, fake = heads(3, SIZES, dtype, device), heads(3, SIZES, dtype, device, seed=1)
    weight = torch.tensor([0.25, 1.0, 0.0], device=device) if weighted else None
    before = _launch.launches["hinge"]
    out, grads = losses(real, fake, weight, 0.1)
    assert _launch.launches["hinge"] == before + 2  # one for D with its gradients, one for G with its own
    want, exact = losses([t.double() for t in real], [t.double() for t in fake], weight, 0.1)
    assert _launch.launches["hinge"] == before + 2  # fp64 is torch's
    for a, b in zip(out, want, strict=True):
        # a mean of K terms of size up to 8, summed in blocks: eps * 8 leaves room; cancellation sets no smaller scale
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=8 * torch.finfo(torch.float32).eps)
    half = {torch.bfloat16: 2**-9, torch.float16: 2**-11, torch.float32: 0.0}[dtype]
    tiny = 2**-25 if dtype == torch.float16 else 0.0  # half of the smallest fp16 subnormal
    for a, b in zip(grads, exact, strict=True):
        assert a.dtype == dtype
        # omega / (B K) and the product with dloss: three fp32 roundings, then one to dtype
        assert ((a.double() - b).abs() <= (half + 3 * 2**-24) * b.abs() + tiny).all()


def test_the_last_program_alone_finishes_and_puts_the_counter_back(monkeypatch, device):
    """As of the score gradient."""
    from senseflow_kernels import hinge

    real, fake = heads(3, [(7,), (4100,)], device=device), heads(3, [(7,), (4100,)], device=device, seed=1)
    for start, end in ((0, 0), (-1, 3 * 3 * 4 - 1)):  # blocks of the larger head, samples, heads
        counter = torch.full((1,), start, dtype=torch.int32, device=device)
        monkeypatch.setattr(hinge, "ticket", lambda _, counter=counter: counter)
        hinge_discriminator(real, fake)
        assert counter.item() == end


def test_many_tiles_and_more_programs_than_the_last_reads_at_once(monkeypatch, device):
    from senseflow_kernels import hinge

    monkeypatch.setattr(hinge, "MAX_BLOCKS", 2)
    monkeypatch.setattr(hinge, "SLOTS", 8)
    real, fake = (heads(3, [(10_000,), (7,)], device=device, seed=seed) for seed in (0, 1))
    weight = torch.tensor([0.25, 1.0, 0.5], device=device)
    out, grads = losses(real, fake, weight)
    want, exact = losses([t.double() for t in real], [t.double() for t in fake], weight)
    for a, b in zip(out + grads, want + exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=8 * torch.finfo(torch.float32).eps)


def test_runs_are_identical(device):
    real, fake = heads(4, SIZES, device=device), heads(4, SIZES, device=device, seed=1)
    weight = torch.rand(4, generator=torch.Generator().manual_seed(0)).to(device)
    (a, ga), (b, gb) = losses(real, fake, weight), losses(real, fake, weight)
    assert all(torch.equal(x, y) for x, y in zip(a + ga, b + gb, strict=True))


SPECIAL = [0.0, 1.0, -1.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 1e-45]


@settings(max_examples=40)  # a launch of the interpreter takes 10 ms a program
@given(
    data=st.data(), batch=st.integers(1, 3), sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), weighted=st.booleans(),
    strided=st.booleans(),
)  # fmt: skip
def test_any_heads_like_the_reference(data, batch, sizes, dtype, weighted, strided):
    """Empty heads, infinities, NaN, margins hit exactly, strides."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(n, 2) for n in sizes]
    real, fake = heads(batch, shapes, dtype, device), heads(batch, shapes, dtype, device, seed=1)
    for t in (*real, *fake):
        if t.numel() and data.draw(st.booleans()):
            t.view(-1)[data.draw(st.integers(0, t.numel() - 1))] = data.draw(st.sampled_from(SPECIAL))
    if strided:
        real, fake = ([t.transpose(1, 2).contiguous().transpose(1, 2) for t in side] for side in (real, fake))
    weight = torch.linspace(0.5, 2, batch, device=device) if weighted else None
    if not sum(sizes):
        with pytest.raises(ValueError, match="every head is empty"):
            hinge_discriminator(real, fake, weight)
        return
    out, grads = losses(real, fake, weight)
    with _launch.torch_path():
        want, exact = losses(real, fake, weight)
    # +3e38 and -3e38 cancel in one order of summation and swallow the rest in another
    values = torch.cat([t.flatten().float() for t in (*real, *fake)])
    largest = torch.nan_to_num(values, 0.0, 0.0, 0.0).abs().max().item()
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 + 1e-6 * largest, equal_nan=True)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_heads_of_different_dtypes(device):
    real, fake = heads(2, SIZES[:2], device=device), heads(2, SIZES[:2], device=device, seed=1)
    mixed = [t.to(d) for t, d in zip(real, (torch.bfloat16, torch.float32), strict=True)]
    out, grads = losses(mixed, fake, None)
    with _launch.torch_path():
        want, exact = losses(mixed, fake, None)
    for a, b in zip(out + grads, want + exact, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad, message", [
    (lambda r, f: ([], f), "no heads"),
    (lambda r, f: (r, f[:1]), "different numbers of logits"),
    (lambda r, f: ([r[0][:1], r[1]], f), "different batches"),
    (lambda r, f: (r[0], f), "must be a list of heads"),
    (lambda r, f: (r, [f[0][0, 0]]), "heads must be"),
    (lambda r, f: (r, [f[0].int(), f[1]]), "floating dtype"),
    (lambda r, f: (r, f, 0.5), r"weight must have shape \[2\], got 0.5"),
    (lambda r, f: (r, f, r[0]), r"weight must have shape \[2\], got \[2, 7\]"),
    (lambda r, f: (r, f, torch.ones(2, device="meta")), "different devices"),
])  # fmt: skip
def test_bad_heads_are_refused(bad, message, device):
    real, fake = heads(2, SIZES[:2], device=device), heads(2, SIZES[:2], device=device, seed=1)
    with pytest.raises(ValueError, match=message):
        hinge_discriminator(*bad(real, fake))


@pytest.mark.parametrize("path", [_launch.strict, _launch.torch_path])
def test_logits_without_a_second_dimension_iterators_and_a_weight_with_gradient(path, device):
    """Heads [B]; the weight is a constant on every path."""
    logits, weight = torch.tensor([-1.0, 3.0], device=device), torch.tensor([0.5, 2.0], device=device).requires_grad_()
    with path():
        loss = hinge_generator((t for t in [logits.requires_grad_()]), weight)
        assert hinge_discriminator(iter([logits]), iter([logits]), weight).loss.item() == (0.5 * 2 + 2 * 4) / 2
    loss.backward()
    assert loss.item() == -(0.5 * -1 + 2 * 3) / 2
    assert weight.grad is None and logits.grad.tolist() == [-0.25, -1.0]


@pytest.mark.parametrize("path", [_launch.strict, _launch.torch_path])
def test_second_derivative_is_that_of_what_comes_after(path, device):
    """The hinge is linear in pieces: d^2 L^2 / dD^2 = 2 (dL/dD)^2, both ways of dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        head, other = torch.tensor([[-1.0, 0.5]], device=device), torch.tensor([[2.0]], device=device)
        head, other = head.to(dtype).requires_grad_(), other.requires_grad_()
        with path():
            (first,) = torch.autograd.grad(hinge_generator([head, other]).square(), head, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), head)
        torch.testing.assert_close(second, torch.full_like(head, 2 * 2 / 9), rtol=2**-7, atol=0)


@pytest.mark.parametrize("sides", ["both", "fake"])
def test_opcheck(sides, device):
    real = heads(2, SIZES[:2], device=device) if sides == "both" else []
    fake = heads(2, SIZES[:2], device=device, seed=1)
    for t in (*real, *fake):
        t.requires_grad_()
    torch.library.opcheck(_op, (real, fake, torch.tensor([0.5, 2.0], device=device)))


def test_compiles_without_a_graph_break(device):
    real, fake = heads(2, SIZES[:3], device=device), heads(2, SIZES[:3], device=device, seed=1)
    weight = torch.tensor([0.5, 2.0], device=device)

    def both(*logits):
        return hinge_discriminator(logits[:3], logits[3:], weight).loss + 3 * hinge_generator(logits[3:], weight)

    grads = []
    for fn in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (*real, *fake)]
        fn(*leaves).backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_in_a_cuda_graph(device):
    real, fake = heads(4, SIZES, torch.bfloat16, device), heads(4, SIZES, torch.bfloat16, device, seed=1)
    weight = torch.rand(4, device=device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        losses(real, fake, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = losses(real, fake, weight)
    for t, n in zip(real, heads(4, SIZES, torch.bfloat16, device, seed=7), strict=True):
        t.copy_(n)
    graph.replay()
    want, exact = losses(real, fake, weight)
    assert all(torch.equal(a, b) for a, b in zip(out + grads, want + exact, strict=True))
