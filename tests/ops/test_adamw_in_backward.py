"""Updates as gradients appear: the step's own bits, one gradient at a time, clipping, skips, resume."""

import copy

import pytest
import torch
from bits import same

from senseflow_kernels import AdamW, _ext, join_fp32, split_fp32, torch_path

LAM, DECAY = 0.97, 0.99
HOW = dict(lam=LAM, ema_decay=DECAY)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.setattr(_ext, "INTERPRET", False)


class Net:
    """Three layers and one that the loss does not use, with phi and EMA."""

    def __init__(self, precision="fp32", moments=torch.float32):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
        self.unused = torch.nn.Linear(64, 2)
        if precision != "fp32":
            self.net.bfloat16(), self.unused.bfloat16()
        self.params = [*self.net.parameters(), *self.unused.parameters()]
        self.phi, self.ema = ([torch.randn_like(p.detach().float()) for p in self.params] for _ in range(2))
        low = None
        if precision == "split":
            self.phi, low = (list(x) for x in zip(*map(split_fp32, self.phi), strict=True))
        elif precision == "stochastic":
            self.phi = [t.bfloat16() for t in self.phi]
        self.low = low or []
        self.optimizer = AdamW(
            self.params, lr=1e-2, precision=precision, moments=moments, phi=self.phi, phi_low=low, ema=self.ema, seed=3
        )

    def loss(self, i):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(i)).to(self.params[0].dtype)
        return self.net(x).float().square().mean()

    def inside(self, i, **how):
        loss = self.loss(i)
        with self.optimizer.in_backward(**(HOW | how)) as seen:
            loss.backward(inputs=self.params)
        return seen

    def after(self, i, **how):
        self.loss(i).backward(inputs=self.params)
        self.optimizer.step(**(HOW | how))
        self.optimizer.zero_grad()

    def tensors(self):
        states = [t for p in self.params for t in self.optimizer.state[p].values()]
        return [t.detach().float().clone() for t in (*self.params, *self.phi, *self.low, *self.ema, *states)]


@pytest.mark.parametrize("moments", [torch.float32, "8bit"], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "split", "stochastic"])
def test_the_same_bits_as_a_step_after_the_backward(precision, moments):
    inside, after = Net(precision, moments), Net(precision, moments)
    for i in range(3):
        seen = inside.inside(i)
        after.after(i)
        assert seen.skipped == 0 and seen.norm > 0
        assert all(p.grad is None for p in inside.params)
    assert same(inside.tensors(), after.tensors())
    assert inside.optimizer.state[inside.params[-1]]["step"] == 0


def test_gradients_never_exist_together():
    net, most = Net(), 0

    def count(_):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in net.params))

    for p in net.params:  # before the update, whose hook comes later and frees it
        p.register_post_accumulate_grad_hook(count)
    net.inside(0)
    assert most == 1


def test_clipping_is_by_the_larger_of_the_own_norm_and_the_last_whole_one():
    """Against AdamW in fp64 on gradients clipped by the rule, three steps; the whole norm is that of all gradients."""
    net, truth = Net(), Net()
    params = [torch.nn.Parameter(p.detach().double()) for p in truth.params]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    last, limit = 0.0, 0.02
    for i in range(3):
        for mine, p in zip(truth.params, params, strict=True):
            mine.data.copy_(p)
        truth.loss(i).backward(inputs=truth.params)
        whole = 0.0
        for mine, p in zip(truth.params, params, strict=True):
            p.grad = None
            if mine.grad is not None:
                norm = mine.grad.double().norm().item()
                p.grad = mine.grad.double() * min(1.0, limit / (max(norm, last) + 1e-6))
                whole += norm**2
                mine.grad = None
        optimizer.step()
        last = whole**0.5
        seen = net.inside(i, clip=limit)
        # gradients of the two differ by roundings of weights near .1 that earlier steps left apart
        assert seen.norm.item() == pytest.approx(last, rel=1e-4)
    assert last > limit, "clipped"
    for mine, p in zip(net.params, params, strict=True):
        torch.testing.assert_close(mine.detach().double(), p.detach(), rtol=0, atol=1e-4 * 3e-2)


