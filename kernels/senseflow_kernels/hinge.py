"""Timestep-weighted hinge losses over any number of discriminator heads (paper.md 1.6).

    L_G = -mean_b omega_b mean_k D_bk
    L_D = mean_b omega_b mean_k max(0, 1 - D_bk(real)) + mean_b omega_b mean_k max(0, 1 + D_bk(fake))

k runs over all logits of all heads of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class HingeD(NamedTuple):
    """loss: fp32 scalar with gradients; the rest fp32 scalars without: mean logits, share of right signs."""

    loss: Tensor
    real_mean: Tensor
    fake_mean: Tensor
    accuracy: Tensor


def _joined(logits: Sequence[Tensor]) -> Tensor:
    """fp32 [B, all logits]; raises ValueError for no heads or unequal batches."""
    if not logits:
        raise ValueError("no heads: logits must hold at least one tensor")
    if len({len(t) for t in logits}) != 1:
        raise ValueError(f"heads have different batches: {[len(t) for t in logits]}")
    return torch.cat([t.flatten(1).float() for t in logits], 1)


def _weight(weight: Tensor | None, joined: Tensor) -> Tensor:
    if weight is None:
        return joined.new_ones(len(joined))
    if weight.shape != joined.shape[:1]:
        raise ValueError(f"weight must have shape [{len(joined)}], got {list(weight.shape)}")
    return weight.float()


def hinge_generator(logits: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
    """L_G: fp32 scalar. logits: heads [B, *]; weight: omega [B]. Raises ValueError for other shapes."""
    joined = _joined(logits)
    return -(_weight(weight, joined) * joined.mean(1)).mean()


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor], weight: Tensor | None = None) -> HingeD:
    """L_D and the logit statistics. real, fake: heads [B, *]; weight: omega [B]. Raises ValueError as above."""
    r, f = _joined(real), _joined(fake)
    w = _weight(weight, r)
    loss = (w * (1 - r).relu().mean(1)).mean() + (w * (1 + f).relu().mean(1)).mean()
    with torch.no_grad():
        accuracy = 0.5 * ((r > 0).float().mean() + (f < 0).float().mean())
        return HingeD(loss, r.mean(), f.mean(), accuracy)
