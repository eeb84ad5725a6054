"""Differentiable augmentation of the discriminator's input x: colour, translation, cutout.

Every random number comes in as an argument, one row per sample, so that an augmented image depends
neither on its neighbours in the batch nor on any hidden generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

AUGMENT_DRAWS = 7  # brightness, saturation, contrast, translation y and x, cutout y and x
TRANSLATION = 1 / 8  # largest shift, as a share of the side
CUTOUT = 0.5  # side of the erased box, as a share of the side


def _colour(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Adds b - 1/2, scales distances from grey by 2 s and from the mean by c + 1/2."""
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (x - mean)


def _choice(u: Tensor, n: int) -> Tensor:
    """int64 in [0, n) from u in [0, 1); the clamp is for a product that rounds up to n."""
    return (u * n).long().clamp_max(n - 1)


def _shifted(side: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Of one axis: (source index [B, side], whether it lies in the image), shifted up to side/8."""
    reach = int(side * TRANSLATION + 0.5)
    shift = _choice(u, 2 * reach + 1) - reach
    source = torch.arange(side, device=u.device) - shift[:, None]
    # Wrapped, the indices are a permutation: the backward's scatter writes each pixel exactly once.
    return source.remainder(side), (source >= 0) & (source < side)


def _boxed(side: int, u: Tensor) -> Tensor:
    """Of one axis: bool [B, side], inside the cut box.

    Its centre may be any pixel, or the far edge where its side is even: boxes there are clipped.
    """
    box = int(side * CUTOUT + 0.5)
    first = _choice(u, side + 1 - box % 2) - box // 2
    offset = torch.arange(side, device=u.device) - first[:, None]
    return (offset >= 0) & (offset < box)


def diff_augment(x: Tensor, rand: Tensor) -> Tensor:
    """Colour, translation, then cutout of each sample; differentiable in x (DiffAugment's policy).

    x: [B, 3, H, W] in [-1, 1]. rand: [B, AUGMENT_DRAWS] uniforms in [0, 1), by column: brightness,
    saturation, contrast (all three do nothing at 1/2), translation down and right (0 at 1/2, up to
    round(side/8) pixels), cutout centre row and column. Uncovered and cut pixels are 0, mid-grey.
    Returns x's shape and dtype; arithmetic in fp32 or wider. Colours are not clipped to [-1, 1].
    Raises ValueError for other shapes.
    """
    if x.ndim != 4 or rand.shape != (len(x), AUGMENT_DRAWS):
        raise ValueError(
            f"diff_augment takes x [B, C, H, W] and rand [B, {AUGMENT_DRAWS}], "
            f"got {list(x.shape)} and {list(rand.shape)}"
        )
    channels, height, width = x.shape[1:]
    scalars = rand[:, :3, None, None, None].unbind(1)
    y = _colour(x.to(torch.promote_types(x.dtype, torch.float32)), *scalars)
    rows, row_kept = _shifted(height, rand[:, 3])
    cols, col_kept = _shifted(width, rand[:, 4])
    source = (rows[:, :, None] * width + cols[:, None, :]).flatten(1)
    y = y.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(x)
    cut = _boxed(height, rand[:, 5])[:, :, None] & _boxed(width, rand[:, 6])[:, None, :]
    keep = row_kept[:, :, None] & col_kept[:, None, :] & ~cut
    return torch.where(keep[:, None], y, 0.0).to(x.dtype)
