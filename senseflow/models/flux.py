"""FLUX.1-dev: double and single MMDiT blocks on packed 2x2 latents, RoPE, guidance as an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.flow import FlowSchedule
from senseflow.models import vae as autoencoder
from senseflow.models.adapter import Condition, in_dtype, middle_tokens
from senseflow.models.loading import load_component, load_pipeline_shell
from senseflow.models.lora import shared_copy


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 W/2, 4 C], each a 2x2 patch, channel first."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: [B, C, height, width]."""
    b, _, d = tokens.shape
    patches = tokens.view(b, height // 2, width // 2, d // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, height, width)


class FluxAdapter:
    """`models.adapter.Adapter` of a FluxPipeline folder.

    Latents [B, 16, side/8, side/8], packed inside `predict`; cond.embeds [B, text_length, 4096] (T5), cond.pooled
    [B, 768] (CLIP-L). The teacher embeds its guidance, so there is no unconditional forward; student and fake have
    no guidance embedding.
    """

    parameterization = "flow"
    network = "transformer"

    def __init__(
        self, source: str | Path, side: int = 1024, shift: float = 1.15, text_length: int = 512,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ):  # fmt: skip
        """side: pixels, a multiple of 16; shift: mu of the exponential law; text_length: T5 tokens."""
        from diffusers import AutoencoderKL

        self.source, self.text_length, self.dtype, self.device = source, text_length, dtype, torch.device(device)
        self.schedule = FlowSchedule(shift=shift, kind="exponential")
        self.vae = load_component(AutoencoderKL, source, "vae", torch.float32, device)
        side = autoencoder.latent_side(self.vae, side, patch=2)
        self.latent_shape: tuple[int, ...] = (self.vae.config.latent_channels, side, side)

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The teacher's transformer, frozen, with its guidance embedding."""
        from diffusers import FluxTransformer2DModel

        return load_component(FluxTransformer2DModel, self.source, "transformer", dtype, self.device)

    def student_of(self, teacher: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A trainable copy of the teacher, kept in dtype, without the guidance embedding."""
        from diffusers import FluxTransformer2DModel

        config = {**teacher.config, "guidance_embeds": False}
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # straight in dtype: FLUX in fp32 would be 48 GB for a moment
        try:
            with torch.device(self.device):
                net: Any = FluxTransformer2DModel.from_config(config)  # pyright: ignore[reportAssignmentType]
        finally:
            torch.set_default_dtype(usual)
        kept = {k: v for k, v in teacher.state_dict().items() if ".guidance_embedder." not in k}
        net.load_state_dict(kept)
        return net.eval().requires_grad_(True)

    @torch.no_grad()
    def lora_base(self, teacher: Any, guidance: float) -> nn.Module:
        """What the LoRA of student and fake stands on: the teacher at one guidance, on its very tensors.

        The embedding of a constant guidance is a constant vector: it joins the bias that ends the time embedding, a
        tensor of its own here, and the network needs no guidance any more. So student and fake start as the teacher
        at that guidance, and the LoRA does in FLUX.1-dev itself, called with guidance_scale = guidance, what it did
        here. Without the embedding they would start away from anything the teacher is, and a LoRA does not reach the
        time embedding.
        """
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        net = shared_copy(teacher)
        if not teacher.config.guidance_embeds:
            return net
        old, width = net.time_text_embed, net.inner_dim
        with torch.device("meta"):
            new: Any = CombinedTimestepTextProjEmbeddings(width, teacher.config.pooled_projection_dim)
        for part in ("time_proj", "timestep_embedder", "text_embedder"):
            setattr(new, part, getattr(old, part))
        last = new.timestep_embedder.linear_2
        # in the network's dtype and times 1000 after the rounding to it, as diffusers does: bf16 makes 3500 to 3504
        w = torch.tensor([guidance], dtype=last.bias.dtype, device=last.bias.device) * 1000
        constant = old.guidance_embedder(old.time_proj(w).to(last.bias.dtype))[0]
        last.bias = nn.Parameter(last.bias + constant, requires_grad=False)
        net.time_text_embed = new
        net.register_to_config(guidance_embeds=False)
        return net

    def blocks(self, net: Any) -> list[nn.Module]:
        """What is sharded, compiled or checkpointed by itself."""
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def predict(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition, guidance: Tensor | None = None) -> Tensor:
        """Velocity [B, 16, H, W]. guidance fp32 [B]: needed by a network that embeds it, of no use to another.

        Raises ValueError without it where it is needed.
        """
        _, _, h, w = x.shape
        if not net.config.guidance_embeds:
            guidance = None
        elif guidance is None:
            raise ValueError("this FLUX network embeds its guidance, and none was given")
        with in_dtype(x, self.dtype):
            tokens = net(
                hidden_states=pack(x).to(self.dtype), timestep=sigma, guidance=guidance, return_dict=False,
                pooled_projections=cond.pooled, encoder_hidden_states=cond.embeds,
                txt_ids=self._text_ids(cond.embeds), img_ids=self._image_ids(h, w, x),
            )[0]  # fmt: skip
        return unpack(tokens, h, w).to(x.dtype)

    @staticmethod
    def _text_ids(embeds: Tensor) -> Tensor:
        return torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype)

    @staticmethod
    def _image_ids(height: int, width: int, like: Tensor) -> Tensor:
        """(0, row, column) of each token: [H/2 W/2, 3]."""
        sides = [torch.arange(side // 2, device=like.device) for side in (height, width)]
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(like.dtype)

    def features(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Image tokens [B, T, D] after the middle of all blocks."""
        return middle_tokens(self.blocks(net), lambda: self.predict(net, x, sigma, cond), 1)

    def text_shape(self, net: Any) -> tuple[int, int, int]:
        """(tokens, their width, width of the pooled vector) of an encoded prompt, known without an encoder."""
        return self.text_length, net.config.joint_attention_dim, net.config.pooled_projection_dim

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents)

    @cached_property
    def text(self) -> Any:
        """The pipeline without its transformer and VAE: tokenizers and encoders."""
        from diffusers import FluxPipeline

        pipe = load_pipeline_shell(FluxPipeline, self.source, self.dtype, ("transformer", "vae"))
        return pipe.to(self.device)

    def free_text(self) -> None:
        """Drops the text encoders."""
        self.__dict__.pop("text", None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The pipeline's own encoding."""
        embeds, pooled, _ = self.text.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.text_length
        )
        return Condition(embeds, pooled)

    def clip_l(self, cond: Condition) -> Tensor:
        """CLIP ViT-L/14's text vector [B, 768], before its projection: all of cond.pooled."""
        return cond.pooled

    def uncond(self, batch: int) -> None:
        """None: guidance is an input of the teacher, not a second forward."""
        return
