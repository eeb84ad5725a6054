"""joint_attention against its formula in fp64: eager, compiled, on a GPU."""

import pytest
import torch
from attention_truth import BF16, FP32, assert_exact, gradients, relative, tensors

from senseflow_kernels import attention, attention_backend, available_backends, joint_attention
from senseflow_kernels._attention_probe import formula

ON_CPU = ["torch", "flash", "math"]


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Every test chooses anew and leaves nothing behind."""
    monkeypatch.setattr(attention, "_choices", {})
    monkeypatch.setattr(attention, "_verdicts", {})
    monkeypatch.setattr(attention, "_functions", {})
    monkeypatch.setattr(attention, "_forced", "auto")


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_values(backend, dtype):
    q, k, v, dout = tensors(dtype=dtype)
    assert_exact(lambda *qkv: joint_attention(*qkv, backend=backend), q, k, v, dout)
    assert_exact(lambda *qkv: joint_attention(*qkv, backend=backend, scale=0.7), q, k, v, dout, scale=0.7)


def test_formula_by_hand():
    """Two keys whose logits differ by ln 3: weights 1/4 and 3/4."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, torch.log(torch.tensor(3.0))]).view(1, 2, 1, 1)
    v = torch.tensor([8.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(formula(q, k, v), torch.full((1, 1, 1, 1), 5.0))
    torch.testing.assert_close(joint_attention(q, k, v), torch.full((1, 1, 1, 1), 5.0))


MASKS = {
    "keys": lambda: torch.rand(2, 1, 1, 47) > 0.3,
    "full": lambda: torch.rand(2, 3, 33, 47) > 0.3,
    "two dims": lambda: torch.rand(33, 47) > 0.3,
    "additive": lambda: torch.randn(1, 3, 33, 47),
    "additive of another dtype": lambda: torch.randn(1, 1, 33, 47, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_masks(backend, kind):
    mask = MASKS[kind]()
    q, k, v, dout = tensors()
    exact = mask if mask.dtype == torch.bool else mask.float().double()
    truth = gradients(lambda q, k, v: formula(q, k, v, exact), *(t.double() for t in (q, k, v, dout)))
    found = gradients(lambda q, k, v: joint_attention(q, k, v, mask=mask, backend=backend), q, k, v, dout)
    for value, expected in zip(found, truth, strict=True):
        assert relative(value, expected) <= 1e-6


@pytest.mark.parametrize("backend", ON_CPU)
def test_strides(backend):
    """Chunks of one packed projection, heads first in memory, a last dim that is not contiguous: all the same."""
    q, k, v, dout = tensors(rows=40, columns=40)
    packed = torch.cat([q, k, v], -1).view(2, 40, 3, 3, 16).transpose(2, 3).contiguous()
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    dim_first = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    for form in ([packed[:, :, i] for i in range(3)], heads_first, dim_first):
        out = joint_attention(*form, backend=backend)
        assert relative(out, formula(q.double(), k.double(), v.double())) <= 1e-6
        assert out.is_contiguous() and out.flatten(2).data_ptr() == out.data_ptr()
    assert_exact(
        lambda *qkv: joint_attention(*qkv, backend=backend), q, k, v, dout.transpose(0, 1).clone().transpose(0, 1)
    )


@pytest.mark.parametrize("dim", [1, 3, 20, 80, 256, 264])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (3, 200), (200, 2), (65, 129)])
def test_odd_sizes(rows, columns, dim):
    assert_exact(joint_attention, *tensors(1, rows, columns, dim=dim))


def test_nothing_to_attend():
    """Without queries or samples there is nothing; what sees no key is 0, as in torch's SDPA."""
    for batch, rows, columns in ((0, 3, 3), (2, 0, 5), (2, 5, 0)):
        q, k, v, dout = tensors(batch, rows, columns)
        out, *grads = gradients(joint_attention, q, k, v, dout)
        assert out.shape == q.shape and not out.any() and not any(g.any() for g in grads)


def test_meta_tensors():
    """Shapes alone: what counts FLOPs or memory ahead needs no trial, and could not run one."""
    q, k, v, _ = (t.to("meta") for t in tensors())
    assert joint_attention(q, k, v).shape == q.shape and joint_attention(q, k, v).is_meta


def test_autocast_casts_as_sdpa_does():
    q, k, v, _ = tensors()
    with torch.autocast("cpu", BF16):
        out = joint_attention(q, k, v.to(BF16))
    assert out.dtype == BF16
    assert torch.equal(out, joint_attention(q.to(BF16), k.to(BF16), v.to(BF16)))


def test_refusals():
    q, k, v, _ = tensors()
    with pytest.raises(ValueError, match=r"q must be \[B, N, H, D\]"):
        joint_attention(q[0], k, v)
    with pytest.raises(ValueError, match="q must be"):
        joint_attention(q, k, v[:, 1:])
    with pytest.raises(ValueError, match="differ in batch, heads or head size"):
        joint_attention(q[..., :8], k, v)
    with pytest.raises(ValueError, match="one dtype"):
        joint_attention(q, k, v.double())
    with pytest.raises(ValueError, match="mask must not require grad"):
        joint_attention(q, k, v, mask=torch.zeros(33, 47, requires_grad=True))


def test_global_random_state_and_grad_mode_are_left_alone():
    q, k, v, _ = tensors()
    before = torch.get_rng_state()
    with torch.inference_mode():
        joint_attention(q, k, v)
    with torch.no_grad():
        assert not joint_attention(q.requires_grad_(), k, v).requires_grad
    assert joint_attention(q, k, v).requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_inside_checkpointing():
    """The trial runs in the first forward alone: were its saved tensors counted, the recomputation would be refused."""
    q, k, v, dout = tensors()

    def checkpointed(*qkv):
        return torch.utils.checkpoint.checkpoint(joint_attention, *qkv, use_reentrant=False)

    assert_exact(checkpointed, q, k, v, dout)


# -- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "math", "flash"])
def test_compile_is_one_graph(backend):
    """The choice, and its trial, happen while tracing and leave nothing in the graph."""
    torch._dynamo.reset()
    compiled = torch.compile(joint_attention, backend="aot_eager", fullgraph=True)
    q, k, v, dout = tensors()
    assert_exact(lambda *qkv: compiled(*qkv, backend=backend), q, k, v, dout)
    mask = torch.rand(2, 1, 1, 47) > 0.3
    assert_exact(lambda *qkv: compiled(*qkv, mask=mask, backend=backend), q, k, v, dout, mask)


def test_compile_obeys_the_override():
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(joint_attention, backend=record, fullgraph=True)
    q, k, v, _ = tensors()
    compiled(q, k, v)
    with attention_backend("math"):
        compiled(q, k, v)
    compiled(q, k, v)
    assert len(graphs) == 2 and "sdpa_kernel" not in graphs[0] and "sdpa_kernel" in graphs[1]


def test_compile_with_dynamic_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(joint_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (33, 40, 64, 128):
        q, k, v, dout = tensors(rows=rows, columns=rows)
        assert_exact(compiled, q, k, v, dout)


# -- on a GPU ------------------------------------------------------------------------------------------------------

# tokens, heads, head size: FLUX and SD3.5 Large at 1024 px with few heads, odd text lengths, SDXL's, a cross-attention
SIZES = {
    "flux": (4608, 4608, 24, 128), "sd3.5": (4429, 4429, 38, 64), "sdxl": (4096, 4096, 10, 64),
    "64 modulo 128": (1088, 1088, 8, 64), "keys": (1000, 333, 8, 64),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", [*attention.BACKENDS, "auto"])
def test_gpu_values(backend, size, dtype):
    rows, columns, heads, dim = SIZES[size]
    device = torch.device("cuda")
    against = available_backends(device, dtype, dim, heads=heads, tokens=columns).get(backend)
    if against:
        pytest.skip(f"{backend}: {against}")
    q, k, v, dout = tensors(1, rows, columns, heads, dim, dtype, device)
    found = gradients(lambda *qkv: joint_attention(*qkv, backend=backend), q, k, v, dout)
    for h in (0, heads - 1):  # fp64 logits of all heads would be 4 GB
        one = [t[:, :, h : h + 1].double() for t in (q, k, v, dout)]
        for value, exact in zip(found, gradients(formula, *one), strict=True):
            # as in assert_exact: roundings do not add up with the length, for they are independent
            assert relative(value[:, :, h : h + 1], exact) <= (2**-6 if dtype == BF16 else 2**-9)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [512, 576, 1088, 1152])
def test_gpu_masks_where_logits_are_low(tokens):
    """pytorch#196678: NaN in dq from cuDNN at 64 modulo 128 tokens with a mask, when every logit is about -120."""
    q, k, v, dout = tensors(1, tokens, tokens, 8, 64, BF16, torch.device("cuda"))
    q[..., 0], k[..., 0] = 1.0, -120.0 * 8
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device="cuda")
    for value in gradients(lambda *qkv: joint_attention(*qkv, mask=mask), q, k, v, dout):
        assert value.isfinite().all()


@pytest.mark.gpu
def test_gpu_hopper_does_not_run_the_default():
    """On Hopper the automatic choice is one of the two that use its tensor cores fully, unless both are at fault."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    found = available_backends("cuda", BF16, 128)
    if found["fa3"] and found["cudnn"]:
        pytest.skip(f"fa3: {found['fa3']}; cudnn: {found['cudnn']}")
    q, k, v, _ = tensors(1, 4608, 4608, 24, 128, BF16, torch.device("cuda"))
    joint_attention(q.requires_grad_(), k, v)
    assert set(attention._choices.values()) <= {"fa3", "cudnn"}


@pytest.mark.gpu
def test_gpu_graph():
    """Captured once the key is known; refused with a line before."""
    q, k, v, _ = tensors(1, 256, 256, 8, 64, BF16, torch.device("cuda"))
    refused = pytest.raises(RuntimeError, match="must have run once before a CUDA graph captures it")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        joint_attention(q, k, v)
    torch.cuda.synchronize()
    expected = joint_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = joint_attention(q, k, v)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_compile():
    torch._dynamo.reset()
    q, k, v, dout = tensors(1, 300, 300, 8, 64, BF16, torch.device("cuda"))
    compiled = torch.compile(joint_attention, fullgraph=True)
    assert_exact(compiled, q, k, v, dout)
