"""Operations of distribution-matching distillation for any DMD project. Needs torch alone.

These are exact torch implementations with direct gradients; the fused kernels go behind the same functions.
"""

from senseflow_kernels.hinge import HingeD, hinge_discriminator, hinge_generator
from senseflow_kernels.lerp import lerp_
from senseflow_kernels.score import DMDLoss, ScoreGradient, dmd_loss, score_gradient

__all__ = [
    "DMDLoss",
    "HingeD",
    "ScoreGradient",
    "dmd_loss",
    "hinge_discriminator",
    "hinge_generator",
    "lerp_",
    "score_gradient",
]
