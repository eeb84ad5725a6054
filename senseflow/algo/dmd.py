"""The distribution-matching term (paper.md 1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from senseflow.flow import add_noise
from senseflow.models.adapter import Adapter, Condition
from senseflow_kernels import DMDLoss, dmd_loss


@torch.no_grad()
def teacher_predictions(
    adapter: Adapter, teacher: nn.Module, x: Tensor, sigma: Tensor, cond: Condition,
    guidance: Tensor | None, uncond: Condition | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(conditional, unconditional) predictions from ONE forward of 2B, ordered [uncond, cond]; (conditional, None)
    from one of B when there is nothing to combine: the teacher embeds its guidance, or is asked without."""
    if uncond is None or guidance is None:
        return adapter.predict(teacher, x, sigma, cond, guidance), None
    both = adapter.predict(teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), uncond.cat(cond))
    v_uncond, v_cond = both.chunk(2)
    return v_cond, v_uncond


def dmd_term(
    adapter: Adapter, x0: Tensor, noise: Tensor, sigma: Tensor, cond: Condition, fake_net: nn.Module,
    teacher_net: nn.Module, guidance: Tensor | None, uncond: Condition | None,
    normaliser: str = "sample", eps: float = 0.0,
) -> DMDLoss:  # fmt: skip
    """L_DMD of the student's x0 [B, C, H, W]; the gradient goes through x0 alone.

    noise as x0; sigma and guidance fp32 [B]; uncond None for a teacher that embeds its guidance.
    """
    alpha = adapter.schedule.alpha(sigma)
    with torch.no_grad():
        x_t = add_noise(x0, noise, sigma, alpha)
        fake = adapter.predict(fake_net, x_t, sigma, cond)
        v_cond, v_uncond = teacher_predictions(adapter, teacher_net, x_t, sigma, cond, guidance, uncond)
    return dmd_loss(
        x0, x_t, fake, v_cond, v_uncond, sigma=sigma, alpha=alpha, guidance=guidance,
        parameterization=adapter.parameterization, normaliser=normaliser, eps=eps,
    )  # fmt: skip
