"""Batches by position: which image comes when is a function of (seed, position) alone, so resume needs no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from senseflow.data.emoji import EmojiSet, pick_variants, to_float
from senseflow.models.adapter import Condition


@dataclass
class Batch:
    """latents [B, C, H, W]; pixels fp32 [B, 3, Hp, Wp] in [-1, 1]; samples int64 [B], global sample indices.

    mean [B, C, H, W] and logvar, of the same shape or None (the mean itself is meant): the VAE's posterior where a
    cache holds it; latents are then still to be drawn (`steps.encoded`). encoded: latents are as they shall be.
    reference: the backbone's taps of the pixels, [B, D, h, w] each, where a cache holds them. items: int64 [B], on the
    host, which items of the source these are.
    """

    latents: Tensor
    pixels: Tensor
    cond: Condition
    samples: Tensor
    mean: Tensor | None = None
    logvar: Tensor | None = None
    encoded: bool = False
    reference: list[Tensor] | None = None
    items: Tensor | None = None


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def shuffled_index(seed: int, first: int, batch: int, count: int) -> Tensor:
    """int64 [batch]: items `first` to `first + batch` of an endless stream of permutations of range(count)."""
    positions = range(first, first + batch)
    return torch.stack([_epoch_order(seed, p // count, count)[p % count] for p in positions])


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the host waits for no copy to a GPU, as it is from pinned memory."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class EmbeddedData:
    """The emoji variants in memory, with their prompt embeddings. Latents are the pixels (identity VAE)."""

    encodes_text = False  # all of it at the start: the text encoders may go
    fingerprint = "emoji"

    def __init__(self, variants: EmojiSet, cond: Condition, seed: int, device: str | torch.device):
        self.images = variants.images  # uint8 [N, V, 3, H, W], on the host
        self.cond = cond.to(device)
        self.captions = variants.captions
        self.seed = seed

    def __len__(self) -> int:
        return len(self.captions)

    def begin(self, out: Path, first: int) -> None:
        """Nothing of the embedded set is ever skipped."""

    def close(self) -> None:
        """No threads."""

    def example(self) -> Condition:
        """Any one prompt."""
        return self.cond.index(torch.zeros(1, dtype=torch.long))

    def batch(self, iteration: int, size: int) -> Batch:
        """The global batch of an iteration; its samples carry the indices iteration * size + 0 ... size - 1."""
        first = iteration * size
        device = self.cond.embeds.device
        index = shuffled_index(self.seed, first, size, len(self))
        pixels = to_float(on_device(pick_variants(self.images, index, self.seed * 15_485_863 + iteration), device))
        samples = torch.arange(first, first + size, device=device)
        return Batch(pixels, pixels, self.cond.index(on_device(index, device)), samples)
