"""FLUX.2 [klein] base: shared-modulation MMDiT on 128-channel latents, Qwen3 hidden states as text, CFG."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.config import UserError
from senseflow.flow import FlowSchedule
from senseflow.models import vae as autoencoder
from senseflow.models.adapter import Condition, cast, in_dtype, middle_output
from senseflow.models.loading import load_component, load_pipeline_shell

TEXT_BATCH = 32  # prompts encoded at once: the language model hands out every layer's states


def _diffusers(name: str) -> Any:
    import diffusers

    if not hasattr(diffusers, name):
        raise UserError(
            f"model.family = 'flux2': this diffusers {diffusers.__version__} has no {name}: install a newer one"
        )
    return getattr(diffusers, name)


def patchify(z: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H/2, W/2]: the four pixels of a 2x2 patch become channels, channel first."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unpatchify(x: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    b, c, h, w = x.shape
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


class KleinLatents(nn.Module):
    """AutoencoderKLFlux2 as `models/vae.py` knows an AutoencoderKL: latents patchified to [B, 128, H/16, W/16] and
    normalised by the VAE's own statistics, a batch norm's, which is what the transformer sees."""

    def __init__(self, vae: Any):
        super().__init__()
        self.inner, c = vae, vae.config
        self.config = SimpleNamespace(
            latent_channels=4 * c.latent_channels, scaling_factor=1.0, shift_factor=0.0,
            block_out_channels=(*c.block_out_channels, None),  # the patch halves once more
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, deviation), [1, 128, 1, 1]."""
        bn = self.inner.bn
        return bn.running_mean.view(1, -1, 1, 1), (bn.running_var + self.inner.config.batch_norm_eps).sqrt().view(
            1, -1, 1, 1
        )

    def encode(self, pixels: Tensor) -> Any:
        found, (mean, std) = self.inner.encode(pixels).latent_dist, self._statistics()
        normal = SimpleNamespace(
            mean=(patchify(found.mean) - mean) / std, logvar=patchify(found.logvar) - 2 * std.log(),
        )  # fmt: skip
        return SimpleNamespace(latent_dist=normal)

    def decode(self, latents: Tensor) -> Any:
        mean, std = self._statistics()
        return self.inner.decode(unpatchify(latents * std + mean))


