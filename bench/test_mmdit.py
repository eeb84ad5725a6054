"""A whole block of SD 3.5 or FLUX, forward and with its backward: diffusers, compiled, fused, fused and compiled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import CUDA, DEVICE, relative_error
from senseflow_kernels import fuse_mmdit

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

DTYPE = torch.bfloat16 if CUDA else torch.float32


class Case(NamedTuple):
    """One block at 1024 px. context_pre_only is off: the model has a second block, which is not run."""

    name: str
    family: str
    blocks: str
    heads: int
    head_dim: int
    image: int
    text: int


CASES = [
    Case("SD3.5L joint block", "sd3", "transformer_blocks", 38, 64, 4096, 333),
    Case("SD3.5M dual block", "dual", "transformer_blocks", 24, 64, 4096, 333),
    Case("FLUX double block", "flux", "transformer_blocks", 24, 128, 4096, 512),
    Case("FLUX single block", "flux", "single_transformer_blocks", 24, 128, 4096, 512),
]
if not CUDA:
    CASES = [case._replace(heads=2, head_dim=32, image=64, text=16) for case in CASES]
# form -> (fused, compiled, SDPA by the order that is best on Hopper: the honest rival)
FORMS = {
    "diffusers": (False, False, False), "compile": (False, True, False), "compile, cuDNN first": (False, True, True),
    "ours": (True, False, False), "ours, compile": (True, True, False),
}  # fmt: skip
KINDS = {"diffusers": "eager", "compile": "compile", "compile, cuDNN first": "rival"}


def model_of(case: Case) -> nn.Module:
    width = case.heads * case.head_dim
    shared: dict[str, Any] = dict(
        attention_head_dim=case.head_dim, num_attention_heads=case.heads, joint_attention_dim=64
    )  # fmt: skip
    if case.family == "flux":
        side = case.head_dim // 16 * 7  # 16, 56, 56 at FLUX's 128
        double = case.blocks == "transformer_blocks"
        shared |= dict(num_layers=int(double), num_single_layers=int(not double))
        return FluxTransformer2DModel(**shared, axes_dims_rope=(case.head_dim - 2 * side, side, side))
    dual = (0,) if case.family == "dual" else ()
    return SD3Transformer2DModel(
        **shared, num_layers=2, caption_projection_dim=width, qk_norm="rms_norm", dual_attention_layers=dual
    )  # fmt: skip


def inputs_of(case: Case, model: Any) -> dict[str, Any]:
    """fp32 and on the CPU: one truth for all forms."""
    width = case.heads * case.head_dim
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(1, case.image, width), encoder_hidden_states=torch.randn(1, case.text, width),
        temb=torch.randn(1, width),
    )  # fmt: skip
    if case.family == "flux":
        side = int(case.image**0.5)
        places = torch.stack([torch.zeros(side, side), *torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")], -1)
        inputs["image_rotary_emb"] = model.pos_embed(torch.cat([torch.zeros(case.text, 3), places.view(-1, 3)]))
    return inputs


def moved(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """On the device; RoPE's tables stay fp32."""
    return {
        name: tuple(t.to(DEVICE) for t in value) if isinstance(value, tuple) else value.to(DEVICE, dtype)
        for name, value in inputs.items()
    }


def call_of(
    block: nn.Module,
    inputs: dict[str, Any],
    douts: list[Tensor],
    part: str,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Callable[[], list[Tensor]]:
    """The results of one call: (text, image), and with the backward the gradients of all inputs and weights."""
    wanted = [t.requires_grad_(part != "fwd") for t in inputs.values() if isinstance(t, Tensor)]
    wanted += list(block.parameters())

    def call() -> list[Tensor]:
        with context(), torch.set_grad_enabled(part != "fwd"):
            out = block(**inputs)
            return [*out, *(torch.autograd.grad(out, wanted, douts) if part != "fwd" else [])]

    return call


@functools.lru_cache(maxsize=1)
def prepared(case: Case) -> tuple[nn.Module, dict[str, Any], list[Tensor]]:
    """(model on the device, inputs and gradients of the outputs on the CPU), all fp32 and the same for every form."""
    torch.manual_seed(0)
    model = model_of(case)
    inputs = inputs_of(case, model)
    douts = [torch.randn_like(inputs[n]) for n in ("encoder_hidden_states", "hidden_states")]
    return model.to(DEVICE), inputs, douts


@functools.lru_cache(maxsize=2)
def truth_of(case: Case, part: str) -> list[Tensor]:
    """diffusers' own results in fp64, on a GPU in fp32: 2^-24 and a few sums away from it, nothing beside bf16."""
    exact = torch.float32 if CUDA else torch.float64
    pristine, inputs, douts = prepared(case)
    block = copy.deepcopy(getattr(pristine, case.blocks)[0]).to(exact)
    found = call_of(block, moved(inputs, exact), [d.to(DEVICE, exact) for d in douts], part)()
    return [t.detach().cpu() for t in found]


def best_attention() -> AbstractContextManager:
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


@pytest.mark.parametrize("part", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_block(measure, leave_out, case: Case, form: str, part: str) -> None:
    op, name = f"mmdit {part}", f"{case.name} {case.image}+{case.text} {'bf16' if CUDA else 'fp32'}"
    fused, compiled, cudnn_first = FORMS[form]
    if compiled and not CUDA:
        leave_out(op, name, form, "torch.compile is timed on CUDA alone")
    torch._dynamo.reset()
    pristine, inputs, douts = prepared(case)
    model = copy.deepcopy(pristine).to(DTYPE)
    block = getattr(model, case.blocks)[0]
    if fused:
        fuse_mmdit(model, compile=compiled)
    elif compiled:
        block.compile(fullgraph=True)
    context = best_attention if cudnn_first else nullcontext
    call = call_of(block, moved(inputs, DTYPE), [d.to(DEVICE, DTYPE) for d in douts], part, context)
    pairs = zip(call(), truth_of(case, part), strict=True)
    error = max(relative_error(found.cpu(), t) for found, t in pairs if t.norm() > 1e-3)
    weights = sum(p.nbytes for p in block.parameters())
    tokens = sum(t.nbytes for t in moved(inputs, DTYPE).values() if isinstance(t, Tensor))
    measure(
        op=op, case=name, form=form, kind=KINDS.get(form, "ours"), mode="call", fn=call,
        bytes=(weights + 2 * tokens) * (1 if part == "fwd" else 3), error=error,
        tolerance=2**-4 if CUDA else 1e-5,  # bf16: a dozen roundings of 2^-9 in a row, and sums that cancel
    )  # fmt: skip
