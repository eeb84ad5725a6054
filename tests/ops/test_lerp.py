"""IDA's line: the kernel really launched, against fp64, against torch.lerp bit for bit, and across shards."""

import copy
import pickle
from itertools import pairwise

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from senseflow_kernels import _launch, lerp, lerp_
from senseflow_kernels._bf16 import random_bits, round_stochastic
from senseflow_kernels.lerp import MODES, Lerp, join_fp32, split_fp32

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1.17549435e-38, 3.4e38, -3.4028235e38, torch.inf, -torch.inf, torch.nan, 1.0]
# Whether torch.lerp rounds its multiply and add once, as the kernel does: -a + (1 + e)^2 / 4 with a its fp32 value.
_d, _p = 1 + 2**-12, -0.25 * (1 + 2**-11)
FUSED = torch.lerp(*torch.tensor([[_p], [_d + _p]], device=DEVICE), 0.25 * _d).item() == 2**-26
fused = pytest.mark.skipif(not FUSED, reason="torch.lerp does not fuse here: the last bit differs")


def bits(t):
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


def same(a, b):
    """Equal bit for bit; any NaN is like any other."""
    return all(
        (x.dtype == y.dtype and torch.equal(torch.isnan(x), torch.isnan(y)))
        and torch.equal(bits(x)[~x.isnan()], bits(y)[~y.isnan()])
        for x, y in zip(a, b, strict=True)
    )


def draws(shapes, dtype, device=DEVICE, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


def plan(mode, shapes, theta_dtype=torch.float32, device=DEVICE, special=False, **kw):
    """(plan, phi, low): phi in the mode's storage, from the same fp32 values for every mode."""
    values, theta = draws(shapes, torch.float32, device), draws(shapes, theta_dtype, device, 1)
    if special:
        for v, t in zip(values, theta, strict=True):
            s = torch.tensor(SPECIAL, device=device)[: v.numel()]
            v.view(-1)[: len(s)], t.view(-1)[: len(s)] = s, s.flip(0).to(theta_dtype)
    phi, low = values, None
    if mode == "split":
        phi, low = (list(x) for x in zip(*[split_fp32(v) for v in values], strict=True))
    elif mode != "fp32":
        phi = [v.bfloat16() for v in values]
    return Lerp(phi, theta, mode, low=low, **kw), phi, low or []


def test_closed_form_after_n_steps():
    """phi_n = lam^n phi_0 + (1 - lam^n) theta for a fixed theta; each step rounds once, so n fp32 ulps at most."""
    phi0, theta = draws([(5, 7), (11,)], torch.float32), draws([(5, 7), (11,)], torch.float32, seed=1)
    phi, lam, n = [p.clone() for p in phi0], 0.97, 20
    for _ in range(n):
        lerp_(phi, theta, lam)
    for p, p0, t in zip(phi, phi0, theta, strict=True):
        expected = lam**n * p0.double() + (1 - lam**n) * t.double()
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=n * 2**-23 * 4)


@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
@pytest.mark.parametrize("lam", [0.97, 0.2])
def test_against_fp64(dtypes, lam, device):
    """With w = 1 - lam, d = theta - phi: w, d and the fused sum are rounded once each, then phi's own dtype."""
    phi, theta = draws([(70, 67), (5,)], dtypes[0], device), draws([(70, 67), (5,)], dtypes[1], device, 1)
    exact = [lam * p.double() + (1 - lam) * t.double() for p, t in zip(phi, theta, strict=True)]
    gaps = [(t.double() - p.double()).abs() for p, t in zip(phi, theta, strict=True)]
    before = _launch.launches["lerp"]
    lerp_(phi, theta, lam)
    assert _launch.launches["lerp"] == before + 1
    half = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtypes[0]]
    for p, e, gap in zip(phi, exact, gaps, strict=True):
        fp32 = 2 * 2**-24 * gap + 2**-24 * e.abs()
        # 2^-25: half of fp16's smallest step
        assert ((p.double() - e).abs() <= fp32 + half * (e.abs() + fp32) + 2**-25 * (half == 2**-11)).all()


