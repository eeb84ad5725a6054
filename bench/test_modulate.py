"""adaLN of MMDiT blocks: ours, the lines that diffusers runs, torch.compile of them; FLUX, SD 3.5 Large and Medium."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from bench.harness import CUDA, DEVICE, MODES, for_backward, relative_error
from senseflow_kernels import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
    layer_norm_modulate2,
)
from senseflow_kernels.modulate import modulate_reference

BF16, FP32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """op: of OPS; [batch, tokens, columns] of x."""

    model: str
    op: str
    batch: int
    tokens: int
    columns: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch}x{self.tokens}x{self.columns} {'bf16' if self.dtype == BF16 else 'fp32'}"


class Op(NamedTuple):
    """branches, outputs: how many; tensors of x's size that the forward and the backward read and write at least."""

    branches: int
    outputs: int
    forward: int
    backward: int


# The backward of "gate" returns the incoming gradient as that of x, untouched.
OPS = {
    "modulate": Op(0, 1, 2, 3), "modulate2": Op(0, 2, 3, 4), "gate": Op(1, 0, 3, 3), "gate modulate": Op(1, 1, 4, 6),
    "2 gates modulate": Op(2, 1, 5, 8),
}  # fmt: skip
FLUX = [Case("FLUX", op, b, 4608, 3072, BF16) for b in (1, 4) for op in ("modulate", "gate", "gate modulate")]
LARGE = [Case("SD3.5L", op, b, 4429, 2432, BF16) for b in (1, 4) for op in ("modulate", "gate modulate")]
MEDIUM = [Case("SD3.5M", op, b, 4096, 1536, BF16) for b in (1, 4) for op in ("modulate2", "2 gates modulate")]
SMALL = [Case("embedded", op, 8, 256, 192, FP32) for op in OPS]
CASES = FLUX + LARGE + MEDIUM if CUDA else SMALL
FORMS = ["ours", "diffusers", "compile"]
KINDS = {"ours": "ours", "diffusers": "eager", "compile": "compile"}
Run = Callable[[Sequence[Sequence[Tensor]]], Sequence[Tensor]]


def ours(groups: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    (x,), gates, branches, scales, shifts = groups
    if not scales:
        return [gate_residual(x, gates[0], branches[0])]
    if not gates and len(scales) == 2:
        return layer_norm_modulate2(x, scales[0], shifts[0], scales[1], shifts[1])
    if not gates:
        return [layer_norm_modulate(x, scales[0], shifts[0])]
    more = dict(gate2=gates[1], branch2=branches[1]) if len(gates) == 2 else {}
    return gate_residual_layer_norm_modulate(x, gates[0], branches[0], scales[0], shifts[0], 1e-6, **more)


def as_diffusers(groups: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The expressions of diffusers' JointTransformerBlock and FluxTransformerBlock, and of their norms."""
    (x,), gates, branches, scales, shifts = groups
    out = []
    for gate, branch in zip(gates, branches, strict=True):
        x = x + gate.unsqueeze(1) * branch
    if gates:
        out.append(x)
    if scales:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        out += [normed * (1 + scale[:, None]) + shift[:, None] for scale, shift in zip(scales, shifts, strict=True)]
    return out


@functools.cache
def compiled(case: Any) -> Run:
    """One per case and nothing left of the last: its guards would be tried first. Donated buffers would forbid a second
    backward of one forward."""
    torch._dynamo.reset()
    functorch_config.donated_buffer = False
    return torch.compile(as_diffusers, dynamic=False)


def inputs(case: Case) -> list[list[Tensor]]:
    """x, gates, branches, scales, shifts: the vectors as chunks of one [B, 6 D], everything with a gradient."""
    g = torch.Generator(DEVICE).manual_seed(0)
    op = OPS[case.op]

    def rows() -> Tensor:
        shape = (case.batch, case.tokens, case.columns)
        return torch.randn(shape, generator=g, device=DEVICE).to(case.dtype).requires_grad_()

    linear = torch.randn(case.batch, 6 * case.columns, generator=g, device=DEVICE).to(case.dtype)
    chunks = iter([c.requires_grad_() for c in linear.chunk(6, 1)])
    gates, scales, shifts = ([next(chunks) for _ in range(k)] for k in (op.branches, op.outputs, op.outputs))
    return [[rows()], gates, [rows() for _ in range(op.branches)], scales, shifts]


def flat(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [t for group in groups for t in group]


def errors(run: Run, groups: list[list[Tensor]], dout: list[Tensor]) -> list[float]:
    """Of every output and gradient against the reference in fp64."""
    wide = [[t.detach().double().requires_grad_() for t in group] for group in groups]
    (x,), gates, branches, scales, shifts = wide
    truth = modulate_reference(x, gates, branches, scales, shifts, 1e-6)
    truth = [*truth, *torch.autograd.grad(truth, flat(wide), [d.double() for d in dout])]
    out = list(run(groups))
    out = [*out, *torch.autograd.grad(out, flat(groups), dout)]
    return [relative_error(a, b) for a, b in zip(out, truth, strict=True)]


def tolerance(form: str, dtype: torch.dtype) -> float:
    """In the 2-norm: roundings to dtype, each at most eps / 2, one of a result and one of x_new beneath it for ours;
    diffusers rounds after each of its six steps."""
    return max((1 if form == "ours" else 4) * torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["fwd+bwd", "fwd", "bwd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}".replace(" ", "-"))
def test_modulate(measure, leave_out, case: Case, part: str, form: str, mode: str) -> None:
    op = f"adaLN {case.op} {part}"
    if form == "compile" and not CUDA:
        leave_out(op, case.name, form, "torch.compile is timed on CUDA alone")
    run: Run = {"ours": ours, "diffusers": as_diffusers}.get(form) or compiled((case, part))
    groups = inputs(case)
    dout = [torch.randn_like(o) for o in run(groups)]
    passes = sum({"fwd": OPS[case.op].forward, "bwd": OPS[case.op].backward}[p] for p in part.split("+"))

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return run(groups)

    def both() -> Sequence[Tensor]:
        return torch.autograd.grad(run(groups), flat(groups), dout)

    out = for_backward(lambda: run(groups)) if part == "bwd" else []

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(out, flat(groups), dout, retain_graph=True)

    measure(
        op=op, case=case.name, form=form, kind=KINDS[form], mode=mode,
        fn={"fwd": forward, "bwd": backward, "fwd+bwd": both}[part],
        bytes=passes * groups[0][0].numel() * groups[0][0].element_size(),
        error=max(errors(run, groups, dout)), tolerance=tolerance(form, case.dtype),
    )  # fmt: skip
