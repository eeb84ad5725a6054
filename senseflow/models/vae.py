"""Latents of pixels and back, for any diffusers AutoencoderKL; the identity where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encode(vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, C, H/s, W/s] of pixels [B, 3, H, W] in [-1, 1]: (z - shift) * scale of a posterior sample by
    `noise`, of the latents' shape. No gradient. vae None: the pixels."""
    if vae is None:
        return pixels
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    z = posterior.mean.to(noise.dtype) + posterior.std.to(noise.dtype) * noise
    return (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels [B, 3, H, W], nominally in [-1, 1], differentiable in the latents. vae None: the latents."""
    if vae is None:
        return latents
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return vae.decode(z.to(vae.dtype)).sample


def downsampling(vae: Any) -> int:
    """Pixels a latent is wide."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
