"""Operations of distribution-matching distillation for any DMD project. Needs torch alone, and uses its Triton.

CUDA tensors run fused Triton kernels, CPU tensors the same formulas in torch; see kernels/README.md.
"""

from senseflow_kernels._bf16 import join_fp32, split_fp32
from senseflow_kernels._launch import Unavailable, is_available, launches, planned, reason_against, strict, torch_path
from senseflow_kernels.adamw import AdamW
from senseflow_kernels.attention import (
    attention_backend,
    available_backends,
    joint_attention,
    set_attention_backend,
)
from senseflow_kernels.buckets import Buckets
from senseflow_kernels.hinge import HingeD, hinge_discriminator, hinge_generator
from senseflow_kernels.host import HostAdamW
from senseflow_kernels.lerp import Lerp, lerp_
from senseflow_kernels.mmdit import fuse_mmdit, unfuse_mmdit
from senseflow_kernels.modulate import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
    layer_norm_modulate2,
)
from senseflow_kernels.qk_norm_rope import QKV, joint_qkv
from senseflow_kernels.score import DMDLoss, ScoreGradient, dmd_loss, score_gradient

__all__ = [
    "QKV",
    "AdamW",
    "Buckets",
    "DMDLoss",
    "HingeD",
    "HostAdamW",
    "Lerp",
    "ScoreGradient",
    "Unavailable",
    "attention_backend",
    "available_backends",
    "dmd_loss",
    "fuse_mmdit",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "hinge_discriminator",
    "hinge_generator",
    "is_available",
    "join_fp32",
    "joint_attention",
    "joint_qkv",
    "launches",
    "layer_norm_modulate",
    "layer_norm_modulate2",
    "lerp_",
    "planned",
    "reason_against",
    "score_gradient",
    "set_attention_backend",
    "split_fp32",
    "strict",
    "torch_path",
    "unfuse_mmdit",
]
