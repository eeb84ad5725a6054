"""Tiny random pipelines of the real families, written with diffusers' own save_pretrained: same classes, same files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

WORDS = ["red", "apple", "a", "photo", "of", "penguin", "blue", "star"]


@cache
def few_pictures(canvas: int = 32):
    """`load_variants` of 16 pictures: a tiny text encoder takes seconds for the captions of all 311."""
    from senseflow.data.emoji import default_names, load_variants

    return load_variants(default_names()[:16], canvas)


def clip_tokenizer(folder: Path, length: int = 77):
    """A CLIP tokenizer over single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def t5_tokenizer():
    """A T5 tokenizer over letters and a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *("\u2581" + w for w in WORDS), *(chr(c) for c in range(97, 123))]
    inner = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    kind = T5TokenizerFast if isinstance(T5TokenizerFast, type) else PreTrainedTokenizerFast
    return kind(tokenizer_object=inner, extra_ids=0, **names)


def clip_text(width: int, projection: bool, layers: int = 2):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width, bos_token_id=52, eos_token_id=53,
        pad_token_id=53, hidden_act="gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_text(width: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def tiny_vae(channels: int, scale: float, shift: float | None):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, norm_num_groups=4, layers_per_block=1,
        scaling_factor=scale, shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
        sample_size=64,
    )  # fmt: skip


def spread(net, seed: int) -> None:
    """Random weights everywhere: fresh diffusers networks have zero layers that hide what stands before them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(noise / max(p[0].numel(), 1) ** 0.5 if p.dim() > 1 else p + 0.1 * noise)


def write_sd3(folder: Path, medium: bool = False) -> Path:
    """StableDiffusion3Pipeline as SD 3.5 Large has it; medium: with dual attention in the first block."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=16,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,) if medium else (),
    )  # fmt: skip
    vae, one, two, three = tiny_vae(16, 1.5305, 0.0609), clip_text(16, True), clip_text(16, True), t5_text(32)
    for seed, part in enumerate((net, vae, one, two, three)):
        spread(part, seed)
    tok = clip_tokenizer(folder / "words")
    StableDiffusion3Pipeline(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=one,
        tokenizer=tok, text_encoder_2=two, tokenizer_2=tok, text_encoder_3=three, tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_flux(folder: Path) -> Path:
    """FluxPipeline as FLUX.1-dev has it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae, one, two = tiny_vae(16, 0.3611, 0.1159), clip_text(16, False), t5_text(32)
    for seed, part in enumerate((net, vae, one, two)):
        spread(part, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    FluxPipeline(
        transformer=net, scheduler=scheduler, vae=vae, text_encoder=one, tokenizer=clip_tokenizer(folder / "words"),
        text_encoder_2=two, tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_sdxl(folder: Path) -> Path:
    """StableDiffusionXLPipeline."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), cross_attention_dim=32, norm_num_groups=4,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    vae, one, two = tiny_vae(4, 0.13025, None), clip_text(16, False, 3), clip_text(16, True, 3)
    for seed, part in enumerate((net, vae, one, two)):
        spread(part, seed)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    tok = clip_tokenizer(folder / "words")
    StableDiffusionXLPipeline(
        unet=net, scheduler=scheduler, vae=vae, text_encoder=one, tokenizer=tok, text_encoder_2=two, tokenizer_2=tok,
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen_tokenizer(folder: Path):
    """A Qwen tokenizer over single letters, with a chat template."""
    from transformers import Qwen2TokenizerFast

    pieces = [*(chr(c) for c in range(97, 123)), "\u0120", "\u010a", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def write_klein(folder: Path, distilled: bool = False) -> Path:
    """Flux2KleinPipeline as FLUX.2 [klein] base has it; its text is read at layers 9, 18 and 27."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    net = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, guidance_embeds=False, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=32,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=64
    )
    text = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
    ))  # fmt: skip
    for seed, part in enumerate((net, vae, text)):
        spread(part, seed)
    g = torch.Generator().manual_seed(7)
    vae.bn.running_mean.copy_(torch.randn(16, generator=g))
    vae.bn.running_var.copy_(torch.rand(16, generator=g) + 0.5)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    Flux2KleinPipeline(
        transformer=net, scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=qwen_tokenizer(folder / "words"),
        is_distilled=distilled,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def embedded_teacher(folder: Path) -> Path:
    """A random SD3 transformer of the embedded family's form: 32x32 pixels, MiniLM's 384 channels of text."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=32, patch_size=8, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=384, caption_projection_dim=16, pooled_projection_dim=384,
        pos_embed_max_size=4,
    )  # fmt: skip
    net.save_pretrained(folder / "transformer")
    return folder
