"""csrc's CPU update against the torch forms bit for bit: every mode, dtype, size and number of threads."""

import logging

import pytest
import torch
from bits import FUSED, same
from hypothesis import given, settings
from hypothesis import strategies as st

from senseflow_kernels import Lerp, _ext, _launch, lerp_
from senseflow_kernels._bf16 import join_fp32, random_bits, round_stochastic, split_fp32
from senseflow_kernels._table import Group
from senseflow_kernels.lerp import lerp_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1.17549435e-38, 3.4e38, -3.4028235e38, torch.inf, -torch.inf, torch.nan, 1.0]
pytestmark = [
    pytest.mark.skipif(_ext._cpu()[0] is None, reason=f"csrc: {_ext._cpu()[1]}"),
    pytest.mark.skipif(not FUSED, reason="torch does not fuse multiply and add here: the last bit differs"),
]
ISAS = [None] if not torch.backends.cpu.get_cpu_capability().startswith("AVX") else [None, b"x86-64"]
SIZES = [0, 1, 7, 8, 9, 513, 1023, 1025, 40_007]  # around a vector, a block, and above a thread's grain


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.setattr(_ext, "INTERPRET", False)


def draws(shapes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def unaligned(t):
    """The same values at an address that is a multiple of the element size alone."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:]


def stored(values, mode, dtype):
    """(tensors, low halves or []) of fp32 values, as mode keeps them."""
    if mode == "split":
        return tuple(list(x) for x in zip(*map(split_fp32, values), strict=True))
    return [v.to(dtype) for v in values], []


def special(values, reverse):
    for v in values:
        s = torch.tensor(SPECIAL)[: v.numel()]
        v[: len(s)] = s.flip(0) if reverse else s
    return values


# -- lerp ----------------------------------------------------------------------------------------------------------


def lerp_group(sizes, mode, kept, theta_dtype, low_theta=False, ema=False, move=lambda t: t):
    """A lerp Group of our own making, equal whenever called with the same arguments."""
    phi, low = stored(special(draws([(n,) for n in sizes], torch.float32), False), mode, kept)
    theta, theta_low = special(draws([(n,) for n in sizes], torch.float32, 1), True), []
    theta, theta_low = stored(theta, "split", None) if low_theta else ([t.to(theta_dtype) for t in theta], [])
    emas = draws([(n,) for n in sizes], torch.float32, 2) if ema else []
    ids, starts = [3 + i for i in range(len(sizes))], [2**35 + 5 * i for i in range(len(sizes))]
    lists = [[move(t) for t in some] for some in (phi, theta, low, theta_low, emas)]
    return Group(*lists, mode == "stochastic" and kept == torch.bfloat16, 2**40 + 7, ids, starts)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", [0.03, 0.5, 0.8, 1.0, 0.0])
@pytest.mark.parametrize("mode", ["nearest", "split", "stochastic"])
@pytest.mark.parametrize("theta_dtype", [*FLOATS, "split"], ids=str)
def test_lerp_is_the_torch_form(isa, weight, mode, theta_dtype):
    for kept in FLOATS if mode == "nearest" else [torch.bfloat16]:
        for move in (torch.clone, unaligned):
            options = dict(low_theta=theta_dtype == "split", ema=True, move=move)
            ours = lerp_group(SIZES, mode, kept, theta_dtype, **options)
            truth = lerp_group(SIZES, mode, kept, theta_dtype, **options)
            lists = dict(phi=ours.phi, phi_low=ours.low, theta=ours.theta, theta_low=ours.theta_low, ema=ours.ema)
            rows = _ext.rows_of(lists, ("phi",) if ours.random else (), ours.ids, ours.starts)
            for step in (5, 2**32 + 6):
                _ext.update_cpu(
                    rows, op="lerp", phi_weight=weight, ema_weight=0.001, step=step, seed=ours.seed, isa=isa
                )
                lerp_reference(truth, weight, 0.001, torch.tensor(step))
            assert same([*ours.phi, *ours.ema], [*truth.phi, *truth.ema])
            assert same([t.float() for t in ours.low], [t.float() for t in truth.low])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.sampled_from(FLOATS), st.sampled_from(FLOATS)), min_size=1, max_size=6),
    st.floats(0, 1, width=32), st.integers(1, 3),
)  # fmt: skip
def test_any_mix_in_one_call(kinds, lam, threads):
    """lerp_ of sizes and dtypes mixed as they come, on any number of threads, is torch's own."""
    phi = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(d) for n, d, _ in kinds]
    theta = [torch.randn(n, generator=torch.Generator().manual_seed(n + 1)).to(d) for n, _, d in kinds]
    expected = [p.clone() for p in phi]
    with _launch.torch_path():
        lerp_(expected, theta, lam)
    before = torch.get_num_threads()
    _ext.INTERPRET, interpret = False, _ext.INTERPRET
    try:
        torch.set_num_threads(threads)
        _ext.lerp_(phi, [], theta, torch.tensor(lam), "nearest", 0, torch.tensor(0), [0] * len(phi), [0] * len(phi))
    finally:
        torch.set_num_threads(before)
        _ext.INTERPRET = interpret
    # The 0-d lam is fp32; what the plain number gives is the same for an fp32 number.
    assert same(phi, expected)