@fused
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("theta_dtype", FLOATS)
@pytest.mark.parametrize("lam", [0.99, torch.tensor(0.45), 0.5, 1.0])  # weights on both sides of the half, and on it
def test_kernel_is_the_torch_path_bit_for_bit(mode, theta_dtype, lam):
    """fp32 mode is torch.lerp itself there; the interpreter's kernel fuses as the hardware does."""
    shapes, ids, starts = [(4500,), (0,), (1,), (3, 5, 7)], [3, 1, 2, 2**31 - 1], [2**35, 0, 0, 2**36 + 8]
    args = dict(special=True, seed=2**40 + 7, ids=ids, starts=starts, ema_decay=0.9)
    out = []
    for in_kernel in (True, False):
        ema = draws(shapes, torch.float32, seed=2)
        p, phi, low = plan(mode, shapes, theta_dtype, ema=ema, **args)
        before = _launch.launches["lerp"]
        for _ in range(2):
            if in_kernel:
                p.step(lam)
            else:
                with _launch.torch_path():
                    p.step(lam)
        assert _launch.launches["lerp"] == before + 2 * in_kernel
        out.append([*phi, *ema, *[x.float() for x in low]])
    assert same(*out)


@fused
@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from(FLOATS), st.sampled_from(FLOATS),
    st.integers(0, 2), st.floats(0, 1, width=32),
)  # fmt: skip
def test_any_sizes_dtypes_and_strides(sizes, kept, theta_dtype, layout, lam):
    """lerp_ on contiguous, transposed or gapped phi is torch.lerp in fp32, rounded."""
    phi = draws([(n, 3) for n in sizes], kept)
    theta = draws([(n, 3) for n in sizes], theta_dtype, seed=1)
    if layout == 1:
        phi = [p.t().contiguous().t() for p in phi]
    if layout == 2:
        phi = [torch.cat((p, p), 1)[:, :3] for p in phi]
    expected = [torch.lerp(p.float(), t.float(), 1 - lam).to(kept) for p, t in zip(phi, theta, strict=True)]
    expected = phi if lam == 1 else expected
    lerp_(phi, theta, lam)
    assert same(phi, expected)


def test_split_is_fp32_bit_for_bit_over_1000_steps(monkeypatch):
    """All 1000 in torch, which equals the kernel bit for bit (above); the kernel itself for 25 (slow: for all)."""
    with _launch.torch_path():
        chained(1000)
    monkeypatch.setattr(lerp, "BLOCK", 64)
    monkeypatch.setattr(lerp, "CHUNK", 128)
    chained(25)


@pytest.mark.slow
def test_split_kernel_is_fp32_bit_for_bit_over_1000_steps():
    chained(1000)


def chained(steps):
    (a, exact, _), (b, high, low) = plan("fp32", [(128,)]), plan("split", [(128,)])
    for i in range(steps):
        lam = 0.5 + 0.5 * torch.rand(())
        for p in (a, b):
            p.step(lam)
        if i % 10 == 0:  # another target, so that it never stands still
            for p in (a, b):
                p._groups[0].theta[0].copy_(draws([(128,)], torch.float32, seed=i)[0])
    assert torch.equal(exact[0], join_fp32(high[0], low[0]))
    assert not torch.equal(exact[0].bfloat16().float(), exact[0])


@pytest.mark.parametrize("path", [_launch.strict, _launch.torch_path])
def test_split_keeps_any_nan_a_nan(path):
    """0x7FFFFFFF, CUDA's own, rounded up to bf16 as it is would be -0."""
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32, device=DEVICE).view(torch.float32)
    phi, low = split_fp32(torch.ones(4, device=DEVICE))
    with path():
        Lerp([phi], [nans], "split", low=[low]).step(0.9)
    assert phi.isnan().all() and join_fp32(phi, low).isnan().all()


@given(st.integers(-(2**31), 2**31 - 1))
def test_split_keeps_every_bit(pattern):
    value = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
    high, low = split_fp32(value)
    assert same([join_fp32(high, low)], [value])
    if value.isnan():
        assert high.isnan()
    elif value.isfinite() and high.isfinite():
        assert (high.double() - value.double()).abs() <= 2.0**-8 * value.double().abs() + 2.0**-134


