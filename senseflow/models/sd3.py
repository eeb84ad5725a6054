"""Stable Diffusion 3 and 3.5 (Medium, Large): an MMDiT on 16-channel latents, three text encoders, CFG."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.config import UserError
from senseflow.flow import FlowSchedule
from senseflow.models import vae as autoencoder
from senseflow.models.adapter import Condition, cast, in_dtype, middle_tokens
from senseflow.models.loading import load_component, load_pipeline_shell, local_folder, read_config


class SD3Adapter:
    """`models.adapter.Adapter` of a StableDiffusion3Pipeline folder.

    Latents [B, 16, side/8, side/8]; cond.embeds [B, 77 + text_length, 4096], cond.pooled [B, 2048].
    """

    parameterization = "flow"
    network = "transformer"

    def __init__(
        self, source: str | Path, side: int = 1024, shift: float = 3.0, text_length: int = 256,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ):  # fmt: skip
        """side: pixels; text_length: T5 tokens, 256 as the pipeline's default, 77 as released. The text encoders are
        loaded at the first prompt, and dropped by `free_text`."""
        from diffusers import AutoencoderKL

        self.source, self.text_length, self.dtype, self.device = source, text_length, dtype, torch.device(device)
        self.schedule = FlowSchedule(shift=shift)
        self.vae = load_component(AutoencoderKL, source, "vae", torch.float32, device)
        side = autoencoder.latent_side(self.vae, side, patch=2)
        self.latent_shape: tuple[int, ...] = (self.vae.config.latent_channels, side, side)
        self._empty: Condition | None = None

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The teacher's transformer, frozen. Raises UserError for pictures larger than its table of positions."""
        from diffusers import SD3Transformer2DModel

        net = load_component(SD3Transformer2DModel, self.source, "transformer", dtype, self.device)
        reach, down = net.config.pos_embed_max_size * net.config.patch_size, autoencoder.downsampling(self.vae)
        if reach < self.latent_shape[1]:
            raise UserError(f"model.side is out of range: {self.source} allows up to {reach * down} pixels")
        return net

    def student_of(self, teacher: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A trainable copy of the teacher, kept in dtype."""
        return cast(copy.deepcopy(teacher), dtype).requires_grad_(True)

    def blocks(self, net: Any) -> list[nn.Module]:
        """What is sharded, compiled or checkpointed by itself."""
        return list(net.transformer_blocks)

    def predict(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition, guidance: Tensor | None = None) -> Tensor:
        """Velocity [B, 16, H, W]; the network knows no guidance of its own."""
        with in_dtype(x, self.dtype):
            return net(
                hidden_states=x.to(self.dtype), timestep=self.schedule.timestep(sigma), return_dict=False,
                encoder_hidden_states=cond.embeds, pooled_projections=cond.pooled,
            )[0].to(x.dtype)  # fmt: skip

    def features(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Image tokens [B, T, D] after the middle block, which returns (text tokens, image tokens)."""
        return middle_tokens(net.transformer_blocks, lambda: self.predict(net, x, sigma, cond), 1)

    def text_shape(self, net: Any) -> tuple[int, int, int]:
        """(tokens, their width, width of the pooled vector) of an encoded prompt, known without an encoder."""
        return 77 + self.text_length, net.config.joint_attention_dim, net.config.pooled_projection_dim

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents)

    @cached_property
    def text(self) -> Any:
        """The pipeline without its transformer and VAE: tokenizers and encoders."""
        from diffusers import StableDiffusion3Pipeline

        pipe = load_pipeline_shell(StableDiffusion3Pipeline, self.source, self.dtype, ("transformer", "vae"))
        return pipe.to(self.device)

    def free_text(self) -> None:
        """Drops the text encoders; the encoded empty prompt stays."""
        self.uncond(1)
        self.__dict__.pop("text", None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The pipeline's own encoding, prompt by prompt the same."""
        embeds, _, pooled, _ = self.text.encode_prompt(
            prompt=list(prompts), prompt_2=None, prompt_3=None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )  # fmt: skip
        return Condition(embeds, pooled)

    def clip_l(self, cond: Condition) -> Tensor:
        """CLIP ViT-L/14's projected text vector [B, 768], which cond.pooled begins with; CLIP-G's follows."""
        return cond.pooled[:, : self.clip_width]

    @cached_property
    def clip_width(self) -> int:
        """Of CLIP ViT-L/14's vector, from its config alone: a cache's prompts come without the encoder."""
        folder = local_folder(self.source, ["text_encoder"])
        return read_config(folder / "text_encoder" / "config.json").get("projection_dim", 512)  # transformers' default

    def uncond(self, batch: int) -> Condition:
        """The encoded empty prompt, `batch` times."""
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty.index(torch.zeros(batch, dtype=torch.long, device=self.device))