@pytest.mark.parametrize("mode", ["fp32", "split", "stochastic", "nearest"])
def test_plan_runs_csrc_and_says_so(mode, caplog):
    """Lerp and lerp_ take csrc on a CPU by themselves; SENSEFLOW_KERNELS=torch keeps torch; the same bits."""
    out = []
    for torch_only in (False, True):
        phi, low = stored(draws([(70, 33), (5,)], torch.float32), mode, torch.bfloat16)
        phi = draws([(70, 33), (5,)], torch.float32) if mode == "fp32" else phi
        theta = draws([(70, 33), (5,)], torch.bfloat16, 1)
        ema = draws([(70, 33), (5,)], torch.float32, 2)
        plan = Lerp(phi, theta, mode, low=low or None, ema=ema, ema_decay=0.9, seed=3)
        launches, versions = _launch.launches["lerp"], [p._version for p in phi]
        for lam in (0.97, torch.tensor(0.3)):
            if torch_only:
                with _launch.torch_path():
                    plan.step(lam)
            else:
                plan.step(lam)
        assert _launch.launches["lerp"] == launches + (0 if torch_only else 2)
        assert all(p._version > v for p, v in zip(phi, versions, strict=True))
        out.append([*phi, *ema, *[x.float() for x in low]])
    assert same(*out)
    _ext._cpu.cache_clear()
    with caplog.at_level(logging.INFO, "senseflow_kernels"):
        assert _ext.reason_against("cpu") is None
    assert "csrc runs on CPU tensors with" in caplog.text


def test_reasons(monkeypatch):
    with _launch.torch_path():
        assert "torch path" in _ext.reason_against("cpu")
    assert "csrc was not asked for" in _ext.reason_against("cuda")
    assert "nothing for meta" in _ext.reason_against("meta")
    assert not _ext.takes(torch.zeros(2, dtype=torch.float64))
    monkeypatch.setattr(_ext, "__file__", "/nowhere/_ext.py")
    _ext._cpu.cache_clear(), _ext._load.cache_clear()
    try:
        assert "not built" in _ext.reason_against("cpu")
        phi = [torch.zeros(3)]
        Lerp(phi, [torch.ones(3)]).step(0.5)  # torch's own form, then
        assert phi[0].tolist() == [0.5] * 3
    finally:
        _ext._cpu.cache_clear(), _ext._load.cache_clear()


# -- AdamW + IDA + EMA ---------------------------------------------------------------------------------------------

BETAS, EPS, DECAY, LR, LAM, EMA_DECAY = (0.9, 0.99), 1e-8, 0.1, 1e-3, 0.97, 0.999


def kept_back(name, mode, value, kept, low, i, seed, step):
    """fp32 `value` put into kept[i] (and low[i]) the way the mode says."""
    if low:
        high, rest = split_fp32(value)
        kept[i].copy_(high), low[i].copy_(rest)
    elif mode == "stochastic" and kept[i].dtype == torch.bfloat16 and name in _ext.STREAMS:
        stream = seed ^ _ext.STREAMS[name] << 62
        kept[i].copy_(round_stochastic(value, random_bits(len(value), 11 * i, i, stream, torch.tensor(step))))
    else:
        kept[i].copy_(value)