class Flux2Adapter:
    """`models.adapter.Adapter` of a Flux2KleinPipeline folder, an undistilled one (`klein-base`).

    Latents [B, 128, side/16, side/16]: the VAE's, patchified and normalised by its own statistics. cond.embeds
    [B, text_length, 7680]: three layers of Qwen3; cond.pooled [B, 7680]: the prompt's last token, normalised.
    """

    parameterization = "flow"
    network = "transformer"

    def __init__(
        self, source: str | Path, side: int = 1024, shift: float = 2.29118, text_length: int = 512,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ):  # fmt: skip
        """side: pixels, a multiple of 16; shift: mu of the exponential law; text_length: tokens, the pipeline's 512."""
        self.source, self.text_length, self.dtype, self.device = source, text_length, dtype, torch.device(device)
        self.schedule = FlowSchedule(shift=shift, kind="exponential")
        self.vae = KleinLatents(load_component(_diffusers("AutoencoderKLFlux2"), source, "vae", torch.float32, device))
        side = autoencoder.latent_side(self.vae, side)
        self.latent_shape: tuple[int, ...] = (self.vae.config.latent_channels, side, side)
        self._empty: Condition | None = None

    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The teacher's transformer, frozen. Raises UserError for one that embeds its guidance (FLUX.2-dev)."""
        net = load_component(_diffusers("Flux2Transformer2DModel"), self.source, "transformer", dtype, self.device)
        if net.config.guidance_embeds:
            raise UserError(f"{self.source} embeds its guidance: allowed are FLUX.2 [klein] base checkpoints")
        return net

    def student_of(self, teacher: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A trainable copy of the teacher, kept in dtype."""
        return cast(copy.deepcopy(teacher), dtype).requires_grad_(True)

    def blocks(self, net: Any) -> list[nn.Module]:
        """What is sharded, compiled or checkpointed by itself."""
        return [*net.transformer_blocks, *net.single_transformer_blocks]

    def predict(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition, guidance: Tensor | None = None) -> Tensor:
        """Velocity [B, 128, H, W]; the network knows no guidance of its own."""
        _, _, h, w = x.shape
        with in_dtype(x, self.dtype):
            tokens = net(
                hidden_states=x.to(self.dtype).flatten(2).mT, timestep=sigma, return_dict=False,
                encoder_hidden_states=cond.embeds, txt_ids=self._ids(x, 1, 1, cond.embeds.shape[1]),
                img_ids=self._ids(x, h, w, 1),
            )[0]  # fmt: skip
        return tokens.mT.unflatten(2, (h, w)).to(x.dtype)

    @staticmethod
    def _ids(like: Tensor, rows: int, columns: int, tokens: int) -> Tensor:
        """Position (0, row, column, place in the text) of each token: [rows columns tokens, 4]."""
        axes = [torch.arange(n, device=like.device) for n in (1, rows, columns, tokens)]
        return torch.cartesian_prod(*axes)

    def features(self, net: Any, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Image tokens [B, T, D] after the middle of all blocks: a single one has the text in front."""
        out = middle_output(self.blocks(net), lambda: self.predict(net, x, sigma, cond))
        return out[1] if isinstance(out, tuple) else out[:, cond.embeds.shape[1] :]

    def text_shape(self, net: Any) -> tuple[int, int, int]:
        """(tokens, their width, width of the pooled vector) of an encoded prompt, known without an encoder."""
        return self.text_length, net.config.joint_attention_dim, net.config.joint_attention_dim

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return autoencoder.decode(self.vae, latents)

    @cached_property
    def text(self) -> Any:
        """The pipeline without its transformer and VAE. Raises UserError for a distilled checkpoint, whose guidance is
        gone: no teacher."""
        pipe = load_pipeline_shell(_diffusers("Flux2KleinPipeline"), self.source, self.dtype, ("transformer", "vae"))
        if pipe.config.is_distilled:
            raise UserError(f"{self.source} is a distilled checkpoint: allowed are FLUX.2 [klein] base checkpoints")
        return pipe.to(self.device)

    def free_text(self) -> None:
        """Drops the text encoder; the encoded empty prompt stays."""
        self.uncond(1)
        self.__dict__.pop("text", None)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The pipeline's own encoding. It has no pooled vector, so D reads the prompt's last token, which has seen all
        before it, at mean 0 and variance 1 like CLIP's vector nearly is."""
        parts = []
        for start in range(0, len(prompts), TEXT_BATCH):
            some = list(prompts[start : start + TEXT_BATCH])
            embeds, _ = self.text.encode_prompt(some, self.device, max_sequence_length=self.text_length)
            right = self.text.tokenizer.padding_side == "right"
            last = torch.tensor([self._tokens(p) - 1 if right else -1 for p in some], device=embeds.device)
            pooled = embeds[torch.arange(len(some), device=embeds.device), last].float()
            pooled = nn.functional.layer_norm(pooled, pooled.shape[1:])
            parts.append(Condition(embeds, pooled.to(embeds.dtype)))
        return Condition(torch.cat([p.embeds for p in parts]), torch.cat([p.pooled for p in parts]))

    def _tokens(self, prompt: str) -> int:
        """How many tokens of the padded text are the prompt, in its chat template."""
        tokenizer = self.text.tokenizer
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return min(len(tokenizer(chat).input_ids), self.text_length)

    def uncond(self, batch: int) -> Condition:
        """The encoded empty prompt, `batch` times."""
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty.index(torch.zeros(batch, dtype=torch.long, device=self.device))
