"""Forwards of diffusers' MMDiT blocks on the fused operations; mmdit.py puts them in. See figure 2 of the SD3 paper.

Each is bound to its block in place of the class's own forward, takes the same arguments and gives the same results.
Every Linear is called as the module it is, so LoRA layers, hooks and quantised layers of it stay in use. A call with
what these do not cover goes to the class's own forward, said once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from senseflow_kernels._launch import log
from senseflow_kernels.attention import joint_attention
from senseflow_kernels.modulate import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
    layer_norm_modulate2,
)
from senseflow_kernels.qk_norm_rope import QKV, joint_qkv

# Not FusedJointAttnProcessor2_0, which SD3's fuse_qkv_projections sets: it leaves out the QK norms.
PROCESSORS = ("JointAttnProcessor2_0", "FluxAttnProcessor")

_said: set[str] = set()


# -- what these forwards do not cover ------------------------------------------------------------------------------


# Modules that are not called here, only what lies in them: of a block, and of these.
BYPASSED = ("attn", "attn2", "norm", "norm1", "norm1_context", "norm2", "norm2_context")
INSIDE = ("norm", "norm_q", "norm_k", "norm_added_q", "norm_added_k")


def reason_against(block: nn.Module, attention_kwargs: dict[str, Any] | None) -> str | None:
    """Why this call must run the block's own forward. Asked before every forward, so by plain dictionary look-ups."""
    if attention_kwargs:
        return f"joint_attention_kwargs {sorted(attention_kwargs)}"
    if block.__dict__.get("_chunk_size") is not None:
        return "feed-forward chunking"
    for name in BYPASSED:
        module = block._modules.get(name)
        if module is None:
            continue
        # a processor with weights of its own, such as IP-Adapter's, is a module of the module
        processor = module.__dict__.get("processor") or module._modules.get("processor")
        if why := _unheard(module) or _processor(processor):
            return why
        for part in INSIDE:
            inner = module._modules.get(part)
            if inner is not None and (why := _unheard(inner)):
                return why
    return None


def _unheard(module: nn.Module) -> str | None:
    """What stands around the module's call, and would be passed by."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"hooks on its {type(module).__name__}"
    if "forward" in module.__dict__:  # as diffusers' and accelerate's hooks put there: caches, offload
        return f"another forward on its {type(module).__name__}"
    return None


def _processor(processor: Any) -> str | None:
    if processor is None:
        return None
    if type(processor).__name__ not in PROCESSORS:
        return f"the attention processor {type(processor).__name__}"
    for setting in ("_attention_backend", "_parallel_config"):
        if getattr(processor, setting, None) is not None:
            return f"the processor's {setting.removeprefix('_')}"
    return None


def own_forward(block: nn.Module, why: str, **inputs: Any) -> Any:
    """The class's forward; says once why."""
    line = f"{type(block).__name__} runs its own forward, not the fused one: {why}"
    if not torch.compiler.is_compiling() and line not in _said:
        _said.add(line)
        log.warning(line)
    return type(block).forward(block, **inputs)


# -- the parts of a block ------------------------------------------------------------------------------------------