def test_philox_known_answer():
    """Random123's vector of philox4x32, 7 rounds, counter and key zero."""
    halves = random_bits(8, 0, 0, 0, torch.tensor(0)).view(4, 2)
    words = halves[:, 0] + (halves[:, 1] << 16)
    assert words.tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_stochastic_is_unbiased():
    """2^20 elements and 4 steps: the mean error is within 4 standard errors, over all and per magnitude."""
    n = 2**20
    value = torch.randn(n)
    for step in range(4):
        out = round_stochastic(value, random_bits(n, 0, 5, 3, torch.tensor(step)))
        error = (out.double() - value.double()) / value.double().abs()
        for part in (error, error[value.abs() < 0.1], error[value < 0]):
            assert part.mean().abs() <= 4 * part.std() / len(part) ** 0.5
        assert error.abs().max() < 2**-7
        exact = out.float() == value
        assert exact.float().mean() < 0.01  # what has no lower bits stays: next to nothing in randn


@fused
@pytest.mark.parametrize("cuts", [[0, 4096], [0, 2048, 4096], [0, 1000, 2048, 3001, 4096]], ids=lambda c: len(c) - 1)
@pytest.mark.parametrize("torch_only", [True, False])
def test_stochastic_does_not_depend_on_shards(cuts, torch_only, device):
    """1, 2 and 4 shards, the last at starts that are no multiples of 8."""
    whole, theta = draws([(4096,)], torch.bfloat16, device)[0], draws([(4096,)], torch.bfloat16, device, 1)[0]
    shards = [whole[a:b].clone() for a, b in pairwise(cuts)]
    targets = [theta[a:b].clone() for a, b in pairwise(cuts)]
    with _launch.torch_path():
        Lerp([whole], [theta], "stochastic", seed=9, ids=[4]).step(0.9)
    p = Lerp(shards, targets, "stochastic", seed=9, ids=[4] * len(shards), starts=cuts[:-1])
    with _launch.torch_path() if torch_only else _launch.strict():
        p.step(0.9)
    assert torch.equal(torch.cat(shards), whole)


@fused
def test_stochastic_unaligned_over_a_chunk():
    """n elements from start 3 take one program more than n alone: the last three must not be left behind."""
    phi, theta = draws([(lerp.CHUNK,)], torch.bfloat16), draws([(lerp.CHUNK,)], torch.bfloat16, seed=1)
    other = [phi[0].clone()]
    Lerp(phi, theta, "stochastic", starts=[3]).step(0.5)
    with _launch.torch_path():
        Lerp(other, theta, "stochastic", starts=[3]).step(0.5)
    assert same(phi, other)


@fused
@pytest.mark.parametrize("mode", MODES)
def test_nothing_beyond_a_tensor_is_written(mode):
    """Sizes around a tile and a chunk, at aligned addresses and others, inside a larger tensor."""
    for n, at in ((lerp.BLOCK - 1, 0), (lerp.BLOCK + 1, 16), (lerp.CHUNK - 1, 0), (lerp.CHUNK + 1, 3)):
        value, theta = draws([(n + 64,)], torch.float32)[0], draws([(n + 64,)], torch.float32, seed=1)[0]
        whole = [value] if mode == "fp32" else [*split_fp32(value)] if mode == "split" else [value.bfloat16()]
        before = [t.clone() for t in whole]
        inside = slice(at, at + n)
        phi, *low = (t[inside] for t in whole)
        with _launch.strict():
            Lerp([phi], [theta[inside]], mode, low=low or None).step(0.5)
        for t, b in zip(whole, before, strict=True):
            assert not torch.equal(t[inside], b[inside])
            t[inside] = b[inside]
            assert torch.equal(t, b)


