"""8-bit moments: the codes by themselves, against the optimizer with fp32 moments, csrc, shards, state dicts."""

import copy

import pytest
import torch
from bits import FUSED

from senseflow_kernels import AdamW, _ext, torch_path
from senseflow_kernels._eight import BLOCKS, HALF, MANTISSA, block_of, decode, encode

CSRC = pytest.mark.skipif(_ext._cpu()[0] is None, reason=f"csrc: {_ext._cpu()[1]}")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.setattr(_ext, "INTERPRET", False)


def random16(n, seed=0):
    return torch.randint(1 << 16, (n,), generator=torch.Generator().manual_seed(seed))


# -- codes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m", "v"])
@pytest.mark.parametrize("exponent", [-110, -3, 0, 63])
def test_every_code_means_what_is_written(name, exponent):
    """2^(e - 15 + (c >> M)) (1 + (c mod 2^M) / 2^M), in fp64; each such value is its own code, however it rounds."""
    mantissa, signs = MANTISSA[name], 2 if name == "m" else 1
    codes = torch.arange(256, dtype=torch.uint8)
    c = codes.long() % (256 // signs)
    value = 2.0 ** (exponent - 15 + (c >> mantissa)).double() * (1 + (c % 2**mantissa).double() / 2**mantissa)
    value = torch.where(c == 0, 0.0, value)
    value = torch.where(codes.long() >= 256 // signs, -value, value)
    exact = value.square() if name == "v" else value
    if name == "v" and exponent == -110:
        return  # squares below fp32
    got = decode(codes, torch.tensor([exponent], dtype=torch.int8), name)
    assert torch.equal(got, exact.float())
    for bits in (0, HALF, (1 << 16) - 1):
        again, exponents = encode(got, name, 256, bits)
        assert exponents.item() == exponent
        assert torch.equal(again[c > 0], codes[c > 0])


@pytest.mark.parametrize("name", ["m", "v"])
def test_rounding_at_random_is_within_a_code_and_right_on_average(name):
    """Each of 64 values 2^16 times: off by less than one code, the mean (of v's root) within 5 standard errors."""
    n, block = 1 << 16, 64
    values = torch.randn(block, generator=torch.Generator().manual_seed(3)) * 2.0 ** torch.arange(block).neg().div(3)
    values = values.square() if name == "v" else values
    codes, exponents = encode(values.repeat(n), name, block, random16(n * block))
    assert exponents.unique().numel() == 1
    exact, got = values.double(), decode(codes, exponents, name).double()
    exact, got = (exact.sqrt(), got.sqrt()) if name == "v" else (exact, got)
    got = got.view(n, block)
    first = 2.0 ** (exponents[0].item() - 15) * (1 + 2.0 ** -MANTISSA[name])
    step = torch.maximum(exact.abs() * 2.0 ** -MANTISSA[name], torch.tensor(first).double())
    assert ((got - exact).abs() <= step * (1 + 1e-6)).all()
    error = (got.mean(0) - exact).abs()
    seen = exact.abs() > first if name == "v" else exact.abs() > 0  # a smaller root is kept at the first code
    assert (error[seen] <= 5 * step[seen] / 2 / n**0.5 + 1e-6 * exact.abs()[seen]).all()
    assert (got.abs() > 0).all() if name == "v" else (got == 0).any()


def test_what_is_not_finite_poisons_its_block_alone():
    value = torch.rand(3 * 64) + 0.1
    value[5], value[70] = torch.nan, torch.inf
    for name in MANTISSA:
        bad = value.clone()
        got = decode(*encode(bad, name, 64, HALF), name)
        assert got[:128].isnan().all() and not got[128:].isnan().any()
        assert torch.equal(decode(*encode(torch.zeros(64), name, 64, HALF), name), torch.zeros(64))
    huge = torch.full((64,), torch.finfo(torch.float32).max)
    assert torch.equal(decode(*encode(huge, "m", 64, 65535), "m"), torch.full((64,), 1.875 * 2.0**127))


def test_which_parameters_have_blocks():
    assert [block_of(s) for s in ((3072, 3072), (2432, 128), (320, 320, 3, 3), (4096,), (32, 64), (3000, 36), ())] == [
        256, 128, 64, 0, 0, 0, 0,
    ]  # fmt: skip


# -- the optimizer -------------------------------------------------------------------------------------------------


def of(moments, dtype=torch.float32, shapes=((64, 256), (48, 192), (5,)), **more):
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    return params, AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, moments=moments, seed=5, **more)


def test_moments_follow_the_fp32_ones():
    """300 steps of noisy gradients: the mean ratio of the roots of exp_avg_sq is within 5 % of 1 (rounding at random
    in the root, by 4 % of itself a step that it is moved in, brings up to some 3 % of its square), its deviation below
    25 %, and theta's move has a cosine of .97 with the fp32 moments' move."""
    (params, ours), (theirs, truth) = of("8bit"), of(torch.float32)
    begin = [p.detach().clone() for p in params]
    scale = [10.0 ** (2 * torch.rand(p.shape, generator=torch.Generator().manual_seed(8)) - 4) for p in params]
    for i in range(300):
        g = torch.Generator().manual_seed(100 + i)
        for p, q, s in zip(params, theirs, scale, strict=True):
            p.grad = s * (0.5 + torch.randn(p.shape, generator=g))
            q.grad = p.grad.clone()
        ours.step(), truth.step()
    saved = ours.torch_state_dict()["state"]
    for i, (p, q, b) in enumerate(zip(params, theirs, begin, strict=True)):
        ratio = (saved[i]["exp_avg_sq"] / truth.state[q]["exp_avg_sq"]).sqrt()
        move, want = (p.detach() - b).flatten(), (q.detach() - b).flatten()
        if p.dim() == 1:
            assert torch.equal(ratio, torch.ones(5)) and torch.equal(move, want)
            continue
        assert abs(ratio.mean() - 1) < 0.05 and ratio.std() < 0.25
        assert torch.cosine_similarity(move, want, 0) > 0.97
        assert ours.state[p]["exp_avg"].dtype == ours.state[p]["exp_avg_sq"].dtype == torch.uint8


def test_a_slow_change_is_not_lost():
    """beta2 .999 and a gradient twice as large from some step on: 1000 steps later exp_avg_sq has gone most of the way
    on average, though one step moves its root by less than a tenth of a code."""
    p = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = AdamW([p], lr=0.0, betas=(0.9, 0.999), moments="8bit")
    optimizer.state[p]["exp_avg_sq"].fill_(0), optimizer.load_state_dict(
        dict(state={0: dict(step=torch.tensor(1e4), exp_avg=torch.zeros(64, 256), exp_avg_sq=torch.ones(64, 256))},
             param_groups=optimizer.state_dict()["param_groups"])
    )  # fmt: skip
    for _ in range(1000):
        p.grad = torch.full((64, 256), 2.0)
        optimizer.step()
    wanted = 4 - 3 * 0.999**1000
    assert abs(optimizer.torch_state_dict()["state"][0]["exp_avg_sq"].mean() / wanted - 1) < 0.05


@CSRC
@pytest.mark.skipif(not FUSED, reason="torch does not fuse multiply and add here: the last bit differs")
@pytest.mark.parametrize("threads", [1, 3])
def test_csrc_is_the_torch_form_on_any_numbers(threads):
    """Bit for bit with gradients of every size, zeros, NaN and infinities, and in any number of threads."""
    shapes = tuple((97, block * 3) for block in (64, 128, 256))
    (params, ours), (theirs, truth) = of("8bit", shapes=shapes), of("8bit", shapes=shapes)
    assert [block_of(p.shape) for p in params] == sorted(BLOCKS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for i in range(4):
            for p, q in zip(params, theirs, strict=True):
                g = torch.Generator().manual_seed(i)
                grad = torch.randn(p.shape, generator=g) * 2.0 ** (
                    torch.randint(-140, 60, p.shape, generator=g).float().mul(0.5 if i % 2 else 1.0)
                )
                grad[::5, ::3] = 0
                if i == 3:
                    grad[7, 3], grad[50, 1] = torch.nan, -torch.inf
                p.grad, q.grad = grad, grad.clone()
            ours.step()
            with torch_path():
                truth.step()
    finally:
        torch.set_num_threads(before)
    for p, q in zip(params, theirs, strict=True):
        assert torch.equal(p.isnan(), q.isnan()) and torch.equal(p.nan_to_num(), q.nan_to_num())
        for name in ("exp_avg", "exp_avg_exponent", "exp_avg_sq", "exp_avg_sq_exponent"):
            assert torch.equal(ours.state[p][name], truth.state[q][name]), name
        assert (ours.state[p]["exp_avg_exponent"] == -128).any()


@CSRC
def test_csrc_refuses_what_is_no_block():
    theta, code = torch.zeros(128), torch.zeros(128, dtype=torch.uint8)
    x = dict(theta=[theta], grad=[theta.clone()], m=[code], v=[code.clone()])
    for blocks, exponents in (([64], False), ([32], True), ([256], True), ([0], True)):
        more = {f"{k}_exponent": [torch.zeros(8, dtype=torch.int8)] for k in "mv"} if exponents else {}
        with pytest.raises(ValueError, match="refuses"):
            _ext.update_cpu(_ext.rows_of({**x, **more}, blocks=blocks), op="adamw", step=1, beta2=0.9)


def test_a_skipped_step_changes_nothing():
    params, optimizer = of("8bit")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = [copy.deepcopy(optimizer.state[p]) for p in params], [p.detach().clone() for p in params]
    for path in (torch_path, None):
        optimizer.found_inf = torch.ones(1)
        if path:
            with path():
                optimizer.step()
        else:
            optimizer.step()
        for i, p in enumerate(params):
            assert torch.equal(p, before[1][i])
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in before[0][i].items())


def test_state_dicts_go_to_torch_and_back():
    """torch.optim.AdamW takes the fp32 form; ours takes torch's, to the nearest code, and its own form bit for bit."""
    params, ours = of("8bit")
    for i in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        ours.step()
    whole = ours.torch_state_dict()
    theirs = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], lr=1.0)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(KeyError, match="exp_avg"):  # codes are not values
        theirs.step()
    theirs = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], lr=1.0)
    theirs.load_state_dict(copy.deepcopy(whole))
    for i, q in enumerate(theirs.param_groups[0]["params"]):
        assert theirs.state[q]["step"] == 3
        assert torch.equal(theirs.state[q]["exp_avg"], whole["state"][i]["exp_avg"])
    _, again = of("8bit")
    again.load_state_dict(theirs.state_dict())  # values that are codes: nothing is rounded
    for i, state in again.torch_state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], whole["state"][i][name], rtol=2**-22, atol=0)
    _, same = of("8bit")
    same.load_state_dict(copy.deepcopy(ours.state_dict()))
    for i, state in same.state_dict()["state"].items():
        assert all(torch.equal(v, ours.state_dict()["state"][i][k]) for k, v in state.items())
    _, full = of(torch.float32)
    full.load_state_dict(copy.deepcopy(ours.state_dict()))
    for i, state in full.state_dict()["state"].items():
        assert all(torch.equal(state[k], whole["state"][i][k]) for k in ("exp_avg", "exp_avg_sq"))
    bytes_of = [sum(t.nbytes for s in o.state_dict()["state"].values() for t in s.values()) for o in (ours, full)]
    assert bytes_of[0] < 0.27 * bytes_of[1]


def test_what_is_refused():
    with pytest.raises(ValueError, match="moments are kept in fp32 or bf16, or in '8bit'"):
        AdamW([torch.nn.Parameter(torch.zeros(4))], moments="4bit")
    strided = torch.nn.Parameter(torch.zeros(64, 256).t().contiguous().t())
    with pytest.raises(ValueError, match="8-bit moments: needs a contiguous one"):
        AdamW([strided], moments="8bit")