def modulation(norm: Any, temb: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Chunks [B, D] of an adaLN: shift, scale, gate for attention, then for the feed-forward, then for the second
    attention."""
    return norm.linear(norm.silu(temb)).chunk(chunks, dim=1)


def _packed(attn: Any) -> bool:
    """Whether fuse_qkv_projections is in force: of the two processors FLUX's alone heeds it."""
    return attn.fused_projections and type(attn.processor).__name__ == "FluxAttnProcessor"


def _weight(norm: Any) -> Tensor | None:
    return None if norm is None else norm.weight


def image_qkv(attn: Any, y: Tensor) -> QKV:
    """Also that of a block with one stream."""
    weights = _weight(attn.norm_q), _weight(attn.norm_k)
    if _packed(attn):
        return QKV.packed(attn.to_qkv(y), *weights)
    return QKV(attn.to_q(y), attn.to_k(y), attn.to_v(y), *weights)


def text_qkv(attn: Any, c: Tensor) -> QKV:
    weights = _weight(attn.norm_added_q), _weight(attn.norm_added_k)
    if _packed(attn):
        return QKV.packed(attn.to_added_qkv(c), *weights)
    return QKV(attn.add_q_proj(c), attn.add_k_proj(c), attn.add_v_proj(c), *weights)


def attend(block: Any, attn: Any, *streams: QKV, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[B, N, D] of all streams, in their order."""
    q, k, v = joint_qkv(streams, attn.heads, rope=rope)
    return joint_attention(q, k, v, backend=block._senseflow.attention).flatten(2)


def image_out(attn: Any, out: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](out.contiguous()))


def in_range(x: Tensor) -> Tensor:
    """FLUX's guard of fp16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# -- the blocks ----------------------------------------------------------------------------------------------------


def joint_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """SD3's JointTransformerBlock. Returns (text or None after the last block, image)."""
    if why := reason_against(self, joint_attention_kwargs):
        return own_forward(
            self, why, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
            joint_attention_kwargs=joint_attention_kwargs,
        )  # fmt: skip
    x, text, attn = hidden_states, encoder_hidden_states, self.attn
    gate2 = branch2 = None
    if self.use_dual_attention:
        shift, scale, gate, shift_ff, scale_ff, gate_ff, shift2, scale2, gate2 = modulation(self.norm1, temb, 9)
        y, y2 = layer_norm_modulate2(x, scale, shift, scale2, shift2)
        branch2 = image_out(self.attn2, attend(self, self.attn2, image_qkv(self.attn2, y2)))
    else:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation(self.norm1, temb, 6)
        y = layer_norm_modulate(x, scale, shift)

    if self.context_pre_only:
        norm = self.norm1_context
        c_scale, c_shift = norm.linear(norm.silu(temb).to(text.dtype)).chunk(2, dim=1)
    else:
        c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = modulation(self.norm1_context, temb, 6)
    c = layer_norm_modulate(text, c_scale, c_shift)

    out = attend(self, attn, image_qkv(attn, y), text_qkv(attn, c))
    out, c_out = out.split([x.shape[1], text.shape[1]], dim=1)

    out = image_out(attn, out)
    x, y = gate_residual_layer_norm_modulate(x, gate, out, scale_ff, shift_ff, gate2=gate2, branch2=branch2)
    x = gate_residual(x, gate_ff, self.ff(y))
    if self.context_pre_only:
        return None, x
    c_out = attn.to_add_out(c_out.contiguous())
    text, c = gate_residual_layer_norm_modulate(text, c_gate, c_out, c_scale_ff, c_shift_ff)
    return gate_residual(text, c_gate_ff, self.ff_context(c)), x


def flux_double_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None, joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FLUX's FluxTransformerBlock. Returns (text, image)."""
    if why := reason_against(self, joint_attention_kwargs):
        return own_forward(
            self, why, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
            image_rotary_emb=image_rotary_emb, joint_attention_kwargs=joint_attention_kwargs,
        )  # fmt: skip
    x, text, attn = hidden_states, encoder_hidden_states, self.attn
    shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation(self.norm1, temb, 6)
    c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = modulation(self.norm1_context, temb, 6)
    y, c = layer_norm_modulate(x, scale, shift), layer_norm_modulate(text, c_scale, c_shift)

    out = attend(self, attn, text_qkv(attn, c), image_qkv(attn, y), rope=image_rotary_emb)
    c_out, out = out.split([text.shape[1], x.shape[1]], dim=1)

    x, y = gate_residual_layer_norm_modulate(x, gate, image_out(attn, out), scale_ff, shift_ff)
    x = gate_residual(x, gate_ff, self.ff(y))
    c_out = attn.to_add_out(c_out.contiguous())
    text, c = gate_residual_layer_norm_modulate(text, c_gate, c_out, c_scale_ff, c_shift_ff)
    return in_range(gate_residual(text, c_gate_ff, self.ff_context(c))), x


def flux_single_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None, joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FLUX's FluxSingleTransformerBlock: one stream, attention and feed-forward side by side. Returns (text, image)."""
    if why := reason_against(self, joint_attention_kwargs):
        return own_forward(
            self, why, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
            image_rotary_emb=image_rotary_emb, joint_attention_kwargs=joint_attention_kwargs,
        )  # fmt: skip
    lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation(self.norm, temb, 3)
    y = layer_norm_modulate(x, scale, shift)

    out = attend(self, self.attn, image_qkv(self.attn, y), rope=image_rotary_emb)
    out = self.proj_out(torch.cat([out, self.act_mlp(self.proj_mlp(y))], dim=2))
    text, x = in_range(gate_residual(x, gate, out)).split(lengths, dim=1)
    return text, x