def adamw_of(theta, grad, m, v, step):
    """theta after torch.optim.AdamW's own operations, m and v in place.

    torch's sqrt on a CPU may be MKL's, an ulp off in 17 % of its results; here it is the exact one, as in csrc. The
    optimizer itself must then agree but for that ulp in the root, so in the move, and one rounding of theta.
    """
    lr = torch.tensor(LR).item()
    param = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([param], lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False)
    optimizer.state[param] = dict(step=torch.tensor(step - 1.0), exp_avg=m.clone(), exp_avg_sq=v.clone())
    param.grad = grad.clone()
    optimizer.step()
    m.lerp_(grad, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    root = (v.double().sqrt().float() / (1 - BETAS[1] ** step) ** 0.5).add_(EPS)
    new = theta.mul(1 - lr * DECAY).addcdiv_(m, root, value=-lr / (1 - BETAS[0] ** step))
    ulp, move = 2**-23, (new.double() - theta.double()).abs()
    assert ((new.double() - param.double()).abs() <= 2 * ulp * move + ulp * new.double().abs()).all()
    assert same([m, v], [optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]])
    return new


def reference(x, mode, seed, step, scale):
    """AdamW on fp32 copies, kept the mode's way, then torch.lerp twice towards what was kept: four sweeps."""
    f32 = torch.tensor
    for i in range(len(x["theta"])):
        low = x["theta_low"]
        theta = join_fp32(x["theta"][i], low[i]) if low else x["theta"][i].float()
        m, v = x["m"][i].float().clone(), x["v"][i].float().clone()
        theta = adamw_of(theta, x["grad"][i].float() * scale, m, v, step)
        for name, value in (("m", m), ("v", v), ("theta", theta)):
            kept_back(name, mode, value, x[name], low if name == "theta" else [], i, seed, step)
        theta = join_fp32(x["theta"][i], low[i]) if low else x["theta"][i].float()
        for name, weight in (("phi", 1 - f32(LAM)), ("ema", 1 - f32(EMA_DECAY))):
            low = x["phi_low"] if name == "phi" else []
            if x[name]:
                value = join_fp32(x[name][i], low[i]) if low else x[name][i].float()
                kept_back(name, mode, torch.lerp(value, theta, weight.item()), x[name], low, i, seed, step)


def state_of(mode, dtype, grad_dtype, moments, phi=True, move=torch.clone, sizes=SIZES):
    shapes = [(n,) for n in sizes]
    x = dict(phi=[], phi_low=[], ema=[])
    x["theta"], x["theta_low"] = stored(draws(shapes, torch.float32), mode, dtype)
    if phi:
        x["phi"], x["phi_low"] = stored(draws(shapes, torch.float32, 1), mode, dtype)
        x["ema"] = draws(shapes, torch.float32, 2)
    x["grad"] = draws(shapes, grad_dtype, 3)
    x["m"] = [t.mul(0.1).to(moments) for t in draws(shapes, torch.float32, 4)]
    x["v"] = [t.square().to(moments) for t in draws(shapes, torch.float32, 5)]
    return {name: [move(t) for t in tensors] for name, tensors in x.items()}


def adamw(x, mode, step, scale=0.25, found_inf=0.0, lam=LAM, seed=2**41 + 3, **changes):
    n = len(x["theta"])
    f32 = torch.tensor
    order = ("theta", "theta_low", "grad", "m", "v", "phi", "phi_low", "ema")
    _ext.adamw_(
        *[changes.get(name, x[name]) for name in order], f32(LR), f32(step), f32(lam), f32(EMA_DECAY), f32(scale),
        f32(found_inf), *BETAS, EPS, DECAY, mode, seed, list(range(n)), [11 * i for i in range(n)],
    )  # fmt: skip


