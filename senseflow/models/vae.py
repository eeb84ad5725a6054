"""Latents of pixels and back, for any diffusers AutoencoderKL; the identity where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError


def encode(vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, C, H/s, W/s] of pixels [B, 3, H, W] in [-1, 1]: (z - shift) * scale of a posterior sample by
    `noise`, of the latents' shape. No gradient. vae None: the pixels."""
    if vae is None:
        return pixels
    return sample(vae, *posterior(vae, pixels), noise)


@torch.no_grad()
def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, logvar) [B, C, H/s, W/s] of a VAE's posterior, in its dtype; unscaled. logvar lies in [-30, 20]."""
    found = vae.encode(pixels.to(vae.dtype)).latent_dist
    return found.mean, found.logvar


def sample(vae: Any, mean: Tensor, logvar: Tensor | None, noise: Tensor) -> Tensor:
    """Latents (z - shift) * scale, in noise's dtype, of the posterior's sample z by `noise`; logvar None: its mean."""
    z = mean.to(noise.dtype)
    if logvar is not None:
        z = z + torch.exp(0.5 * logvar.to(noise.dtype)) * noise
    return (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels [B, 3, H, W], nominally in [-1, 1], fp32, differentiable in the latents. vae None: the latents."""
    if vae is None:
        return latents
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    return vae.decode(z.to(vae.dtype)).sample.to(vae.dtype)


def decode_in(vae: Any, dtype: torch.dtype) -> None:
    """The decoder in `dtype`, in place: weights, activations, and what its norms give (their sums are fp32 inside the
    kernels). Not by autocast, whose norms give fp32 too: of 1024-pixel activations that left five sixths of the bytes.
    Latents are cast on their way in; the encoder stays as it is."""
    inner = getattr(vae, "inner", vae)
    if inner is None or dtype == inner.dtype:
        return
    before = getattr(inner, "post_quant_conv", None)
    for part in (inner.decoder, before):
        if part is not None:
            part.to(dtype)
    first = inner.decoder if before is None else before
    first.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))


def downsampling(vae: Any) -> int:
    """Pixels a latent is wide."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_side(vae: Any, side: int, patch: int = 1) -> int:
    """Latents that a picture of `side` pixels is wide. Raises UserError where they are no whole number of patches."""
    unit = downsampling(vae) * patch
    if side % unit:
        raise UserError(f"model.side = {side}: allowed is a multiple of {unit} with this teacher")
    return side // downsampling(vae)
