"""q, k and v of joint attention: ours, diffusers' form, torch.compile of it; FLUX's blocks and SD3.5 Large's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from bench import peers
from bench.harness import CUDA, DEVICE, MODES, for_backward, relative_error
from senseflow_kernels import QKV, joint_qkv
from senseflow_kernels.qk_norm_rope import joint_qkv_reference

BF16, FP32 = torch.bfloat16, torch.float32
Form = Callable[[list[QKV], int, "tuple[Tensor, Tensor] | None"], tuple[Tensor, ...]]


class Case(NamedTuple):
    """tokens: of each stream in joint order; rope: whether there is a table."""

    name: str
    tokens: tuple[int, ...]
    heads: int
    head_dim: int
    rope: bool
    dtype: torch.dtype


LARGE = [
    Case("FLUX double 1x(512+4096)x24x128 bf16", (512, 4096), 24, 128, True, BF16),
    Case("FLUX single 1x4608x24x128 bf16", (4608,), 24, 128, True, BF16),
    Case("SD3.5L 1x(4096+333)x38x64 bf16", (4096, 333), 38, 64, False, BF16),
]
SMALL = [
    Case("rope 1x(32+256)x4x64 fp32", (32, 256), 4, 64, True, FP32),
    Case("no rope 1x(256+32)x4x64 bf16", (256, 32), 4, 64, False, BF16),
]
CASES = LARGE if CUDA else SMALL
TENSORS = ("q", "k", "v")


class Inputs:
    """Projections as separate GEMMs leave them, norm weights, table, gradients as attention leaves them."""

    def __init__(self, case: Case, device: torch.device = DEVICE):
        width, total = case.heads * case.head_dim, sum(case.tokens)
        self.heads = case.heads
        self.streams = [
            QKV(
                *(torch.randn(1, n, width, device=device).to(case.dtype).requires_grad_() for _ in TENSORS),
                *(torch.randn(case.head_dim, device=device).to(case.dtype).requires_grad_() for _ in "qk"),
            )
            for n in case.tokens
        ]
        frequency = 1e4 ** -torch.linspace(0, 1, case.head_dim // 2, device=device)
        angle = torch.outer(torch.arange(total, device=device), frequency)
        self.rope = (angle.cos().repeat_interleave(2, 1), angle.sin().repeat_interleave(2, 1)) if case.rope else None
        self.leaves = [t for s in self.streams for t in s if t is not None]
        self.grads = [torch.randn(1, total, case.heads, case.head_dim, device=device).to(case.dtype) for _ in TENSORS]
        self.numel = total * width

    def forward(self, form: Form) -> tuple[Tensor, ...]:
        return form(self.streams, self.heads, self.rope)

    def backward(self, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grads, retain_graph=True)


def ours(streams: list[QKV], heads: int, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    return joint_qkv(streams, heads, rope=rope)


FORMS: dict[str, Form] = {"ours": ours, "diffusers": peers.diffusers_joint}


def compiled() -> Form:
    """Nothing left of the last case. Donated buffers would forbid a second backward of one forward."""
    torch._dynamo.reset()
    functorch_config.donated_buffer = False
    return torch.compile(peers.diffusers_joint, dynamic=False)


def error(form: Form, x: Inputs) -> float:
    """The largest 2-norm error among q, k, v and the gradients, against the reference in fp64."""
    leaves = [t.detach().double().requires_grad_() for t in x.leaves]
    wide = [QKV(*leaves[i : i + 5]) for i in range(0, len(leaves), 5)]
    truth = joint_qkv_reference(wide, x.heads, x.rope, 1e-6)
    exact = torch.autograd.grad(truth, leaves, [g.double() for g in x.grads])
    out = x.forward(form)
    found = (*out, *x.backward(out))
    return max(relative_error(a, b) for a, b in zip(found, (*truth, *exact), strict=True))


def tolerance(form: str, dtype: torch.dtype) -> float:
    """fp32: sums of 64 or 128. bf16: ours rounds each value once, by 2^-8 of it at most; diffusers' three times, and
    the gradients of what it rounded again."""
    if dtype == FP32:
        return 1e-6 if form == "ours" else 1e-5
    return 2**-8 if form == "ours" else 2**-6


def step_of(x: Inputs, form: Form, what: str) -> Callable[[], tuple[Tensor, ...]]:
    if what == "fwd":
        return lambda: x.forward(form)
    if what == "fwd+bwd":
        return lambda: x.backward(x.forward(form))
    out = for_backward(lambda: x.forward(form))
    return lambda: x.backward(out)


def least_bytes(case: Case, x: Inputs, what: str) -> int:
    """Forward: read and write q, k and v; backward: read their gradients and q and k, write dq, dk and dv. v of one
    stream need not move. The tables, shared by all heads, and the weights are not counted."""
    both = len(case.tokens) > 1
    tensors = {"fwd": 6 if both else 4, "bwd": 8 if both else 6}
    return x.numel * case.dtype.itemsize * sum(tensors[w] for w in what.split("+"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", [*FORMS, "compile"])
@pytest.mark.parametrize("what", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_joint_qkv(measure, leave_out, case: Case, what: str, form: str, mode: str) -> None:
    op = f"joint qkv {what}"
    if form == "compile" and not CUDA:
        leave_out(op, case.name, form, "torch.compile is timed on CUDA alone")
    x = Inputs(case)
    run = compiled() if form == "compile" else FORMS[form]
    measured = error(run, x)
    measure(
        op=op, case=case.name, form=form, mode=mode, fn=step_of(x, run, what), bytes=least_bytes(case, x, what),
        kind={"ours": "ours", "compile": "compile"}.get(form, "eager"), error=measured,
        tolerance=tolerance(form, case.dtype),
    )  # fmt: skip