CASES = [
    ("fp32", torch.float32, torch.float32), ("fp32", torch.float32, torch.bfloat16),
    ("nearest", torch.bfloat16, torch.float32), ("nearest", torch.float16, torch.float32),
    ("split", torch.bfloat16, torch.float32), ("stochastic", torch.bfloat16, torch.bfloat16),
    ("stochastic", torch.bfloat16, torch.float32), ("stochastic", torch.float32, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "dtype", "moments"), CASES, ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_one_pass_is_adamw_then_lerp_then_ema(mode, dtype, moments, grad_dtype):
    """Bit for bit AdamW, IDA and EMA in torch, one after another, each rounded as it is kept; also without phi."""
    for phi, move in ((True, torch.clone), (True, unaligned), (False, torch.clone)):
        ours, truth = (state_of(mode, dtype, grad_dtype, moments, phi, move) for _ in range(2))
        for step in (1, 2, 3):
            adamw(ours, mode, step)
            reference(truth, mode, 2**41 + 3, step, 0.25)
        for name in ours:
            assert same([t.float() for t in ours[name]], [t.float() for t in truth[name]]), name


def test_split_is_fp32():
    """200 steps with the weights in two halves give the fp32 weights, phi and EMA bit for bit."""
    fp32, split = (state_of(mode, torch.float32, torch.float32, torch.float32) for mode in ("fp32", "split"))
    for step in range(1, 201):
        for x, mode in ((fp32, "fp32"), (split, "split")):
            adamw(x, mode, step)
    for name in ("theta", "phi"):
        joined = [join_fp32(h, low) for h, low in zip(split[name], split[f"{name}_low"], strict=True)]
        assert same(joined, fp32[name])
    assert same(split["ema"], fp32["ema"])


def test_threads_and_sharding_change_nothing():
    """Any number of threads, and a tensor cut in two with its start said, give the same bits in random mode."""
    whole, threaded, cut = (
        state_of("stochastic", torch.bfloat16, torch.bfloat16, torch.bfloat16, sizes=[200_003]) for _ in range(3)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        adamw(whole, "stochastic", 1)
        torch.set_num_threads(3)
        adamw(threaded, "stochastic", 1)
    finally:
        torch.set_num_threads(before)
    pieces = {name: [piece for t in tensors for piece in (t[:70_001], t[70_001:])] for name, tensors in cut.items()}
    rows = _ext.rows_of(pieces, tuple(_ext.STREAMS), [0, 0], [0, 70_001])
    _ext.update_cpu(
        rows, op="adamw", phi_weight=(1 - torch.tensor(LAM)).item(), ema_weight=(1 - torch.tensor(EMA_DECAY)).item(),
        lr=torch.tensor(LR).item(), beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, grad_scale=0.25,
        step=1, seed=2**41 + 3,
    )  # fmt: skip
    for name in whole:
        assert same(whole[name], threaded[name]) and same(whole[name], cut[name]), name


def test_random_rounding_is_right_on_average():
    """1 + 2^-9 - lr between two bf16 neighbours: the mean over 2^16 elements is within 5 standard errors of fp32's."""
    n, step_size = 1 << 16, 2**-10
    x = dict(theta=[torch.ones(n).bfloat16()], theta_low=[], grad=[torch.ones(n)], phi=[], phi_low=[], ema=[])
    x["m"], x["v"] = [torch.zeros(n)], [torch.zeros(n)]
    rows = _ext.rows_of(x, tuple(_ext.STREAMS))
    _ext.update_cpu(rows, op="adamw", lr=step_size, beta1=0.9, beta2=0.99, step=1, seed=5)
    # The first step is lr in size. Below 1 bf16's neighbours are 2^-8 apart: 1 and 1 - 2^-8, the second with p = 1/4.
    drop = (1 - x["theta"][0].double()).mean().item()
    assert set(x["theta"][0].unique().tolist()) == {1 - 2**-8, 1.0}
    assert abs(drop - step_size) < 5 * 2**-8 * (0.25 * 0.75 / n) ** 0.5


def test_found_inf_and_lam_one():
    x, before = (state_of("stochastic", torch.bfloat16, torch.float32, torch.bfloat16) for _ in range(2))
    adamw(x, "stochastic", 1, found_inf=1.0)
    for name in x:
        assert same(x[name], before[name])
    adamw(x, "stochastic", 1, lam=1.0)
    assert same(x["phi"], before["phi"]) and not same(x["theta"][1:], before["theta"][1:])


def test_what_is_refused():
    x = state_of("fp32", torch.float32, torch.float32, torch.float32, sizes=[4, 5])
    for match, changes in {
        "ema 1": dict(ema=x["ema"][:1]),
        r"phi\[0\] must be contiguous": dict(phi=[torch.zeros(3), torch.zeros(5)]),
        r"phi\[1\] must be contiguous": dict(phi=[x["phi"][0], torch.zeros(10)[::2]]),
        r"grad\[0\] is torch.float64": dict(grad=[torch.zeros(4).double(), torch.zeros(5)]),
        r"phi_low\[0\] is torch.float32": dict(phi_low=x["phi"]),
        "phi twice": dict(phi=[x["phi"][1][:4], x["phi"][1]]),
        "refuses": dict(phi_low=[torch.zeros(n, dtype=torch.int16) for n in (4, 5)]),
    }.items():
        with pytest.raises(ValueError, match=match):
            adamw(x, "fp32", 1, **changes)
    with pytest.raises(ValueError, match="mode must be"):
        adamw(x, "exact", 1)


def test_torch_ops_where_built():
    """torch.ops.senseflow_csrc is the same update, through torch's stable ABI."""
    try:
        ops = _ext.load_torch_ops()
    except OSError as why:
        pytest.skip(f"csrc's torch operators: {str(why)[:200]}")
    ours, truth = (state_of("stochastic", torch.bfloat16, torch.float32, torch.bfloat16) for _ in range(2))
    n, f32 = len(SIZES), torch.tensor
    order = ("theta", "theta_low", "grad", "m", "v", "phi", "phi_low", "ema")
    scalars = [f32(LR), f32(2), f32(LAM), f32(EMA_DECAY), f32(0.25), f32(0.0)]
    places = [list(range(n)), [11 * i for i in range(n)]]
    ops.adamw_(*[ours[name] for name in order], *scalars, *BETAS, EPS, DECAY, "stochastic", 2**41 + 3, *places)
    adamw(truth, "stochastic", 2)
    ops.lerp_(ours["phi"], [], ours["theta"], f32(0.8), "stochastic", 9, f32(4), *places)
    _ext.lerp_(truth["phi"], [], truth["theta"], f32(0.8), "stochastic", 9, f32(4), *places)
    for name in ours:
        assert same(ours[name], truth[name]), name
    with pytest.raises(RuntimeError, match="mode must be"):
        ops.lerp_(ours["phi"], [], ours["theta"], f32(0.8), "exact", 9, f32(4), *places)


# -- CUDA ----------------------------------------------------------------------------------------------------------


def test_map_of_covers_every_row():
    """Each chunk of each row once, start % 8 elements more; none of an empty row."""
    rows = _ext.rows_of(dict(theta=[torch.zeros(n) for n in (0, 1, _ext.CHUNK, _ext.CHUNK)]), start=[0, 0, 0, 3])
    assert _ext.map_of(rows).tolist() == [[1, 0], [2, 0], [3, 0], [3, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "dtype", "moments"), CASES, ids=str)
def test_cuda_is_the_cpu_update(mode, dtype, moments):
    """The same formulas with the same roundings on both: every bit, aligned or not, in one launch."""
    if _ext._cuda()[0] is None:
        pytest.skip(f"csrc: {_ext._cuda()[1]}")
    device = torch.device("cuda")
    for move in (torch.clone, unaligned):
        ours = state_of(mode, dtype, torch.bfloat16, moments, True, move)
        on_gpu = {
            name: [move(t.to(device)) for t in tensors] for name, tensors in
            state_of(mode, dtype, torch.bfloat16, moments, True, torch.clone).items()
        }  # fmt: skip
        n = len(ours["theta"])
        random = tuple(_ext.STREAMS) if mode == "stochastic" else ()
        rows = _ext.rows_of(on_gpu, random, list(range(n)), [11 * i for i in range(n)])
        scalars = dict(lr=LR, lam=LAM, ema_decay=EMA_DECAY, grad_scale=0.25, found_inf=0.0)
        wide = ("lr", "lam", "ema_decay")
        scalars = {
            name: torch.tensor(value, device=device).to(torch.float64 if name in wide else torch.float32)
            for name, value in scalars.items()
        }
        scalars["step"] = torch.tensor(2, device=device)
        adamw(ours, mode, 2)
        _ext.update_cuda(
            rows.to(device), _ext.map_of(rows).to(device), op="adamw", scalars=scalars, beta1=BETAS[0], beta2=BETAS[1],
            eps=EPS, weight_decay=DECAY, seed=2**41 + 3,
        )  # fmt: skip
        torch.cuda.synchronize()
        for name in ours:
            assert same([t.float() for t in ours[name]], [t.float().cpu() for t in on_gpu[name]]), name
