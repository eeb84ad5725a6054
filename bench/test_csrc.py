"""csrc on a CPU beside torch's foreach and fused forms, over lists of parameters far beyond the caches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.harness import CUDA, relative_error
from bench.test_lerp import pieces
from senseflow_kernels import _ext

pytestmark = [
    pytest.mark.skipif(CUDA, reason="csrc's CPU path is timed where there is no GPU"),
    pytest.mark.skipif(_ext._cpu()[0] is None, reason=f"csrc: {_ext._cpu()[1]}"),
]
LAM, EMA_DECAY, LR, BETAS, EPS, DECAY = 0.97, 0.999, 1e-4, (0.9, 0.99), 1e-8, 0.01
# Of a transformer's parameters: its width sets their sizes. 24e6 in fp32 are three times a server's L3 cache.
N, WIDTHS = 24 << 20, (128, 1024)
ROUNDS = 15


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name_of(lists: list[Tensor], width: int) -> str:
    return f"{'wide' if width > 128 else 'many'}: {N:.3g} parameters in {len(lists)}, width {width}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_lerp(measure, dtype: torch.dtype, width: int) -> None:
    flat, theta, start = torch.empty(N, dtype=dtype), numbers(1, dtype), numbers(0, dtype)
    phi, ends = pieces(flat, width), pieces(theta, width)  # both forms on the very same pages: these change the rate
    truth = LAM * start.double() + (1 - LAM) * theta.double()
    rows = _ext.rows_of(dict(phi=phi, theta=ends))

    def ours() -> None:
        _ext.update_cpu(rows, op="lerp", phi_weight=1 - LAM)

    def foreach() -> None:
        torch._foreach_lerp_(phi, ends, 1 - LAM)

    def error(step: Callable[[], None]) -> float:
        flat.copy_(start)
        step()
        return relative_error(flat, truth)

    size = 2 if dtype == torch.bfloat16 else 4
    other = dict(form="_foreach_lerp_", kind="torch", fn=foreach, error=error(foreach))
    measure(
        op=f"csrc lerp {'bf16' if size == 2 else 'fp32'}", case=name_of(phi, width), form="ours", mode="call", fn=ours,
        kind="ours", bytes=3 * size * N, error=error(ours), tolerance=2**-8 if size == 2 else 1e-7, rounds=ROUNDS,
        beside=[other],
    )  # fmt: skip


def one_pass(state: dict[str, list[Tensor]]) -> Callable[[], None]:
    rows = _ext.rows_of(state)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        _ext.update_cpu(
            rows, op="adamw", phi_weight=1 - LAM, ema_weight=1 - EMA_DECAY, lr=LR, beta1=BETAS[0], beta2=BETAS[1],
            eps=EPS, weight_decay=DECAY, step=count,
        )  # fmt: skip

    return step


def separate(state: dict[str, list[Tensor]]) -> Callable[[], None]:
    params = [torch.nn.Parameter(t) for t in state["theta"]]
    for p, g in zip(params, state["grad"], strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    for p, m, v in zip(params, state["m"], state["v"], strict=True):
        optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=m, exp_avg_sq=v)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(state["phi"], state["theta"], 1 - LAM)
        torch._foreach_lerp_(state["ema"], state["theta"], 1 - EMA_DECAY)

    return step


@pytest.mark.parametrize("width", WIDTHS)
def test_one_pass(measure, width: int) -> None:
    start = {name: numbers(i) for i, name in enumerate(("theta", "grad", "m", "phi", "ema"))}
    start["v"] = torch.rand(N)
    p, g, m, v, phi, ema = (start[k].double() for k in ("theta", "grad", "m", "v", "phi", "ema"))
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    root = (v / (1 - BETAS[1])).sqrt() + EPS
    p = p * (1 - LR * DECAY) - LR * m / (1 - BETAS[0]) / root
    truth = torch.stack((p, LAM * phi + (1 - LAM) * p, EMA_DECAY * ema + (1 - EMA_DECAY) * p))
    del g, m, v, root, phi, ema, p
    flats = {name: torch.empty(N) for name in start}
    state = {name: pieces(flat, width) for name, flat in flats.items()}
    ours, others = one_pass(state), separate(state)

    def error(step: Callable[[], None]) -> float:
        for name, flat in flats.items():
            flat.copy_(start[name])
        step()
        return relative_error(torch.stack([flats[k] for k in ("theta", "phi", "ema")]), truth)

    other = dict(form="fused AdamW, 2 _foreach_lerp_", kind="torch", fn=others, error=error(others))
    # Read theta, grad, m, v, phi, ema; write all but grad: in one pass 44 bytes, separately theta twice more.
    measure(
        op="csrc adamw", case=name_of(state["theta"], width), form="ours", mode="call", fn=ours, bytes=44 * N,
        kind="ours", error=error(ours), tolerance=1e-7, rounds=ROUNDS, beside=[other],
    )  # fmt: skip
