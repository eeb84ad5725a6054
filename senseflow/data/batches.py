"""Batches by position: which image comes when is a function of (seed, position) alone, so resume needs no state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.data.emoji import EmojiSet, draw_variants, to_float
from senseflow.models.adapter import Condition

TOGETHER = 32  # pictures through the backbone at once


@dataclass
class Batch:
    """latents [B, C, H, W]; pixels fp32 [B, 3, Hp, Wp] in [-1, 1]; samples int64 [B], global sample indices.

    mean [B, C, H, W] and logvar, of the same shape or None (the mean itself is meant): the VAE's posterior where a
    cache holds it; latents are then still to be drawn (`steps.encoded`). encoded: latents are as they shall be.
    reference: the backbone's taps of the pixels, [B, D, h, w] each, where a cache or the data hold them. items: int64
    [B], on the host, which items of the source these are.
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


def split(batch: Batch, parts: int) -> list[Batch]:
    """The rows of a batch in `parts` equal runs, in order; itself for one."""
    if parts == 1:
        return [batch]
    size = len(batch.samples) // parts
    out = []
    for rows in (slice(k * size, (k + 1) * size) for k in range(parts)):
        some: dict[str, Any] = {name: getattr(batch, name) for name in ("mean", "logvar", "items")}
        some = {name: None if t is None else t[rows] for name, t in some.items()}
        cond = Condition(batch.cond.embeds[rows], batch.cond.pooled[rows])
        reference = None if batch.reference is None else [t[rows] for t in batch.reference]
        out.append(
            Batch(
                batch.latents[rows], batch.pixels[rows], cond, batch.samples[rows], encoded=batch.encoded,
                reference=reference, **some,
            )
        )  # fmt: skip
    return out


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

    def __init__(
        self, variants: EmojiSet, cond: Condition, seed: int, device: str | torch.device, rank: int = 0, world: int = 1
    ):
        self.rank, self.world = rank, world
        self.images = variants.images  # uint8 [N, V, 3, H, W], on the host
        self.cond = cond.to(device)
        self.captions = variants.captions
        self.seed = seed
        self.taps: list[Tensor] | None = None  # of every variant, [N * V, D, h, w] each, on the device

    def __len__(self) -> int:
        return len(self.captions)

    def begin(self, out: Path, first: int) -> None:
        """Nothing of the embedded set is ever skipped."""

    def close(self) -> None:
        """No threads."""

    def example(self) -> Condition:
        """Any one prompt."""
        return self.cond.index(torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def keep_taps(self, features: Callable[[Tensor], list[Tensor]], most: int) -> None:
        """Batches carry `reference` from now on: what `features` makes of pixels [n, 3, H, W], made here once, the same
        few pictures together in every run, so that a resumed one goes on with the same bits. Nothing is kept where all
        of it would take more than `most` bytes."""
        device, images = self.cond.embeds.device, self.images.flatten(0, 1)
        made: list[list[Tensor]] = []
        for part in images.split(TOGETHER):
            made.append(features(to_float(on_device(part, device))))
            if sum(tap[0].numel() * tap.element_size() for tap in made[0]) * len(images) > most:
                return
        self.taps = [torch.cat(tap) for tap in zip(*made, strict=True)]

    def batch(self, iteration: int, size: int) -> Batch:
        """This rank's rows of an iteration's batch of `size` samples, which carry the indices iteration * size + 0 ...
        size - 1."""
        first = iteration * size
        rows = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        device = self.cond.embeds.device
        index = shuffled_index(self.seed, first, size, len(self))
        count = self.images.shape[1]
        drawn = draw_variants(count, len(index), self.seed * 15_485_863 + iteration)[rows]  # of the whole batch
        index = index[rows]
        pixels = to_float(on_device(self.images[index, drawn], device))
        samples = torch.arange(first, first + size, device=device)[rows]
        reference = None
        if self.taps is not None:
            which = on_device(index * count + drawn, device)
            reference = [tap[which] for tap in self.taps]
        return Batch(pixels, pixels, self.cond.index(on_device(index, device)), samples, reference=reference)
