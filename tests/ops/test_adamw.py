"""The one-pass AdamW + IDA + EMA: against fp64 and torch.optim.AdamW, csrc against torch, states, skips, refusals."""

import contextlib
import copy
import pickle
import types

import pytest
import torch
from bits import FUSED, same

from senseflow_kernels import AdamW, _ext, join_fp32, split_fp32, torch_path
from senseflow_kernels._adamw import Part, Plan, Scalars, launch

SHAPES = [(33, 8), (7,), (), (1, 3, 5), (257, 65), (17, 256), (43, 3, 64)]  # the last two have 8-bit moments
HYPER = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
LAM, DECAY = 0.97, 0.99
STATE = ("exp_avg", "exp_avg_sq", "low", "exp_avg_exponent", "exp_avg_sq_exponent")
CSRC = pytest.param("csrc", marks=pytest.mark.skipif(_ext._cpu()[0] is None, reason=f"csrc: {_ext._cpu()[1]}"))


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.setattr(_ext, "INTERPRET", False)


def draws(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


class Setup:
    """Parameters, phi and EMA under one optimizer; gradients are those of a counter, whatever the parameters are."""

    def __init__(self, precision="fp32", dtype=torch.float32, moments=torch.float32, grad=torch.float32, **more):
        self.grad_dtype = grad
        values, phis = draws(0), draws(1)
        low = phi_low = None
        if precision == "split":
            (values, low), (phis, phi_low) = (zip(*map(split_fp32, v), strict=True) for v in (values, phis))
        else:
            values, phis = ([t.to(dtype) for t in v] for v in (values, phis))
        self.params = [torch.nn.Parameter(t.clone()) for t in values]
        self.phi, self.ema = [t.clone() for t in phis], draws(2)
        self.phi_low = None if phi_low is None else [t.clone() for t in phi_low]
        self.optimizer = AdamW(
            self.params, **HYPER, precision=precision, moments=moments, phi=self.phi, phi_low=self.phi_low,
            ema=self.ema, seed=2**40 + 5, **more,
        )  # fmt: skip
        if low is not None:
            for mine, given in zip(self.optimizer.lows(), low, strict=True):
                mine.copy_(given)

    def step(self, i, **how):
        for p, g in zip(self.params, draws(100 + i, self.grad_dtype), strict=True):
            p.grad = g.to(p.dtype)
        self.optimizer.step(**(dict(lam=LAM, ema_decay=DECAY) | how))

    def tensors(self):
        states = [self.optimizer.state[p] for p in self.params]
        kept = [s[name] for s in states for name in STATE if name in s]
        return [p.detach() for p in self.params] + self.phi + self.ema + (self.phi_low or []) + kept


def on(path):
    return torch_path() if path == "torch" else contextlib.nullcontext()


@pytest.mark.parametrize("path", [CSRC, "torch"])
def test_fp32_against_fp64(path):
    """200 steps within rounding of torch.optim.AdamW, lerp and EMA in fp64: each step rounds theta twice by at most
    half an ulp, and what m and v lose moves theta by a few ulps of its move, less than theta's own."""
    ours = Setup()
    theta = [torch.nn.Parameter(t.double()) for t in draws(0)]
    phi, ema = [t.double() for t in draws(1)], [t.double() for t in draws(2)]
    truth = torch.optim.AdamW(theta, **HYPER)
    for i in range(200):
        with on(path):
            ours.step(i)
        for p, g in zip(theta, draws(100 + i), strict=True):
            p.grad = g.double()
        truth.step()
        for moved, keep in ((phi, LAM), (ema, DECAY)):
            torch._foreach_lerp_(moved, [p.detach() for p in theta], 1 - keep)
    for mine, exact in ((ours.params, theta), (ours.phi, phi), (ours.ema, ema)):
        for a, b in zip(mine, exact, strict=True):
            error = (a.detach().double() - b.detach()).abs()
            assert (error <= 200 * 2**-23 * b.detach().abs().clamp(min=1)).all()


CASES = [
    ("fp32", torch.float32, torch.float32), ("nearest", torch.bfloat16, torch.float32),
    ("nearest", torch.float16, torch.bfloat16), ("stochastic", torch.bfloat16, torch.float32),
    ("stochastic", torch.bfloat16, torch.bfloat16), ("split", torch.bfloat16, torch.float32),
    ("fp32", torch.float32, "8bit"), ("stochastic", torch.bfloat16, "8bit"), ("split", torch.bfloat16, "8bit"),
]  # fmt: skip


@pytest.mark.skipif(not FUSED, reason="torch does not fuse multiply and add here: the last bit differs")
@pytest.mark.skipif(_ext._cpu()[0] is None, reason=f"csrc: {_ext._cpu()[1]}")
@pytest.mark.parametrize(("precision", "dtype", "moments"), CASES, ids=str)
def test_csrc_is_the_torch_form(precision, dtype, moments):
    """Bit for bit, scaled gradients and lam as a tensor included."""
    ours, truth = (Setup(precision, dtype, moments) for _ in range(2))
    before = [t.clone() for t in ours.tensors()]
    for i in range(4):
        how = dict(coefficient=0.5 + i, lam=torch.tensor(LAM) if i % 2 else LAM)
        launched = _ext.launches["adamw"]
        ours.step(i, **how)
        launched += 2 if moments == "8bit" else 1  # one of each kind
        assert _ext.launches["adamw"] == launched
        with torch_path():
            truth.step(i, **how)
        assert _ext.launches["adamw"] == launched
    assert same([t.float() for t in ours.tensors()], [t.float() for t in truth.tensors()])
    assert not any(torch.equal(a, b) for a, b in zip(ours.tensors(), before, strict=True)
                   if a.numel() > 8 and a.dtype != torch.int8)  # fmt: skip


@pytest.mark.parametrize("path", [CSRC, "torch"])
def test_split_is_fp32(path):
    """200 steps with theta and phi in two halves are the fp32 run bit for bit, its gradients being bf16 as well."""
    fp32, split = Setup(grad=torch.bfloat16), Setup("split", grad=torch.bfloat16)
    with on(path):
        for i in range(200):
            fp32.step(i), split.step(i)
    joined = [join_fp32(p.detach(), low) for p, low in zip(split.params, split.optimizer.lows(), strict=True)]
    assert same(joined, [p.detach() for p in fp32.params])
    assert same([join_fp32(p, low) for p, low in zip(split.phi, split.phi_low, strict=True)], fp32.phi)
    assert same(split.ema, fp32.ema)


@pytest.mark.parametrize(("precision", "dtype", "moments"), CASES, ids=str)
def test_resume_is_bit_for_bit(precision, dtype, moments, tmp_path):
    """Saved after 3 of 6 steps and loaded into a new optimizer: the same bits as never stopped."""
    whole, first = (Setup(precision, dtype, moments) for _ in range(2))
    for i in range(6):
        whole.step(i)
    for i in range(3):
        first.step(i)
    torch.save(dict(optimizer=first.optimizer.state_dict(), rest=first.tensors()), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Setup(precision, dtype, moments)
    with torch.no_grad():
        for t, given in zip(second.tensors(), saved["rest"], strict=True):
            t.copy_(given)
    for p in second.params:  # what the optimizer itself holds must come from its own state dict
        for name in STATE:
            second.optimizer.state[p].get(name, torch.empty(0)).zero_()
    second.optimizer.load_state_dict(saved["optimizer"])
    for i in range(3, 6):
        second.step(i)
    assert same([t.float() for t in second.tensors()], [t.float() for t in whole.tensors()])


def test_state_dicts_go_to_torch_and_back():
    """torch.optim.AdamW goes on from ours, ours from torch's: after 3 + 3 + 3 steps theta is that of 9 steps of torch's
    but for 2 roundings a step, and the counts and moments have moved over."""
    ours = Setup()
    theirs = [torch.nn.Parameter(t) for t in draws(0)]
    whole = torch.optim.AdamW(theirs, **HYPER)
    for i in range(3):
        ours.step(i)
    torch_one = torch.optim.AdamW(ours.params, lr=1.0)
    torch_one.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    for i in range(9):
        for p, q, g in zip(ours.params, theirs, draws(100 + i), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        whole.step()
        if 3 <= i < 6:
            torch_one.step()
        if i == 5:
            ours.optimizer.load_state_dict(torch_one.state_dict())
        if i >= 6:
            ours.optimizer.step()
    assert ours.optimizer.param_groups[0]["lr"] == HYPER["lr"]
    for p, q in zip(ours.params, theirs, strict=True):
        mine, state = ours.optimizer.state[p], whole.state[q]
        assert mine["step"] == state["step"] == 9
        assert ((p - q).abs() <= 9 * 2**-23 * q.abs().clamp(min=1)).all()
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(mine[name], state[name], rtol=9 * 2**-22, atol=9 * 2**-24)


@pytest.mark.parametrize("path", [CSRC, "torch"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("stochastic", torch.bfloat16)], ids=str)
def test_a_skipped_step_changes_nothing(path, precision, dtype):
    """found_inf: weights, moments, phi, EMA and count stay bit for bit, and the next step is as if it had not been."""
    ours, truth = Setup(precision, dtype), Setup(precision, dtype)
    with on(path):
        for x in (ours, truth):
            x.step(0)
        before = [t.clone() for t in ours.tensors()]
        ours.optimizer.found_inf = torch.ones(1)
        ours.step(7)
        assert same(ours.tensors(), before)
        ours.optimizer.found_inf = torch.zeros(1)
        ours.step(1), truth.step(1)
    assert same(ours.tensors(), truth.tensors())
    assert all(ours.optimizer.state[p]["step"] == 2 for p in ours.params)


def test_grad_scaler_divides():
    """torch.amp.GradScaler hands its scale to the step: gradients of a loss 2^10 as large give the same bits."""
    scaled, plain = Setup(), Setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x in (scaled, plain):
        loss = sum((p * g).sum() for p, g in zip(x.params, draws(9), strict=True))
        (scaler.scale(loss) if x is scaled else loss).backward()
    scaler.step(scaled.optimizer, lam=LAM)
    plain.optimizer.step(lam=LAM)
    assert same(scaled.tensors(), plain.tensors())


@pytest.mark.parametrize("path", [CSRC, "torch"])
def test_a_parameter_without_a_gradient_waits(path):
    """It keeps value and count as torch's does; later steps are corrected by its own count; its phi and EMA move on."""
    ours = Setup()
    theirs = [torch.nn.Parameter(t) for t in draws(0)]
    truth = torch.optim.AdamW(theirs, **HYPER)
    phi = [t.double() for t in draws(1)]
    for i in range(4):
        missing = {1: (0,), 2: (0, 4)}.get(i, ())
        for k, (p, q, g) in enumerate(zip(ours.params, theirs, draws(100 + i), strict=True)):
            p.grad = q.grad = None if k in missing else g
        with on(path):
            ours.optimizer.step(lam=LAM, ema_decay=DECAY)
        truth.step()
        for f, q in zip(phi, theirs, strict=True):
            f.lerp_(q.detach().double(), 1 - LAM)
    for k, (p, q) in enumerate(zip(ours.params, theirs, strict=True)):
        assert ours.optimizer.state[p]["step"] == truth.state[q]["step"] == {0: 2, 4: 3}.get(k, 4)
        assert ((p - q).abs() <= 4 * 2**-23 * q.abs().clamp(min=1)).all()
        assert ((ours.phi[k].double() - phi[k]).abs() <= 8 * 2**-23 * phi[k].abs().clamp(min=1)).all()


def test_groups_have_their_own_numbers():
    params, theirs = ([torch.nn.Parameter(t) for t in draws(0)] for _ in range(2))
    groups = [[dict(params=ps[:2], lr=1e-2), dict(params=ps[2:], weight_decay=0.0)] for ps in (params, theirs)]
    ours, truth = AdamW(groups[0], **HYPER | dict(lr=1e-3)), torch.optim.AdamW(groups[1], **HYPER | dict(lr=1e-3))
    for i in range(3):
        for p, q, g in zip(params, theirs, draws(100 + i), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        ours.step(), truth.step()
    for p, q in zip(params, theirs, strict=True):
        assert ours.state[p]["step"] == 3
        assert ((p - q).abs() <= 3 * 2**-23 * q.abs().clamp(min=1)).all()


def test_replaced_tensors_are_followed():
    """Addresses are looked at every step: a parameter whose data was replaced is updated where it now lies."""
    ours, truth = Setup(), Setup()
    for i in range(3):
        if i:
            for p in ours.params:
                p.data = p.data.clone()
        ours.step(i), truth.step(i)
    assert same(ours.tensors(), truth.tensors())


@pytest.mark.skipif(_ext._cpu()[0] is None, reason=f"csrc: {_ext._cpu()[1]}")
def test_a_table_lasts_while_addresses_do(monkeypatch):
    built = []
    at = _ext.rows_of
    monkeypatch.setattr(_ext, "rows_of", lambda *args: built.append(1) or at(*args))
    ours = Setup()
    for p, g in zip(ours.params, draws(100), strict=True):
        p.grad = g
    for _ in range(3):
        ours.optimizer.step(lam=LAM)
    assert len(built) == 1 and all(isinstance(plan, Plan) for plan in ours.optimizer._plans.values())


def test_other_layouts():
    """A channels-last parameter whose gradient is not: the values are those of the contiguous one."""
    weight, grad = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(weight.clone().to(memory_format=layout))
        p.grad = grad.clone()
        AdamW([p], **HYPER).step()
        results.append(p.detach().contiguous())
    assert torch.equal(*results) and not torch.equal(results[0], weight)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("moments", [torch.float32, "8bit"], ids=str)
def test_copies_go_on_as_the_original(how, moments):
    """Parameters, phi, EMA and states of a copy are its own, and its next step has the original's bits."""
    ours = Setup("split", moments=moments)
    ours.step(0)
    held = (ours.optimizer, ours.params, ours.phi, ours.phi_low, ours.ema)
    other = copy.copy(ours)
    copied = copy.deepcopy(held) if how == "deepcopy" else pickle.loads(pickle.dumps(held))
    other.optimizer, other.params, other.phi, other.phi_low, other.ema = copied
    before = [t.clone() for t in ours.tensors()]
    other.step(1)
    assert same([t.float() for t in ours.tensors()], [t.float() for t in before])
    ours.step(1)
    assert same([t.float() for t in ours.tensors()], [t.float() for t in other.tensors()])


def test_numbers_reach_a_gpu_as_they_are(monkeypatch):
    """lr, lam and the decay in fp64, numbers or tensors: 1 - fp32(.9999) is off by 1e-4 of itself."""
    given = {}
    monkeypatch.setattr(_ext, "update_cuda", lambda *tables, scalars, **more: given.update(scalars))
    plan, part = Plan(), Part({}, [], [], [], torch.tensor(3.0))
    plan.rows = types.SimpleNamespace(is_cuda=True)
    group = dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    launch(plan, part, group, 0, Scalars(1e-6, torch.tensor(0.97).double(), 0.9999, 0.5, torch.zeros(1)))
    wide = {name: given[name].item() for name in ("lr", "lam", "ema_decay") if given[name].dtype == torch.float64}
    assert wide == dict(lr=1e-6, lam=torch.tensor(0.97).double().item(), ema_decay=0.9999)
    assert given["grad_scale"].dtype == given["found_inf"].dtype == torch.float32 and given["step"] == 3


def test_a_library_of_another_version_is_not_called():
    library = types.SimpleNamespace(f=lambda: _ext.ABI)
    assert _ext._other_version(library, "f", "x.so") is None
    for other in (types.SimpleNamespace(f=lambda: _ext.ABI - 1), types.SimpleNamespace()):
        assert "install again" in _ext._other_version(other, "f", "x.so")


def test_a_backward_through_old_values_is_refused():
    ours = Setup()
    out = (ours.params[0] ** 2).sum()
    ours.step(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_what_is_refused():
    p, half = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4).bfloat16())
    for match, params, how in [
        ("precision must be one of", [p], dict(precision="exact")),
        ("moments are kept", [p], dict(moments=torch.float16)),
        ("lr must be at least 0", [p], dict(lr=-1.0)),
        ("beta2 must be", [p], dict(betas=(0.9, 1.0))),
        ("keeps theta in fp32", [half], dict(precision="fp32")),
        ("keeps phi in fp32", [p], dict(precision="fp32", phi=[torch.zeros(4).bfloat16()])),
        ("int16 phi_low", [half], dict(precision="split", phi=[torch.zeros(4).bfloat16()])),
        ("ema must be fp32", [p], dict(ema=[torch.zeros(4).bfloat16()])),
        ("phi", [p], dict(phi=[])),
        (r"\(4,\) against ema|\(5,\)", [p], dict(ema=[torch.zeros(5)])),
        ("phi twice", [p, torch.nn.Parameter(torch.zeros(4))], dict(phi=[torch.zeros(4)] * 2)),
        ("ema twice", [p, torch.nn.Parameter(torch.zeros(4))], dict(ema=[torch.zeros(4)] * 2)),
        ("must be dense and of fp32", [torch.nn.Parameter(torch.zeros(4).double())], {}),
        ("must be dense and of fp32", [torch.nn.Parameter(torch.zeros(8)[::2])], {}),
    ]:
        with pytest.raises(ValueError, match=match):
            AdamW(params, **how)
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match="given once"):
        optimizer.add_param_group(dict(params=[half]))
    with pytest.raises(ValueError, match="of 2 parameters, this optimizer has 1"):
        optimizer.load_state_dict(AdamW([p, half]).state_dict())
    with pytest.raises(ValueError, match=r"exp_avg is \(5,\), not \(4,\)"):
        optimizer.load_state_dict(AdamW([torch.nn.Parameter(torch.zeros(5))]).state_dict())
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):
            optimizer.step(lam=bad)
        with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\]"):
            optimizer.in_backward(ema_decay=bad)
    with pytest.raises(ValueError, match="clip must be at least 0"):
        optimizer.in_backward(clip=-1.0)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.step()
