"""joint_attention against its formula in fp64; what is chosen, why, and what is said about it."""

import logging
import os
import subprocess
import sys
import types

import pytest
import torch

from senseflow_kernels import (
    Unavailable,
    _attention_probe,
    attention,
    attention_backend,
    available_backends,
    joint_attention,
    set_attention_backend,
)
from senseflow_kernels._attention_probe import Key, formula

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
ON_CPU = ["torch", "flash", "math"]


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Every test chooses anew and leaves nothing behind."""
    monkeypatch.setattr(attention, "_choices", {})
    monkeypatch.setattr(attention, "_verdicts", {})
    monkeypatch.setattr(attention, "_functions", {})
    monkeypatch.setattr(attention, "_forced", "auto")


def tensors(batch=2, rows=33, columns=47, heads=3, dim=16, dtype=FP32, device=CPU):
    shapes = [(batch, n, heads, dim) for n in (rows, columns, columns, rows)]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes]


def gradients(attend, q, k, v, dout):
    """out, dq, dk, dv."""
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def assert_exact(attend, q, k, v, dout, mask=None, scale=None, tolerance=None):
    truth = gradients(lambda q, k, v: formula(q, k, v, mask, scale), *(t.double() for t in (q, k, v, dout)))
    # 2-norms. fp32: sums of at most 128 products, each 2^-24 off, and the softmax's exp: 1e-6 leaves a factor of 4.
    # bf16: P, dS and the result are rounded to 2^-9; dS is a difference of two numbers of twice its size.
    tolerance = tolerance or {torch.float64: 1e-13, FP32: 1e-6, BF16: 2**-6, torch.float16: 2**-9}[q.dtype]
    for name, value, exact in zip(("out", "dq", "dk", "dv"), gradients(attend, q, k, v, dout), truth, strict=True):
        assert value.dtype == q.dtype
        assert relative(value, exact) <= tolerance, name


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


# -- the choice ----------------------------------------------------------------------------------------------------


def exact_function(q, k, v, softmax_scale=None):
    return formula(q, k, v, None, softmax_scale)


class ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return formula(q, k, v)

    @staticmethod
    def backward(ctx, dout):
        raise NotImplementedError("no backward in this wheel")


def nan_in_backward(q, k, v, softmax_scale=None):
    out = formula(q, k, v, None, softmax_scale)
    if out.requires_grad:
        out.register_hook(lambda g: g * float("nan"))
    return out


def overflows_where_logits_are_low(q, k, v, softmax_scale=None):
    return formula(q, k, v) + 0 * torch.exp(-torch.einsum("bnhd,bhd->bnh", q, k[:, 0]) / 4)[..., None]


# the function, what is said about it
BROKEN = {
    "no backward": (lambda q, k, v, softmax_scale=None: ForwardOnly.apply(q, k, v), "no backward in this wheel"),
    "NaN": (nan_in_backward, "dq of its trial is nan off"),
    "wrong values": (lambda q, k, v, softmax_scale=None: 1.1 * formula(q, k, v), "out of its trial is 1.0e-01 off"),
    "wrong gradient": (lambda q, k, v, softmax_scale=None: formula(q, (k + k.detach()) / 2, v), "dk of its trial"),
    "wrong shape": (lambda q, k, v, softmax_scale=None: formula(q, k, v)[:, :-1], "Mismatch in shape"),
    "raises": (lambda q, k, v, softmax_scale=None: 1 / 0, "ZeroDivisionError"),
    "infinite": (overflows_where_logits_are_low, "not finite with logits around -120"),
}


@pytest.fixture
def hopper(monkeypatch):
    """install(module, **functions) puts a package in; of what takes CUDA alone, the packages alone run, on the CPU."""

    def install(module, **functions):
        made = types.ModuleType(module)
        vars(made).update(functions)
        monkeypatch.setitem(sys.modules, module, made)

    for absent in ("flash_attn_interface", "fa3_fwd_interface", "flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, absent, None)  # import raises ModuleNotFoundError
    monkeypatch.setattr(attention, "order_of", lambda key: attention.HOPPER)
    known = _attention_probe.reason_against
    names = {"fa3", "fa2", "xformers"}

    def reason_against(name, key):
        if name in ("cudnn", "flash", "efficient"):
            return _attention_probe.Reason("not in this test")
        if name not in names:
            return known(name, key)
        if key.masked:
            return _attention_probe.Reason("takes no mask here")
        return _attention_probe._package_reason(name, key)

    monkeypatch.setattr(_attention_probe, "reason_against", reason_against)
    return install


def chosen(caplog):
    """[(level, line)] of the choices said."""
    return [(r.levelno, r.getMessage()) for r in caplog.records if r.getMessage().startswith("attention runs on")]


def test_order_and_what_is_said(hopper, caplog):
    caplog.set_level(logging.INFO, "senseflow_kernels")
    q, k, v, _ = tensors()
    joint_attention(q, k, v)
    joint_attention(q, k, v)
    [(level, line)] = chosen(caplog)  # once
    assert level == logging.INFO and line.startswith("attention runs on math for cpu float32, head size 16")
    assert "; not fa3: flash_attn_interface is not installed" in line
    attention._choices.clear(), attention._verdicts.clear(), caplog.clear()
    hopper("flash_attn", flash_attn_func=exact_function)
    joint_attention(q, k, v)
    assert chosen(caplog)[0][1].startswith("attention runs on fa2")
    attention._choices.clear(), attention._verdicts.clear(), caplog.clear()
    hopper("flash_attn_interface", flash_attn_func=lambda *a, **b: (exact_function(*a, **b), None))  # (out, lse)
    joint_attention(q, k, v)
    assert chosen(caplog)[0][1].startswith("attention runs on fa3")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_backend_is_skipped(hopper, caplog, kind):
    function, words = BROKEN[kind]
    hopper("flash_attn_interface", flash_attn_func=function)
    q, k, v, dout = tensors()
    assert_exact(joint_attention, q, k, v, dout)
    joint_attention(q.requires_grad_(), k, v)
    [(level, line)] = chosen(caplog)
    assert level == logging.WARNING and "runs on math" in line and "not fa3: " in line and words in line


def test_forward_only_wheel_serves_inference(hopper, caplog):
    caplog.set_level(logging.INFO, "senseflow_kernels")
    calls = []

    def forward_only(q, k, v, softmax_scale=None):
        calls.append(q.shape)
        return ForwardOnly.apply(q, k, v)

    hopper("fa3_fwd_interface", flash_attn_func=forward_only)
    q, k, v, dout = tensors()
    with torch.no_grad():
        out = joint_attention(q, k, v)
    assert calls[-1] == q.shape and relative(out, formula(q.double(), k.double(), v.double())) <= 1e-6
    assert_exact(joint_attention, q, k, v, dout)
    assert [line.split()[3] for _, line in chosen(caplog)] == ["fa3", "math"]


def test_package_that_does_not_import(hopper, caplog, monkeypatch):
    def broken(name, package=None):
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(_attention_probe.importlib, "import_module", broken)
    q, k, v, _ = tensors()
    joint_attention(q, k, v)
    [(level, line)] = chosen(caplog)
    assert level == logging.WARNING and "flash_attn_interface does not import: OSError: undefined symbol" in line


def test_masks_skip_backends_without(hopper):
    calls = []
    hopper("flash_attn", flash_attn_func=lambda *a, **b: calls.append(1) or exact_function(*a, **b))
    q, k, v, _ = tensors()
    mask = torch.rand(33, 47) > 0.3
    truth = formula(q.double(), k.double(), v.double(), mask)
    assert relative(joint_attention(q, k, v, mask=mask), truth) <= 1e-6
    assert not calls


def test_xformers(hopper, caplog):
    caplog.set_level(logging.INFO, "senseflow_kernels")
    hopper("xformers")
    hopper("xformers.ops", memory_efficient_attention=lambda q, k, v, scale=None: formula(q, k, v, None, scale))
    q, k, v, dout = tensors()
    assert_exact(lambda *qkv: joint_attention(*qkv, scale=0.5), q, k, v, dout, scale=0.5)
    assert chosen(caplog)[0][1].startswith("attention runs on xformers")


def test_one_trial_a_key(hopper, monkeypatch):
    trials = []
    monkeypatch.setattr(_attention_probe, "run", lambda run, name, key: trials.append((name, key)))
    hopper("flash_attn", flash_attn_func=exact_function)
    for rows in (33, 33, 35):  # one class of length
        joint_attention(*tensors(rows=rows, columns=rows)[:3])
    assert len(trials) == 1
    for change in (dict(dim=32), dict(columns=192), dict(columns=1100), dict(heads=8), dict(dtype=BF16), dict(rows=1)):
        joint_attention(*tensors(**change)[:3])
    q, k, v, _ = tensors()
    joint_attention(q.requires_grad_(), k, v)
    assert len(trials) == 8 and len({key for _, key in trials}) == 8


def kind(**change):
    plain = dict(
        device=torch.device("cuda", 0), dtype=BF16, head_dim=64, few_heads=False, one_row=False, long=True,
        remainder="0", masked=False, grad=True, compiled=False,
    )  # fmt: skip
    return Key(**{**plain, **change})


@pytest.mark.parametrize(
    ("version", "change", "cited"),
    [
        (91000, {}, "wrong results"),
        (91300, {}, "TransformerEngine#2344"), (91400, dict(grad=False), "TransformerEngine#2344"),
        (91400, dict(long=False), None), (91500, {}, None), (91300 - 1, {}, None),
        (91500, dict(remainder="other"), "pytorch#169849"), (91500, dict(remainder="64"), "pytorch#169849"),
        (91500, dict(remainder="other", grad=False), None), (91501, dict(remainder="other"), None),
        (92000, dict(masked=True, remainder="64"), "pytorch#196678"), (92000, dict(remainder="64"), None),
        (92000, dict(masked=True, remainder="64", grad=False), None), (92600, dict(masked=True, remainder="64"), None),
        (92600, dict(one_row=True), "cudnn-frontend#1072"), (92600, dict(one_row=True, grad=False), None),
    ],
)  # fmt: skip
def test_cudnn_faults(monkeypatch, version, change, cited):
    monkeypatch.setattr(_attention_probe, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    reason = _attention_probe.reason_against("cudnn", kind(**change))
    if cited is None:
        assert reason is None
    else:
        assert reason is not None and reason.fault and cited in reason.text


def test_known_before_any_trial(monkeypatch):
    monkeypatch.setattr(_attention_probe, "_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92600)

    def text(name, **change):
        reason = _attention_probe.reason_against(name, kind(**change))
        return reason and reason.text

    assert "193893" in text("cudnn", few_heads=True) and text("cudnn") is None
    assert text("fa3") == "has no kernels for compute capability 10.0"
    assert text("flash", masked=True) == text("fa2", masked=True) == "takes no mask here"
    assert text("flash", dtype=FP32) == text("cudnn", dtype=FP32) == "takes bf16 and fp16 alone"
    assert text("efficient", dtype=FP32, masked=True) is None
    assert text("math", dtype=FP32, masked=True) is None
    assert attention.order_of(kind())[0] == "cudnn"
    monkeypatch.setattr(_attention_probe, "_capability", lambda device: (9, 0))
    assert attention.order_of(kind())[:3] == ("fa3", "cudnn", "flash")


# -- the override --------------------------------------------------------------------------------------------------


def test_override(caplog):
    caplog.set_level(logging.INFO, "senseflow_kernels")
    q, k, v, _ = tensors()
    with attention_backend("math"):
        joint_attention(q, k, v)
        with attention_backend("flash"):
            joint_attention(q, k, v)
        joint_attention(q, k, v, backend="torch")
    set_attention_backend("flash")
    joint_attention(q, k, v[:, :, :, :])
    set_attention_backend("auto")
    joint_attention(q, k, v)
    assert [line.split()[3] for _, line in chosen(caplog)] == ["math", "flash", "torch", "torch"]


def test_override_errors(hopper):
    q, k, v, _ = tensors()
    with pytest.raises(ValueError, match=r"'fast' is unknown: allowed is auto, fa3, cudnn, flash"):
        set_attention_backend("fast")
    with pytest.raises(ValueError, match="'fast' is unknown"):
        joint_attention(q, k, v, backend="fast")
    why = "'fa3' cannot run: flash_attn_interface is not installed; allowed: auto, cudnn, flash, efficient, math, torch"
    with pytest.raises(Unavailable, match=why), attention_backend("fa3"):
        pass
    assert attention._forced == "auto"
    hopper("flash_attn", flash_attn_func=lambda q, k, v, softmax_scale=None: 2 * v)
    with pytest.raises(Unavailable, match=r"'fa2' cannot run for cpu float32.*out of its trial is.*; can: math, torch"):
        joint_attention(q, k, v, backend="fa2")
    hopper("flash_attn", flash_attn_func=exact_function)
    attention._verdicts.clear()
    assert_exact(lambda *qkv: joint_attention(*qkv, backend="fa2"), *tensors())


def test_available_backends():
    found = available_backends("cpu", FP32, 16, tokens=40)
    assert list(found)[:2] == ["torch", "math"] and set(found) == set(attention.BACKENDS)
    assert found["flash"] is None and found["math"] is None
    assert found["cudnn"] == found["fa3"] == "runs on CUDA alone, not on cpu"


def test_import_is_lazy_and_reads_the_environment():
    code = (
        "import sys; sys.modules.update({m: None for m in ('flash_attn', 'flash_attn_interface', 'xformers')});"
        "import torch; before = {*sys.modules}; import senseflow_kernels;"
        "heavy = {m.split('.')[0] for m in {*sys.modules} - before} & {'diffusers', 'peft', 'xformers'};"
        "print(senseflow_kernels.attention._forced, heavy)"
    )
    env = {**os.environ, "SENSEFLOW_ATTENTION": "math", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "math set()\n", done.stderr


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


def test_compile_skips_packages_it_would_break_on(hopper, caplog):
    caplog.set_level(logging.INFO, "senseflow_kernels")
    hopper("flash_attn", flash_attn_func=exact_function)
    torch._dynamo.reset()
    q, k, v, dout = tensors()
    assert_exact(torch.compile(joint_attention, backend="aot_eager", fullgraph=True), q, k, v, dout)
    assert "not fa2: its calls would break torch.compile's graph" in chosen(caplog)[0][1]


def test_compile_takes_packages_with_registered_ops(hopper, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "senseflow_kernels")
    hopper("flash_attn", flash_attn_func=exact_function)
    monkeypatch.setattr(torch.ops.flash_attn, "_flash_attn_forward", None, raising=False)
    torch._dynamo.reset()
    q, k, v, dout = tensors()
    assert_exact(torch.compile(joint_attention, backend="aot_eager", fullgraph=True), q, k, v, dout)
    assert chosen(caplog)[0][1].startswith("attention runs on fa2")


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
