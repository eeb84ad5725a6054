"""The optimizer on a GPU: the CPU's bits, 8-bit moments included; captured in a CUDA graph; updates in the backward."""

from typing import Any

import pytest
import torch

from senseflow_kernels import AdamW, _ext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_ext._cuda()[0] is None, reason=f"csrc: {_ext._cuda()[1]}"),
    pytest.mark.skipif(_ext._cpu()[0] is None, reason=f"csrc: {_ext._cpu()[1]}"),
]
SHAPES = [(64, 256), (43, 3, 64), (100, 128), (257, 65), (7,), ()]
CASES = [(p, m) for p in ("fp32", "split", "stochastic") for m in (torch.float32, torch.bfloat16, "8bit")]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.setattr(_ext, "INTERPRET", False)


def values(seed, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(device, dtype) for s in SHAPES]


class Net:
    def __init__(self, precision, moments, device):
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.device = torch.device(device)
        self.params = [torch.nn.Parameter(t) for t in values(0, device, self.dtype)]
        self.phi, self.ema = values(1, device, self.dtype), values(2, device)
        low = [torch.zeros_like(t, dtype=torch.int16) for t in self.phi] if precision == "split" else None
        self.low = low or []
        self.optimizer = AdamW(
            self.params, lr=torch.tensor(1e-2, device=device), precision=precision, moments=moments, phi=self.phi,
            phi_low=low, ema=self.ema, seed=11,
        )  # fmt: skip
        self.lam = torch.tensor(0.9, device=device)
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def step(self, i):
        for p, g in zip(self.params, values(10 + i, self.device, self.dtype), strict=True):
            p.grad.copy_(g)
        self.optimizer.step(lam=self.lam, ema_decay=0.875, coefficient=0.5)

    def step_of_numbers(self, i):
        """As fp32 they would be other numbers, and 1 - lam and 1 - decay off by far more than an ulp."""
        for p, g in zip(self.params, values(10 + i, self.device, self.dtype), strict=True):
            p.grad = g
        self.optimizer.param_groups[0]["lr"] = 1e-2 / 3
        self.optimizer.step(lam=0.97, ema_decay=0.9999, coefficient=1 / 3)

    def tensors(self):
        states = [t for p in self.params for t in self.optimizer.state[p].values()]
        return [t.detach().float().cpu() for t in (*self.params, *self.phi, *self.low, *self.ema, *states)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize(("precision", "moments"), CASES, ids=str)
def test_the_cpus_bits(precision, moments):
    nets = [Net(precision, moments, device) for device in ("cuda", "cpu")]
    launched = _ext.launches["adamw"]
    for net in nets:
        for i in range(3):
            net.step(i)
        net.step_of_numbers(3)
    assert _ext.launches["adamw"] > launched
    assert same(*nets)


@pytest.mark.parametrize(("precision", "moments"), CASES, ids=str)
def test_a_captured_step_replays_as_eager_ones(precision, moments):
    captured, eager = Net(precision, moments, "cuda"), Net(precision, moments, "cuda")
    captured.step(0), eager.step(0)  # builds the tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step(lam=captured.lam, ema_decay=0.875, coefficient=0.5)
    for i in range(1, 4):
        for net in (captured, eager):
            net.lam.fill_(0.9 - 0.1 * i)
            net.optimizer.param_groups[0]["lr"].fill_(1e-2 / i)
        for p, g in zip(captured.params, values(10 + i, "cuda", captured.dtype), strict=True):
            p.grad.copy_(g)
        graph.replay()
        eager.step(i)
    assert same(captured, eager)


def test_updates_in_the_backward_are_a_steps():
    nets = [Net("split", "8bit", "cuda") for _ in range(2)]
    for i in range(2):
        for k, net in enumerate(nets):
            for p in net.params:
                p.grad = None
            parts = zip(net.params, values(20 + i, "cuda"), strict=True)
            loss = torch.stack([(p.float() * g).sum() for p, g in parts]).sum()
            how: dict[str, Any] = dict(lam=net.lam, ema_decay=0.875)
            if k:
                loss.backward()
                net.optimizer.step(**how)
            else:
                with net.optimizer.in_backward(**how) as seen:
                    loss.backward()
                assert seen.skipped.item() == 0
    assert same(*nets)
