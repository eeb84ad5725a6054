"""The hinge losses over several heads, discriminator's and generator's, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.harness import CUDA, DEVICE, MODES, relative_error
from senseflow_kernels import hinge_discriminator, hinge_generator
from senseflow_kernels.hinge import hinge_discriminator_reference, hinge_generator_reference

# heads, logits of a head and sample, batch, dtype. 1370: tokens of DINOv2 at 518 px; 87680: the same, 64 channels.
GPU = [(5, 1370, 8, torch.float32), (8, 1370, 8, torch.float32), (8, 1370, 8, torch.bfloat16)]
GPU += [(5, 87680, 8, torch.float32)]
CASES = GPU if CUDA else [(5, 1370, 2, torch.float32), (8, 1370, 2, torch.bfloat16)]
EAGER = ["SenseFlow", "loop over heads"]
FORMS = ["ours", *EAGER, *(f"compile, {form}" for form in EAGER)]
Loss = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
LOSSES: dict[tuple[str, str], Loss] = {
    ("D", "ours"): lambda real, fake, weight: hinge_discriminator(real, fake, weight).loss,
    ("G", "ours"): lambda _, fake, weight: hinge_generator(fake, weight),
    ("D", "SenseFlow"): peers.hinge_d_senseflow,
    ("G", "SenseFlow"): lambda _, fake, weight: peers.hinge_g_senseflow(fake, weight),
    ("D", "loop over heads"): peers.hinge_d_loop,
    ("G", "loop over heads"): lambda _, fake, weight: peers.hinge_g_loop(fake, weight),
}


def name_of(case: tuple[int, int, int, torch.dtype]) -> str:
    heads, logits, batch, dtype = case
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return f"{heads} heads x {logits} b={batch} {short}"


def inputs(case: tuple[int, int, int, torch.dtype]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(real heads, fake heads, weight per sample); leaves that take gradients."""
    heads, logits, batch, dtype = case
    both = [torch.randn(batch, logits).to(DEVICE, dtype).requires_grad_() for _ in range(2 * heads)]
    return both[:heads], both[heads:], torch.linspace(0.1, 1.0, batch, device=DEVICE)


@functools.cache
def compiled(side: str, form: str, case: Any) -> Loss:
    torch._dynamo.reset()
    return torch.compile(LOSSES[side, form], dynamic=False)


def errors(loss: Loss, side: str, real: list[Tensor], fake: list[Tensor], weight: Tensor) -> tuple[float, float]:
    """(of the loss, of all heads' gradients together) against the reference in fp64."""
    leaves = [*real, *fake] if side == "D" else fake
    r, f = ([t.detach().double().requires_grad_() for t in heads] for heads in (real, fake))
    if side == "D":
        truth = hinge_discriminator_reference(r, f, weight.double()).loss
    else:
        truth = hinge_generator_reference(f, weight.double())
    exact = torch.autograd.grad(truth, [*r, *f] if side == "D" else f)
    value = loss(real, fake, weight)
    grads = torch.autograd.grad(value, leaves)
    joined, exact_joined = (torch.cat([g.double().flatten() for g in some]) for some in (grads, exact))
    return relative_error(value, truth), relative_error(joined, exact_joined)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["D", "G"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(case).replace(" ", "-"))
def test_hinge(measure, leave_out, case, side: str, form: str, mode: str) -> None:
    op = f"hinge {side} fwd+bwd"
    plain = form.removeprefix("compile, ")
    kind = "ours" if form == "ours" else "eager" if plain == form else "compile"
    if kind == "compile" and not CUDA:
        leave_out(op, name_of(case), form, "torch.compile is timed on CUDA alone")
    loss = compiled(side, plain, case) if kind == "compile" else LOSSES[side, form]
    real, fake, weight = inputs(case)
    leaves = [*real, *fake] if side == "D" else fake
    measure(
        op=op, case=name_of(case), form=form, kind=kind, mode=mode,
        fn=lambda: torch.autograd.grad(loss(real, fake, weight), leaves),
        bytes=2 * sum(t.numel() * t.element_size() for t in leaves),  # logits read once, gradients written once
        error=max(errors(loss, side, real, fake, weight)), tolerance=peers.hinge_tolerance(case[3], form == "ours"),
    )  # fmt: skip
