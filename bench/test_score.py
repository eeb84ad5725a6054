"""The DMD loss: ours, others' forms, torch.compile of the plain formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.harness import CUDA, DEVICE, MODES, relative_error
from senseflow_kernels import dmd_loss
from senseflow_kernels.score import score_gradient_reference

FLOW = [("flow", 16, 128, dtype, b) for dtype in (torch.bfloat16, torch.float32) for b in (1, 8)]
SDXL = [("epsilon", 4, 128, dtype, b) for dtype in (torch.bfloat16, torch.float32) for b in (1, 8)]
SMALL = [("flow", 16, 32, torch.bfloat16, 1), ("flow", 16, 32, torch.float32, 2), ("epsilon", 4, 32, torch.float32, 2)]
CASES = FLOW + SDXL if CUDA else SMALL
FORMS = ["ours", *peers.SCORE_FORMS, "compile", "nvidia-modelopt"]
KINDS = {"ours": "ours", "compile": "compile", "nvidia-modelopt": "package"}


def name_of(case: tuple[str, int, int, torch.dtype, int]) -> str:
    parameterization, channels, side, dtype, batch = case
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return f"{parameterization} {channels}x{side}x{side} {short} b={batch}"


def ours(s: peers.Score) -> Tensor:
    guidance = _guidance(s.guidance, len(s.x), s.x.device)
    kind = "flow" if s.alpha is None else "epsilon"
    return dmd_loss(
        s.x, s.x_t, s.fake, s.cond, s.uncond, sigma=s.sigma, alpha=s.alpha, guidance=guidance, parameterization=kind
    ).loss


@functools.cache
def _guidance(value: float, batch: int, device: torch.device) -> Tensor:
    return torch.full((batch,), value, device=device)


@functools.cache
def compiled(case: Any) -> Callable[[peers.Score], Tensor]:
    """One per case and nothing left of the last: its guards would be tried first."""
    torch._dynamo.reset()
    return torch.compile(peers.plain_score, dynamic=False)


def errors(loss: Callable[[peers.Score], Tensor], s: peers.Score) -> tuple[float, float]:
    """(of the loss, of the gradient) against the reference in fp64."""
    guidance = torch.full((len(s.x),), s.guidance, device=s.x.device)
    kind = "flow" if s.alpha is None else "epsilon"
    wide = [None if t is None else t.detach().double() for t in (*s[:7], guidance)]
    truth = score_gradient_reference(*wide, kind, "sample", 0.0)  # type: ignore[arg-type]
    value = loss(s)
    (dx,) = torch.autograd.grad(value, s.x)
    return relative_error(value, truth.loss), relative_error(dx.double() * dx.numel(), truth.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backward", [True, False], ids=["fwd+bwd", "fwd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(case).replace(" ", "-"))
def test_score_gradient(measure, leave_out, case, backward: bool, form: str, mode: str) -> None:
    op = f"score gradient {'fwd+bwd' if backward else 'fwd'}"
    parameterization, channels, side, dtype, batch = case
    s = peers.score_inputs((batch, channels, side, side), dtype, parameterization == "epsilon", DEVICE)
    x = s.x.requires_grad_()
    if form == "compile":
        if not CUDA:
            leave_out(op, name_of(case), form, "torch.compile is timed on CUDA alone")
        loss = compiled((case, backward))
    elif form == "nvidia-modelopt":
        try:
            loss = peers.modelopt_score()
        except ImportError as why:
            leave_out(op, name_of(case), form, f"not importable: {why}")
    else:
        loss = ours if form == "ours" else peers.SCORE_FORMS[form]
    measure(
        op=op, case=name_of(case), form=form, kind=KINDS.get(form, "eager"), mode=mode,
        fn=(lambda: torch.autograd.grad(loss(s), x)) if backward else (lambda: loss(s)),
        # Five tensors read once; with the backward one written.
        bytes=x.numel() * x.element_size() * (6 if backward else 5),
        error=max(errors(loss, s)), tolerance=peers.score_tolerance(form, dtype, form == "ours"),
    )  # fmt: skip