@pytest.mark.parametrize("path", ["csrc", "torch"])
def test_a_bad_tensor_skips_for_itself(path):
    """And found_inf for all; a skipped tensor keeps every bit, phi and EMA too."""
    net = Net()
    net.inside(0)
    before = copy.deepcopy(net.optimizer.state_dict()["state"])
    kept = [[t.clone().detach() for t in tensors] for tensors in (net.params, net.phi, net.ema)]
    net.params[2].register_hook(lambda g: g * torch.nan)
    loss = net.loss(1)
    if path == "torch":
        with torch_path(), net.optimizer.in_backward(**HOW) as seen:
            loss.backward(inputs=net.params)
    else:
        with net.optimizer.in_backward(**HOW) as seen:
            loss.backward(inputs=net.params)
    assert seen.skipped == 1 and not seen.norm.isfinite()
    for i in range(len(net.params)):
        now = [tensors[i] for tensors in (net.params, net.phi, net.ema)]
        unchanged = [torch.equal(a, b[i]) for a, b in zip(now, kept, strict=True)]
        assert unchanged == ([True] * 3 if i == 2 else [i >= 6, False, False])  # 6, 7: without a gradient
        assert net.optimizer.state[net.params[i]]["step"] == before[i]["step"] + (i < 6 and i != 2)
    everything = net.tensors()
    last = net.optimizer.param_groups[0]["last_norm"].clone()
    seen = net.inside(2, found_inf=torch.ones(1), clip=1.0)
    assert seen.skipped == 6 and same(net.tensors(), everything)
    assert net.optimizer.param_groups[0]["last_norm"] == last


def test_found_inf_may_be_set_during_the_backward():
    """From dL/dx0, which comes before any parameter's gradient."""
    net, found = Net(), torch.zeros(())
    x0 = net.net(torch.ones(1, 64))
    x0.register_hook(lambda g: found.copy_((~g.isfinite().all()).float()) and None)
    before = net.tensors()
    with net.optimizer.in_backward(**HOW, found_inf=found) as seen:
        (x0.sum() * torch.inf).backward(inputs=net.params)
    assert seen.skipped == 6 and same(net.tensors(), before)


def test_resume_is_bit_for_bit(tmp_path):
    whole, first, second = Net("split", "8bit"), Net("split", "8bit"), Net("split", "8bit")
    for i in range(4):
        whole.inside(i, clip=0.02)
    for i in range(2):
        first.inside(i, clip=0.02)
    names = ("params", "phi", "low", "ema")
    torch.save(dict(optimizer=first.optimizer.state_dict(), **{n: getattr(first, n) for n in names}), tmp_path / "s.pt")
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    with torch.no_grad():
        for n in names:
            for t, given in zip(getattr(second, n), saved[n], strict=True):
                t.copy_(given)
    second.optimizer.load_state_dict(saved["optimizer"])
    for i in range(2, 4):
        second.inside(i, clip=0.02)
    assert same(second.tensors(), whole.tensors())
    halves = zip(second.params, second.optimizer.lows(), strict=True)
    assert all(join_fp32(p.detach(), low).isfinite().all() for p, low in halves)


def test_what_is_refused():
    net = Net()
    net.loss(0).backward(inputs=net.params)
    with pytest.raises(RuntimeError, match="has a gradient already"), net.optimizer.in_backward():
        pass
    net.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="appeared twice"), net.optimizer.in_backward():
        net.loss(0).backward(inputs=net.params)
        net.loss(0).backward(inputs=net.params)
    net.loss(0).backward(inputs=net.params)
    assert net.params[0].grad is not None, "the hooks are gone"
