"""Batches by position: which image comes when is a function of (seed, position) alone, so resume needs no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from senseflow.data.emoji import EmojiSet, pick_variants, to_float
from senseflow.models.adapter import Condition


@dataclass
class Batch:
    """latents [B, C, H, W]; pixels fp32 [B, 3, Hp, Wp] in [-1, 1]; samples int64 [B], global sample indices."""

    latents: Tensor
    pixels: Tensor
    cond: Condition
    samples: Tensor


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def shuffled_index(seed: int, first: int, batch: int, count: int) -> Tensor:
    """int64 [batch]: items `first` to `first + batch` of an endless stream of permutations of range(count)."""
    positions = range(first, first + batch)
    return torch.stack([_epoch_order(seed, p // count, count)[p % count] for p in positions])


class EmbeddedData:
    """The emoji variants in memory, with their prompt embeddings. Latents are the pixels (identity VAE)."""

    def __init__(self, variants: EmojiSet, cond: Condition, seed: int, device: str | torch.device):
        self.images = variants.images  # uint8 [N, V, 3, H, W], on the host
        self.cond = cond.to(device)
        self.captions = variants.captions
        self.seed = seed

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, iteration: int, size: int) -> Batch:
        """The global batch of an iteration; its samples carry the indices iteration * size + 0 ... size - 1."""
        first = iteration * size
        device = self.cond.embeds.device
        index = shuffled_index(self.seed, first, size, len(self))
        pixels = to_float(pick_variants(self.images, index, self.seed * 15_485_863 + iteration)).to(device)
        samples = torch.arange(first, first + size, device=device)
        return Batch(pixels, pixels, self.cond.index(index.to(device)), samples)
