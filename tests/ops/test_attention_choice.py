"""Which backend joint_attention takes, why, what is said about it, and how it is overridden."""

import logging
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_truth import BF16, FP32, assert_exact, relative, tensors

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


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Every test chooses anew and leaves nothing behind."""
    monkeypatch.setattr(attention, "_choices", {})
    monkeypatch.setattr(attention, "_verdicts", {})
    monkeypatch.setattr(attention, "_functions", {})
    monkeypatch.setattr(attention, "_forced", "auto")


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


def test_overrides_left_in_another_order():
    """As two threads may: the first to enter is the first to leave, and nothing stays behind."""
    q, k, v, _ = tensors()
    first, second = attention_backend("math"), attention_backend("flash")
    with first:
        second.__enter__()
    joint_attention(q, k, v)
    second.__exit__(None, None, None)
    joint_attention(q, k, v)
    assert list(attention._choices.values()) == ["flash", "torch"]


def test_the_process_choice_waits_for_the_with():
    q, k, v, _ = tensors()
    with attention_backend("math"):
        set_attention_backend("flash")
        joint_attention(q, k, v)
    joint_attention(q, k, v)
    assert list(attention._choices.values()) == ["math", "flash"]


def test_threads_probe_once(monkeypatch):
    trials = []
    known = _attention_probe.run
    monkeypatch.setattr(_attention_probe, "run", lambda *call: trials.append(call[1:]) or known(*call))
    q, k, v, _ = tensors()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: joint_attention(q, k, v), range(8)))
    assert len(trials) == 1 and all(torch.equal(out, found[0]) for out in found)


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
        "new = {'torch._dynamo' if m == 'torch._dynamo' else m.split('.')[0] for m in {*sys.modules} - before};"
        "heavy = new & {'diffusers', 'peft', 'xformers', 'transformers', 'torch._dynamo'};"
        "print(senseflow_kernels.attention._forced, heavy)"
    )
    env = {**os.environ, "SENSEFLOW_ATTENTION": "math", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "math set()\n", done.stderr
