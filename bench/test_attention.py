"""Joint attention at FLUX's, SD 3.5 Large's and SDXL's size: every backend that runs here, and our choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.harness import CUDA, DEVICE, relative_error
from senseflow_kernels import attention, available_backends, joint_attention
from senseflow_kernels._attention_probe import PACKAGES, formula


class Case(NamedTuple):
    name: str
    tokens: int
    heads: int
    head_dim: int


FLUX, SD35L, SDXL = Case("FLUX", 4608, 24, 128), Case("SD3.5L", 4429, 38, 64), Case("SDXL", 4096, 10, 64)
CASES = [FLUX, SD35L, SDXL] if CUDA else [Case("tiny", 256, 2, 64)]
DTYPE = torch.bfloat16 if CUDA else torch.float32
PARTS = ["fwd", "fwd+bwd"]
FORMS = ["ours", *attention.BACKENDS]


def call_of(case: Case, part: str, backend: str | None) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """([out] or [out, dq, dk, dv] of one call, its inputs and dout)."""
    torch.manual_seed(0)
    shape = (1, case.tokens, case.heads, case.head_dim)
    q, k, v, dout = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(4))
    inputs = [t.requires_grad_(part != "fwd") for t in (q, k, v)]

    def call() -> list[Tensor]:
        out = joint_attention(*inputs, backend=backend)
        return [out, *(torch.autograd.grad(out, inputs, dout) if part != "fwd" else [])]

    return call, [*inputs, dout]


def value_error(found: list[Tensor], inputs: list[Tensor]) -> float:
    """The largest of the results' errors against fp64, over one head: all heads' logits would be gigabytes."""
    *qkv, dout = (t.detach()[:, :, :1].double() for t in inputs)
    exact = [t.requires_grad_() for t in qkv]
    out = formula(*exact)  # type: ignore[arg-type]
    truth = [out, *torch.autograd.grad(out, exact, dout)]
    return max(relative_error(t[:, :, :1], e) for t, e in zip(found, truth, strict=False))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_attention(measure, leave_out, case: Case, form: str, part: str) -> None:
    name = f"{case.name} {case.tokens}x{case.heads}x{case.head_dim} {'bf16' if CUDA else 'fp32'}"
    op, grad = f"attention {part}", part != "fwd"
    if form != "ours":
        against = available_backends(
            DEVICE, DTYPE, case.head_dim, heads=case.heads, tokens=case.tokens, grad=grad
        )[form]  # fmt: skip
        if against:
            leave_out(op, name, form, against)
    call, inputs = call_of(case, part, None if form == "ours" else form)
    products = 2 * 2 * case.tokens**2 * case.heads * case.head_dim  # q k^T and P v; their backward has five
    tensors = 4 + (8 if grad else 0)  # read q, k, v, write out; backward: read q, k, v, out, dout, write dq, dk, dv
    measure(
        op=op, case=name, form=form, kind="ours" if form == "ours" else "package" if form in PACKAGES else "torch",
        mode="call", fn=call, bytes=tensors * inputs[0].nbytes, flops=products * (3.5 if grad else 1),
        error=value_error(call(), inputs), tolerance=2**-6 if CUDA else 2e-6,  # as in tests/ops/test_attention.py
    )  # fmt: skip
