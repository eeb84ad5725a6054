"""Optimizer states on the host: the bits of AdamW, however late the update runs; save and load; errors arrive."""

import threading
from typing import Any

import pytest
import torch
from bits import same

from senseflow_kernels import AdamW, HostAdamW, _ext, split_fp32

SHAPES = [(64, 256), (7,), (3, 5)]
HYPER = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.setattr(_ext, "INTERPRET", False)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def values(seed, device, dtype):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(device, dtype) for s in SHAPES]


class Pair:
    """Student and fake with IDA and EMA, their optimizers on the host or not."""

    student: Any
    fake: Any

    def __init__(self, host, precision, moments, device):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.device, self.dtype, self.host = device, dtype, host
        self.theta, self.phi = ([torch.nn.Parameter(t) for t in values(s, device, dtype)] for s in (0, 1))
        where = torch.device("cpu") if host else device
        self.ema = [t.detach().to(where, torch.float32, copy=True) for t in self.theta]
        how = dict(HYPER, precision=precision, moments=moments, seed=3)
        if host:
            self.fake = HostAdamW(self.phi, **how)
            self.student = HostAdamW(self.theta, phi=self.fake, ema=self.ema, **how)
        else:
            self.fake = AdamW(self.phi, **how)
            low = self.fake.lows() if precision == "split" else None
            phi = [p.detach() for p in self.phi]
            self.student = AdamW(self.theta, phi=phi, phi_low=low, ema=self.ema, **how)

    def step(self, optimizer, params, i, found=None, **how):
        optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        for p, g in zip(params, values(10 + i, self.device, self.dtype), strict=True):
            p.grad = g
        if self.host:
            optimizer.step(found_inf=found, **how)
        else:
            optimizer.found_inf = found
            optimizer.step(**how)
        for p in params:
            p.grad = None

    def run(self, first, last):
        for i in range(first, last):
            lam = torch.tensor(0.9, device=self.device) if i % 2 else 0.9
            coefficient = torch.tensor(0.5, device=self.device)
            skip = torch.tensor([float(i == 2)], device=self.device)
            self.step(self.student, self.theta, 2 * i, skip, lam=lam, ema_decay=0.99, coefficient=coefficient)
            self.step(self.fake, self.phi, 2 * i + 1)
        for optimizer in (self.student, self.fake):
            if isinstance(optimizer, HostAdamW):
                optimizer.wait()
        return [t.detach().float().cpu() for t in (*self.theta, *self.phi, *self.ema, *self.states())]

    def states(self):
        for optimizer in (self.student, self.fake):
            for state in optimizer.state_dict()["state"].values():
                yield from state.values()


CASES = [("fp32", torch.float32), ("split", torch.float32), ("split", "8bit"), ("stochastic", torch.bfloat16)]


@pytest.mark.parametrize(("precision", "moments"), CASES, ids=str)
def test_the_bits_of_the_update_on_the_device(precision, moments, device):
    assert same(Pair(True, precision, moments, device).run(0, 4), Pair(False, precision, moments, device).run(0, 4))


def test_a_late_update_changes_nothing(device):
    """The worker is held until the caller has freed the gradients and overwritten their memory."""
    late, truth = Pair(True, "split", torch.float32, device), Pair(False, "split", torch.float32, device)
    before = [p.detach().clone() for p in late.theta]
    go, grads = threading.Event(), values(10, device, torch.bfloat16)
    HostAdamW._worker.submit(go.wait)
    for p, g in zip(late.theta, grads, strict=True):
        p.grad = g
    late.student.step(lam=0.9, ema_decay=0.99)
    for p, g in zip(late.theta, grads, strict=True):
        p.grad = None
        g.fill_(torch.nan)
    assert all(torch.equal(p, b) for p, b in zip(late.theta, before, strict=True)), "the update has not run yet"
    go.set()
    late.fake.wait()  # phi is written by the student's update
    late.student.wait()
    for p, g in zip(truth.theta, values(10, device, torch.bfloat16), strict=True):
        p.grad = g
    truth.student.step(lam=0.9, ema_decay=0.99)
    for mine, theirs in ((late.theta, truth.theta), (late.phi, truth.phi), (late.ema, truth.ema)):
        assert same([t.detach().cpu() for t in mine], [t.detach().cpu() for t in theirs])


def test_resume_is_bit_for_bit_on_the_host_or_off_it(device):
    """A state saved by either goes on in the other: 2 + 2 steps are 4."""
    whole = Pair(True, "split", "8bit", device).run(0, 4)
    for first_host, second_host in ((True, True), (True, False), (False, True)):
        first, second = (Pair(host, "split", "8bit", device) for host in (first_host, second_host))
        first.run(0, 2)
        with torch.no_grad():
            for name in ("theta", "phi", "ema"):
                for t, given in zip(getattr(second, name), getattr(first, name), strict=True):
                    t.copy_(given)
        for name in ("fake", "student"):
            getattr(second, name).load_state_dict(getattr(first, name).state_dict())
        assert same(second.run(2, 4), whole)


def test_an_error_arrives_at_wait(device):
    one = HostAdamW([torch.nn.Parameter(torch.zeros(4, device=device))])
    one.param_groups[0]["amsgrad"] = True
    one.params[0].grad = torch.ones(4, device=device)
    one.step()
    with pytest.raises(ValueError, match="amsgrad"):
        one.wait()
    one.wait()


def test_what_is_refused():
    with pytest.raises(ValueError, match="of one device"):
        HostAdamW([torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4, device="meta"))])
    one = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="phi must be the HostAdamW"):
        HostAdamW([one], phi=[torch.zeros(4)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):  # at once, not on the worker
        HostAdamW([one]).step(lam=2.0)
    high, _ = split_fp32(torch.ones(4))
    with pytest.raises(ValueError, match="keeps theta in fp32"):
        HostAdamW([torch.nn.Parameter(high)], precision="fp32")
