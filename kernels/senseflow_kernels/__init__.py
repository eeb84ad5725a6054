"""Operations of distribution-matching distillation for any DMD project. Needs torch alone, and uses its Triton.

CUDA tensors run fused Triton kernels, CPU tensors the same formulas in torch; see kernels/README.md.
"""

from senseflow_kernels._bf16 import join_fp32, split_fp32
from senseflow_kernels._launch import Unavailable, is_available, launches, reason_against, strict, torch_path
from senseflow_kernels.buckets import Buckets
from senseflow_kernels.hinge import HingeD, hinge_discriminator, hinge_generator
from senseflow_kernels.lerp import Lerp, lerp_
from senseflow_kernels.qk_norm_rope import QKV, joint_qkv
from senseflow_kernels.score import DMDLoss, ScoreGradient, dmd_loss, score_gradient

__all__ = [
    "QKV",
    "Buckets",
    "DMDLoss",
    "HingeD",
    "Lerp",
    "ScoreGradient",
    "Unavailable",
    "dmd_loss",
    "hinge_discriminator",
    "hinge_generator",
    "is_available",
    "join_fp32",
    "joint_qkv",
    "launches",
    "lerp_",
    "reason_against",
    "score_gradient",
    "split_fp32",
    "strict",
    "torch_path",
]