@fused
@pytest.mark.parametrize("mode", MODES)
def test_offsets_beyond_2_to_the_31(mode):
    """A tensor that by its table begins 2^33 elements before what is there of it, and a map with its last chunk alone:
    without 64 GB the kernel's own arithmetic must find the place, and random numbers their element."""
    first, n = 2**33, 200
    p, phi, low = plan(mode, [(n,)], torch.bfloat16, starts=[first], seed=5)
    q, expected, expected_low = plan(mode, [(n,)], torch.bfloat16, starts=[first], seed=5)
    with _launch.torch_path():
        q.step(0.9)
    ((table,),) = ([*some] for some in p._tables)
    rows = table.rows.clone()
    sizes = [phi[0].element_size(), 2, 2]  # of phi, low, theta: all but the low half of fp32 are there
    for field, size in enumerate(sizes):
        rows[:, field] -= size * first
    rows[:, 5:7] += torch.tensor([first, -first], device=DEVICE)  # its elements, and where it starts
    chunk = torch.tensor([[0, first // lerp.CHUNK]], dtype=torch.int32, device=DEVICE)
    with _launch.strict():
        lerp._run(p._groups[0], [lerp.Table(rows, chunk, table.wide)], None, 1 - 0.9, 0.0, p.count)
    assert same([*phi, *[t.float() for t in low]], [*expected, *[t.float() for t in expected_low]])


def test_stochastic_kernel_keeps_a_finite_value_finite():
    """Between bf16's largest value and fp32's, where rounding up is infinite."""
    phi = [torch.full((256,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=DEVICE)]
    Lerp(phi, [torch.full((256,), torch.finfo(torch.float32).max, device=DEVICE)], "stochastic").step(0.1)
    assert (phi[0] == torch.finfo(torch.bfloat16).max).all()


def test_stochastic_moves_on_and_resumes():
    """The count advances; a plan with the count put back repeats the numbers; an equal gap does not stand still."""
    a, phi, _ = plan("stochastic", [(2000,)])
    start = phi[0].clone()
    a.step(0.999)
    a.step(0.999)
    assert a.count.item() == 2
    b, again, _ = plan("stochastic", [(2000,)])
    b.step(0.999, step=torch.zeros((), dtype=torch.int64, device=DEVICE))
    assert b.count.item() == 0
    b.count.fill_(1)
    b.step(0.999)
    assert torch.equal(phi[0], again[0]) and not torch.equal(phi[0], start)


def test_rounding_keeps_infinities_nans_and_zeros():
    value = torch.tensor(SPECIAL)
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for noise in (0, 0x8000, 0xFFFF):
        out = round_stochastic(value, torch.full((len(value),), noise)).float()
        assert torch.equal(out.isnan(), value.isnan()) and torch.equal(out.isinf(), value.isinf())
        assert torch.equal(out.signbit(), value.signbit())
        assert round_stochastic(nans, torch.full((3,), noise)).isnan().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lam", [1.0, torch.tensor(1.0)])
def test_lam_one_leaves_every_bit(mode, lam):
    """Even of -0 and of a NaN's payload, and beside an infinite theta; so does a decay of 1 with the EMA."""
    for path in (_launch.torch_path, _launch.strict):
        ema = draws([(40,)], torch.float32, seed=2)
        p, phi, low = plan(mode, [(40,)], special=True, ema=ema, ema_decay=1.0)
        p._groups[0].theta[0][0] = torch.inf
        bits(phi[0])[0] = -1 if mode == "fp32" else phi[0].view(torch.int16)[0]
        before = [bits(t).clone() for t in (*phi, *low, *ema)]
        with path():
            p.step(lam)
        assert all(torch.equal(bits(t), b) for t, b in zip((*phi, *low, *ema), before, strict=True))


def test_ema_against_fp64_and_split_theta():
    theta = draws([(300,)], torch.float32, seed=1)
    high, low = split_fp32(theta[0])
    for ends, ends_low in ((theta, None), ([high], [low])):
        ema = draws([(300,)], torch.float32, seed=2)
        exact = 0.999 * ema[0].double() + 0.001 * theta[0].double()
        phi = draws([(300,)], torch.float32)
        wanted = 0.9 * phi[0].double() + 0.1 * theta[0].double()
        before = _launch.launches["lerp"]
        Lerp(phi, ends, theta_low=ends_low, ema=ema, ema_decay=0.999).step(0.9)
        assert _launch.launches["lerp"] == before + 1
        torch.testing.assert_close(ema[0].double(), exact, rtol=2**-23, atol=2**-24)
        torch.testing.assert_close(phi[0].double(), wanted, rtol=2**-23, atol=2**-22)


@fused
def test_fp32_tensors_are_exact_in_every_mode():
    for mode in ("split", "stochastic", "nearest"):
        phi, theta = draws([(33,)], torch.float32), draws([(33,)], torch.float32, seed=1)
        expected = torch.lerp(phi[0], theta[0], 1 - 0.9)
        Lerp(phi, theta, mode).step(0.9)
        assert same(phi, [expected])


def test_a_backward_through_old_values_is_refused():
    w = torch.nn.Parameter(torch.randn(8, device=DEVICE))
    loss = (w * w).sum()
    lerp_([w], [torch.randn(8, device=DEVICE)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    p, _, _ = plan("stochastic", [(20,), (3, 4)])
    torch.library.opcheck(lerp._op, (*p._groups[0], torch.tensor(0.9, device=DEVICE), 0.0, 0.0, p.count))
    p, _, _ = plan("split", [(20,)], ema=[torch.zeros(20, device=DEVICE)], ema_decay=0.9)
    torch.library.opcheck(lerp._op, (*p._groups[0], None, 0.1, 0.1, None))


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_break(mode):
    (a, phi, low), (b, phi2, low2) = plan(mode, [(20,), (3, 4)]), plan(mode, [(20,), (3, 4)])
    compiled = torch.compile(lambda lam: a.step(lam), fullgraph=True, backend="aot_eager")
    for lam in torch.tensor([0.9, 0.4], device=DEVICE):
        compiled(lam)
        b.step(lam)
    assert same(phi, phi2) and all(torch.equal(x, y) for x, y in zip(low, low2, strict=True))
    torch.compile(lerp_, fullgraph=True, backend="aot_eager")(phi, [p.float() + 1 for p in phi2], 0.5)
    lerp_(phi2, [p.float() + 1 for p in phi2], 0.5)
    assert same(phi, phi2)


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_dtensors_by_their_local_part(rank):
    """10 rows over 4 ranks are 3, 3, 3, 1: rank 3 starts at row 9."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    full, theta = (draws([(10, 7)], torch.bfloat16, "cpu", seed)[0] for seed in (0, 1))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))

        def shard(t, dim=0):
            local = t.chunk(4, dim)[rank].clone(memory_format=torch.contiguous_format)  # a chunk of rows is a view
            return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=t.shape, stride=t.stride())

        mine = shard(full)
        Lerp([mine], [shard(theta)], "stochastic", ids=[6]).step(0.9)
        Lerp([full], [theta], "stochastic", ids=[6]).step(0.9)
        assert torch.equal(mine.to_local(), full.chunk(4)[rank])
        columns = shard(full[:, :4].contiguous(), 1)
        with pytest.raises(ValueError, match="tensor 0: stochastic rounding needs"):
            Lerp([columns], [columns.to_local().clone()], "stochastic")
        Lerp([columns], [columns.to_local().clone()], "nearest").step(0.9)
        with pytest.raises(ValueError, match="phi is placed"):
            lerp_([mine], [shard(theta, 1)], 0.9)
    finally:
        dist.destroy_process_group()


def test_errors():
    fp32, half = torch.zeros(4, device=DEVICE), torch.zeros(4, dtype=torch.bfloat16, device=DEVICE)
    for phi, theta, mode, kw, match in (
        ([fp32], [fp32, fp32], "fp32", {}, "theta 2"),
        ([fp32], [torch.zeros(3)], "fp32", {}, "tensor 0: phi"),
        ([half], [fp32], "fp32", {}, "keeps phi in fp32"),
        ([half], [fp32], "split", {}, "has a low half"),
        ([half], [fp32], "split", dict(low=[fp32]), "int16"),
        ([fp32.half()], [fp32], "stochastic", {}, "keeps phi in bf16"),
        ([fp32], [fp32], "other", {}, "mode must be"),
        ([fp32], [fp32], "fp32", dict(ema=[half], ema_decay=0.5), "ema must be fp32"),
        ([fp32], [fp32], "fp32", dict(ema=[fp32], ema_decay=2.0), "ema_decay in"),
        ([fp32], [fp32], "fp32", dict(ema_decay=0.9), "ema goes with"),
        ([fp32], [fp32], "fp32", dict(ema=[fp32]), "ema goes with"),
        ([fp32[::2]], [fp32[:2]], "fp32", {}, "must be dense"),
        ([half.view(2, 2).t()], [half.view(2, 2).t()], "stochastic", {}, "contiguous"),
        ([half], [half], "stochastic", dict(starts=[0, 1]), "starts 2"),
    ):
        with pytest.raises(ValueError, match=match):
            Lerp(phi, theta, mode, **kw)
    with pytest.raises(ValueError, match="tensor 0"):
        lerp_([torch.zeros(2)], [torch.zeros(3)], 0.5)
    with pytest.raises(ValueError, match="lam must be"):
        lerp_([fp32], [fp32], torch.zeros(2))
    with pytest.raises(ValueError, match="twice"):
        lerp_([fp32, fp32], [half, half], 0.5)
    for lam in (1.5, -0.1, torch.nan):
        with pytest.raises(ValueError, match=rf"lam must be in \[0, 1\], got {lam}"):
            lerp_([fp32], [fp32.clone()], lam)
    net = torch.nn.Linear(2, 2, device=DEVICE)
    for named, kind in ((net.state_dict(), "str"), (net.named_parameters(), "tuple")):
        with pytest.raises(ValueError, match=f"tensor 0: phi must be a list of tensors, here is a {kind}"):
            lerp_(named, net.parameters(), 0.5)
    with pytest.raises(ValueError, match="tensor 1: theta must be a list of tensors, here is a float"):
        lerp_([fp32, half], [fp32.clone(), 0.5], 0.5)
    lerp_([], [], 0.5)


def test_a_tensor_on_another_device_is_refused():
    """The kernels follow bare addresses: one of another device would be read or written as if it were here."""
    here, there = torch.zeros(4, device=DEVICE), torch.zeros(4, device="meta")
    for phi, theta in ((here, there), (there, here)):
        with pytest.raises(ValueError, match=r"tensor 0: phi is on .*, theta on"):
            lerp_([phi], [theta], 0.5)
        with pytest.raises(ValueError, match=r"tensor 0: phi is on .*, theta on"):
            Lerp([phi], [theta])


@pytest.mark.parametrize("path", [_launch.strict, _launch.torch_path])
def test_a_tensor_twice_in_phi_is_refused_on_every_path(path):
    """Moved twice, or by two programs at once."""
    phi, theta = torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE)
    with path(), pytest.raises(ValueError, match="twice"):
        lerp_([phi, phi], [theta, theta], 0.5)
    assert not phi.any()


def test_any_iterable_and_floating_dtypes_alone():
    net, other = torch.nn.Linear(3, 2, device=DEVICE), torch.nn.Linear(3, 2, device=DEVICE)
    expected = [0.5 * (p + q) for p, q in zip(net.parameters(), other.parameters(), strict=True)]
    lerp_(net.parameters(), other.parameters(), numpy.float32(0.5))
    Lerp(net.parameters(), other.parameters()).step(1.0)
    torch.testing.assert_close([*net.parameters()], expected)
    with pytest.raises(ValueError, match=r"tensor 0: phi must be of a floating dtype, got torch.int64"):
        lerp_([torch.zeros(2, dtype=torch.int64)], [torch.ones(2)], 0.5)


def test_a_plan_is_not_copied():
    """Its tables hold the addresses of the first one's tensors: a copy would write there, freed or not."""
    plan = Lerp([torch.zeros(4, device=DEVICE)], [torch.ones(4, device=DEVICE)])
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="build a new one"):
            copied(plan)


def test_a_seed_is_its_64_bits():
    outs = []
    for seed in (2**64 - 1, -1, 2**63):
        p, phi, _ = plan("stochastic", [(64,)], seed=seed)
        p.step(0.9)
        outs.append(phi[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    with pytest.raises(ValueError, match="tensor 0: its start must not be negative"):
        plan("stochastic", [(64,)], starts=[-8])


@pytest.mark.gpu
def test_replays_in_a_graph():
    """Every mode: three replays, lam changed between them on the device, are three eager steps bit for bit."""
    for mode in MODES:
        (a, phi, low), (b, phi2, low2) = (plan(mode, [(70001,), (64, 64)], device="cuda") for _ in range(2))
        lam, graph = torch.full((), 1.0, device="cuda"), torch.cuda.CUDAGraph()
        a.step(lam)  # builds the tables and compiles; lam 1 changes nothing
        a.count.zero_()
        with torch.cuda.graph(graph):
            a.step(lam)
        for value in (0.9, 0.4, 0.99):
            lam.fill_(value)
            graph.replay()
            b.step(lam)
        assert same(phi, phi2) and all(torch.equal(x, y) for x, y in zip(low, low2, strict=True))
