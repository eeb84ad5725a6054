"""IDA's line, phi <- lam phi + (1 - lam) theta, over many tensors (paper.md 1.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def lerp_(phi: Sequence[Tensor], theta: Sequence[Tensor], lam: float | Tensor) -> None:
    """Moves every phi in place: fp32 arithmetic, one rounding to phi's dtype. lam: number or 0-d tensor.

    Raises ValueError when the lists or shapes differ.
    """
    if len(phi) != len(theta):
        raise ValueError(f"phi has {len(phi)} tensors, theta {len(theta)}")
    for i, (p, t) in enumerate(zip(phi, theta, strict=True)):
        if p.shape != t.shape:
            raise ValueError(f"tensor {i}: phi {tuple(p.shape)} against theta {tuple(t.shape)}")
    phi, theta = [p.detach() for p in phi], [t.detach() for t in theta]
    if all(p.dtype == t.dtype == torch.float32 for p, t in zip(phi, theta, strict=True)):
        weight: Any = 1 - lam  # torch's stub knows numbers alone, the function takes 0-d tensors too
        torch._foreach_lerp_(phi, theta, weight)
        return
    for p, t in zip(phi, theta, strict=True):
        p.copy_(torch.lerp(p.float(), t.float(), 1 - lam))
