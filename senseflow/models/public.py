"""The public checkpoints' own configs: networks of true size on the meta device, which holds shapes and no numbers.

What a config.json of each part says where it differs from the class's default. The text encoders are outside the
training loop; they count for what encodes the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from senseflow.config import UserError

SD35: dict[str, Any] = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
    pooled_projection_dim=2048, qk_norm="rms_norm",
)  # fmt: skip
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=32, sample_size=1024,
)  # fmt: skip
VAE16: dict[str, Any] = VAE | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
SDXL_UNET: dict[str, Any] = dict(
    sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
CLIP_L = ("CLIPTextModelWithProjection", dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
))  # fmt: skip
CLIP_L_PLAIN = ("CLIPTextModel", CLIP_L[1])  # SDXL and FLUX.1 read it before the projection
CLIP_G = ("CLIPTextModelWithProjection", dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
    hidden_act="gelu",
))  # fmt: skip
T5_XXL = ("T5EncoderModel", dict(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu",
))  # fmt: skip
QWEN3_4B = ("Qwen3ForCausalLM", dict(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, tie_word_embeddings=True,
))  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline by its parts, each (class, config). network: what is distilled; texts: of transformers."""

    hub: str
    network: tuple[str, dict[str, Any]]
    vae: tuple[str, dict[str, Any]]
    texts: tuple[tuple[str, dict[str, Any]], ...]


CHECKPOINTS = {
    "sd35-medium": Checkpoint(
        "stabilityai/stable-diffusion-3.5-medium",
        ("SD3Transformer2DModel", SD35 | dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        )),
        ("AutoencoderKL", VAE16 | dict(scaling_factor=1.5305, shift_factor=0.0609)), (CLIP_L, CLIP_G, T5_XXL),
    ),
    "sd35-large": Checkpoint(
        "stabilityai/stable-diffusion-3.5-large",
        ("SD3Transformer2DModel", SD35 | dict(
            num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
        )),
        ("AutoencoderKL", VAE16 | dict(scaling_factor=1.5305, shift_factor=0.0609)), (CLIP_L, CLIP_G, T5_XXL),
    ),
    "flux-dev": Checkpoint(
        "black-forest-labs/FLUX.1-dev",
        ("FluxTransformer2DModel", dict(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )),
        ("AutoencoderKL", VAE16 | dict(scaling_factor=0.3611, shift_factor=0.1159)), (CLIP_L_PLAIN, T5_XXL),
    ),
    "sdxl": Checkpoint(
        "stabilityai/stable-diffusion-xl-base-1.0", ("UNet2DConditionModel", SDXL_UNET),
        ("AutoencoderKL", VAE | dict(latent_channels=4, scaling_factor=0.13025)), (CLIP_L_PLAIN, CLIP_G),
    ),
    "flux2-klein": Checkpoint(
        "black-forest-labs/FLUX.2-klein-base-4B",
        ("Flux2Transformer2DModel", dict(
            patch_size=1, in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=7680, mlp_ratio=3.0, axes_dims_rope=(32, 32, 32, 32),
            rope_theta=2000, guidance_embeds=False,
        )),
        ("AutoencoderKLFlux2", {}), (QWEN3_4B,),
    ),
}  # fmt: skip


def build(part: tuple[str, dict[str, Any]], device: str = "meta") -> Any:
    """A network of a part's class and config, of diffusers or else of transformers. Raises UserError where the
    installed libraries have no such class."""
    import diffusers
    import transformers

    name, config = part
    with torch.device(device):
        if hasattr(diffusers, name):
            return getattr(diffusers, name)(**config)
        if not hasattr(transformers, name):
            raise UserError(f"this diffusers {diffusers.__version__} has no {name}: install a newer one")
        cls = getattr(transformers, name)
        return cls(cls.config_class(**config))


def count(net: nn.Module) -> int:
    """Parameters and persistent buffers, each once."""
    return sum(t.numel() for t in {id(t): t for t in net.state_dict(keep_vars=True).values()}.values())


def gigabytes(name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """GB (1e9 bytes) of each part of CHECKPOINTS[name] in dtype: its network, vae, and text encoders together."""
    public = CHECKPOINTS[name]
    parts = {"network": [public.network], "vae": [public.vae], "text": list(public.texts)}
    return {k: sum(count(build(p)) for p in v) * dtype.itemsize / 1e9 for k, v in parts.items()}
