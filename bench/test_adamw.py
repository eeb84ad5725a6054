"""One pass of AdamW and IDA on a GPU beside the separate sequences, at 8e9 bf16 parameters or what memory holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import CUDA, DEVICE, relative_error
from bench.test_lerp import pieces
from senseflow_kernels import AdamW, Lerp, _ext

pytestmark = [
    pytest.mark.skipif(not CUDA, reason="the one pass on a GPU; bench/test_csrc.py times the CPU's"),
    pytest.mark.skipif(_ext._cuda()[0] is None, reason=f"csrc: {_ext._cuda()[1]}"),
]
LAM, LR, BETAS, EPS = 0.97, 1e-3, (0.9, 0.99), 1e-8
N, WIDTH = 8_000_000_000, 2432
# Bytes a parameter: theta, grad, m, v and phi in bf16 are held; one pass reads all and writes all but grad.
MOMENTS = {"bf16": (torch.bfloat16, 10, 18), "8bit": ("8bit", 8.1, 14.1)}
CHECKED = 1 << 20  # elements at the front, compared with fp64
FORMS = ("ours", "ours, AdamW then Lerp", "fused AdamW, _foreach_lerp_")


class State:
    """theta, grad and phi as one transformer's parameters, flat; small numbers so that a step can be seen in bf16."""

    def __init__(self, held: float):
        gc.collect()
        torch.cuda.empty_cache()
        n = min(N, int(0.88 * torch.cuda.mem_get_info()[0] / held)) // 4096 * 4096
        self.n = n
        self.flats = {name: torch.empty(n, dtype=torch.bfloat16, device=DEVICE) for name in ("theta", "grad", "phi")}
        for i, flat in enumerate(self.flats.values()):
            g = torch.Generator(DEVICE).manual_seed(i)
            for piece in flat.split(1 << 28):
                piece.copy_(torch.randn(len(piece), device=DEVICE, generator=g) * 0.02)
        self.params = [torch.nn.Parameter(_shaped(t)) for t in pieces(self.flats["theta"], WIDTH)]
        self.phi = [_shaped(t) for t in pieces(self.flats["phi"], WIDTH)]
        for p, g in zip(self.params, pieces(self.flats["grad"], WIDTH), strict=True):
            p.grad = g.view_as(p)

    def truth(self) -> Tensor:
        """theta and phi of the checked elements after the first step, fp64: Adam's first move is lr times a sign."""
        theta, grad, phi = (self.flats[name][:CHECKED].double() for name in ("theta", "grad", "phi"))
        theta = theta - LR * grad / (grad.abs() + EPS)
        return torch.cat((theta, LAM * phi + (1 - LAM) * theta))

    def got(self) -> Tensor:
        return torch.cat([self.flats[name][:CHECKED] for name in ("theta", "phi")])


def _shaped(t: Tensor) -> Tensor:
    return t.view(-1, WIDTH) if t.numel() % WIDTH == 0 and t.numel() > WIDTH else t


def stepper(form: str, moments: torch.dtype | str, state: State) -> Callable[[], None]:
    numbers: dict[str, Any] = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    if form.startswith("fused"):
        optimizer = torch.optim.AdamW(state.params, fused=True, **numbers)

        @torch.no_grad()
        def separate() -> None:
            optimizer.step()
            torch._foreach_lerp_(state.phi, [p.detach() for p in state.params], 1 - LAM)

        return separate
    one = form == "ours"
    ours = AdamW(state.params, precision="stochastic", moments=moments, phi=state.phi if one else None, **numbers)
    if one:
        return lambda: ours.step(lam=LAM)
    lerp = Lerp(state.phi, [p.detach() for p in state.params], "stochastic")

    def two() -> None:
        ours.step()
        lerp.step(LAM)

    return two


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moments", MOMENTS)
def test_one_pass(measure, moments: str, form: str) -> None:
    if moments == "8bit" and form.startswith("fused"):
        pytest.skip("torch's fused AdamW has no 8-bit moments")
    dtype, held, moved = MOMENTS[moments]
    state = State(held)
    truth = state.truth()
    step = stepper(form, dtype, state)
    step()
    # bf16 rounds each of two values by up to 2^-8 of itself, at random by twice as much as to nearest.
    error = relative_error(state.got(), truth)
    del truth
    measure(
        op=f"adamw {moments}", case=f"{state.n:.3g} parameters in {len(state.params)}", form=form, mode="call", fn=step,
        kind="ours" if form == "ours" else "torch", bytes=moved * state.n, error=error, tolerance=2**-7,
    )  # fmt: skip
