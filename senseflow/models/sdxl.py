"""Stable Diffusion XL: a U-Net that predicts eps on 4-channel latents, two text encoders, size conditioning, CFG."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.flow import DiffusionSchedule, constants
from senseflow.models import vae as autoencoder
from senseflow.models.adapter import Condition, cast, in_dtype
from senseflow.models.loading import load_component, load_pipeline_shell


class SDXLAdapter:
    """`models.adapter.Adapter` of a StableDiffusionXLPipeline folder.

    Latents [B, 4, side/8, side/8]; cond.embeds [B, 77, 2048], cond.pooled [B, 1280]; the unconditional embedding is
    zero, as released. Every image counts as uncropped and of `side` pixels.
    """

    parameterization = "epsilon"
    network = "unet"

    def __init__(
        self, source: str | Path, side: int = 1024, dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):  # fmt: skip
        """side: pixels."""
        from diffusers import AutoencoderKL

        self.source, self.side, self.dtype, self.device = source, side, dtype, torch.device(device)
        self.schedule = DiffusionSchedule()
        self.vae = load_component(AutoencoderKL, source, "vae", torch.float32, device)
        width = autoencoder.latent_side(self.vae, side)
        self.latent_shape: tuple[int, ...] = (self.vae.config.latent_channels, width, width)
        self._widths: tuple[int, int, int] | None = None  # of a prompt's encoding: tokens, width, pooled width

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The teacher's U-Net, frozen."""
        from diffusers import UNet2DConditionModel

        return load_component(UNet2DConditionModel, self.source, "unet", dtype, self.device)

    def student_of(self, teacher: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A trainable copy of the teacher, kept in dtype."""
        return cast(copy.deepcopy(teacher), dtype).requires_grad_(True)

    def blocks(self, net: Any) -> list[nn.Module]:
        """What is sharded, compiled or checkpointed by itself."""
        return [*net.down_blocks, net.mid_block, *net.up_blocks]

    def _time_ids(self, x: Tensor) -> Tensor:
        """(height, width, top, left, height, width) in pixels, [B, 6]."""
        down = autoencoder.downsampling(self.vae)
        h, w = x.shape[2] * down, x.shape[3] * down
        return constants((h, w, 0, 0, h, w), x.device, x.dtype).expand(len(x), -1)

    def predict(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition, guidance: Tensor | None = None) -> Tensor:
        """eps [B, 4, H, W]; the network knows no guidance of its own."""
        with in_dtype(x, self.dtype):
            return net(
                sample=x.to(self.dtype), timestep=self.schedule.timestep(sigma), return_dict=False,
                encoder_hidden_states=cond.embeds,
                added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": self._time_ids(x)},
            )[0].to(x.dtype)  # fmt: skip

    def features(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """The middle block's output as tokens [B, H W / 16, 1280]: what DMD2's classifier reads."""
        caught: list[Tensor] = []
        handle = net.mid_block.register_forward_hook(lambda _m, _i, out: caught.append(out))
        try:
            self.predict(net, x, sigma, cond)
        finally:
            handle.remove()
        return caught[0].flatten(2).transpose(1, 2)

    def text_shape(self, net: Any) -> tuple[int, int, int]:
        """(tokens, their width, width of the pooled vector) of an encoded prompt, known without an encoder."""
        c = net.config
        return 77, c.cross_attention_dim, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents)

    @cached_property
    def text(self) -> Any:
        """The pipeline without its U-Net and VAE: tokenizers and encoders."""
        from diffusers import StableDiffusionXLPipeline

        pipe = load_pipeline_shell(StableDiffusionXLPipeline, self.source, self.dtype, ("unet", "vae"))
        return pipe.to(self.device)

    def free_text(self) -> None:
        """Drops the text encoders; the shape of the empty encoding stays."""
        self.uncond(1)
        self.__dict__.pop("text", None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The pipeline's own encoding."""
        embeds, _, pooled, _ = self.text.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        self._widths = (embeds.shape[1], embeds.shape[2], pooled.shape[1])
        return Condition(embeds, pooled)

    def uncond(self, batch: int) -> Condition:
        """Zeros, `batch` times: what SDXL was trained with for a dropped prompt."""
        if self._widths is None:
            self.encode_prompts([""])
        assert self._widths is not None
        tokens, width, pooled = self._widths
        zero = torch.zeros(batch, tokens, width, dtype=self.dtype, device=self.device)
        return Condition(zero, torch.zeros(batch, pooled, dtype=self.dtype, device=self.device))
