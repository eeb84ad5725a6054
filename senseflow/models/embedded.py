"""The embedded teacher: a small diffusers SD3 transformer on 32x32 pixels (identity VAE), MiniLM text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError
from senseflow.flow import FlowSchedule
from senseflow.models import vae as autoencoder
from senseflow.models.adapter import Condition, cast, middle_tokens
from senseflow.models.text import TEXT_LENGTH, embed_prompts, load_encoder

EMBEDDED_FOLDER = Path(__file__).parent.parent / "assets" / "teacher"
SIDE = 32  # pixels of its pictures


def teacher_folder(path: str) -> Path:
    """The folder of a teacher: '' or 'embedded' is the one that ships with the package."""
    return EMBEDDED_FOLDER if path in ("", "embedded") else Path(path)


def check_folder(folder: Path) -> None:
    """Raises UserError naming the folder and the first missing or cut-off file of a diffusers folder."""
    if not folder.is_dir():
        raise UserError(f"teacher folder {folder} does not exist: give a diffusers folder")
    for name in ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"teacher folder {folder} lacks {name}")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as f:
            f.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is truncated or corrupt ({error}): copy it again") from None


def load_transformer(folder: Path, device: str | torch.device = "cpu") -> torch.nn.Module:
    """The SD3 transformer of a diffusers folder, in fp32, in training mode off.

    Raises UserError when a file is missing, cut off, or not of this architecture.
    """
    from diffusers import SD3Transformer2DModel

    check_folder(folder)
    try:
        # low_cpu_mem_usage=False: plain construction, so no accelerate is needed
        net: Any = SD3Transformer2DModel.from_pretrained(
            folder / "transformer", low_cpu_mem_usage=False, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"teacher folder {folder}: transformer does not load: {first}") from None
    return net.float().eval().to(device)


def load_vae(folder: Path, device: str | torch.device = "cpu") -> Any:
    """The frozen AutoencoderKL of a diffusers folder, or None where there is no `vae` folder: latents are pixels then.

    Raises UserError when it does not load.
    """
    if not (folder / "vae").is_dir():
        return None
    from diffusers import AutoencoderKL

    try:
        vae: Any = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / 'vae'} does not load: {str(error).strip().splitlines()[0]}") from None
    return vae.float().eval().requires_grad_(False).to(device)


class EmbeddedAdapter:
    """`models.adapter.Adapter` for the embedded family: an SD3 transformer with MiniLM text.

    Latents are pixels, fp32 [B, 3, 32, 32] in [-1, 1], or (z - shift) * scale of a VAE's posterior.
    """

    parameterization: str = "flow"
    network = "transformer"

    def __init__(
        self, shift: float = 3.0, kind: Any = "linear", device: str = "cpu", vae: Any = None,
        folder: Path = EMBEDDED_FOLDER,
    ):  # fmt: skip
        self.folder = folder
        self.schedule = FlowSchedule(shift=shift, kind=kind)
        self.vae = vae
        self.latent_shape: tuple[int, ...] = (3, SIDE, SIDE)
        if vae is not None:
            side = SIDE // autoencoder.downsampling(vae)
            self.latent_shape = (vae.config.latent_channels, side, side)
        self.device = torch.device(device)

    def load_network(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The transformer of the folder, frozen."""
        net = load_transformer(self.folder, self.device)
        return (net if dtype == torch.float32 else net.to(dtype)).requires_grad_(False)  # diffusers warns at every cast

    def student_of(self, teacher: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """A trainable copy of the teacher, kept in dtype."""
        return cast(copy.deepcopy(teacher), dtype).requires_grad_(True)

    def blocks(self, net: Any) -> list[torch.nn.Module]:
        """What is sharded, compiled or checkpointed by itself."""
        return list(net.transformer_blocks)

    def free_text(self) -> None:
        """Drops the text encoder from memory; the next prompt loads it again."""
        load_encoder.cache_clear()

    def predict(
        self, net: torch.nn.Module, x: Tensor, sigma: Tensor, cond: Condition, guidance: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, 3, 32, 32] at x [B, 3, 32, 32], sigma fp32 [B]; the network knows no guidance of its own."""
        return net(
            hidden_states=x,
            timestep=self.schedule.timestep(sigma),
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]

    def features(self, net: torch.nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Image tokens [B, 64, D] after the middle block, for `disc.kind fake_features`."""
        blocks: Any = net.transformer_blocks
        return middle_tokens(blocks, lambda: self.predict(net, x, sigma, cond), 1)

    def text_shape(self, net: Any) -> tuple[int, int, int]:
        """(tokens, their width, width of the pooled vector) of an encoded prompt, known without an encoder."""
        return TEXT_LENGTH, net.config.joint_attention_dim, net.config.pooled_projection_dim

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Latents of pixels [B, 3, 32, 32] in [-1, 1]: a posterior sample by `noise`, of the latents' shape."""
        return autoencoder.encode(self.vae, pixels, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, 32, 32], nominally in [-1, 1], differentiable in the latents."""
        return autoencoder.decode(self.vae, latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Token embeddings fp32 [N, 16, 384] and their mean fp32 [N, 384]."""
        return embed_prompts(prompts).to(self.device)

    @cached_property
    def _empty(self) -> Condition:
        return self.encode_prompts([""])

    def uncond(self, batch: int) -> Condition:
        """The encoded empty prompt, `batch` times."""
        empty = self._empty
        return Condition(empty.embeds.expand(batch, -1, -1), empty.pooled.expand(batch, -1))
