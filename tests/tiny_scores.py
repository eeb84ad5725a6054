"""Tiny random networks of the metrics' own classes, in the files their published weights come in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_pipelines import clip_tokenizer, spread

OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MED = dict(vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
           max_position_embeddings=40, layer_norm_eps=1e-12, hidden_act="gelu")  # fmt: skip


def write_open_clip(folder: Path) -> Path:
    """A folder of open_clip's: the configuration and the weights."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.CLIP(**OPEN_CLIP)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_clip(folder: Path) -> Path:
    """A folder of transformers' CLIPModel with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    text = dict(vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=77, bos_token_id=52, eos_token_id=53, pad_token_id=53)  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=16)  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    spread(model, 1)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, clip_tokenizer(folder / "words")).save_pretrained(folder)
    return folder


def write_inception(folder: Path) -> Path:
    """torch-fidelity's state dict, random: the real network."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Blank(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):  # the constructor would download
            return None

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    file = folder / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({}, folder / "none.pth")
    net = Blank("inception", ["2048"], feature_extractor_weights_path=str(folder / "none.pth"))
    torch.save(net.state_dict(), file)
    return file


def image_reward_state(width: int = 128) -> dict[str, torch.Tensor]:
    """ImageReward.pt's tensors under its own names: a ViT of two blocks, a BERT of two layers that attend to it."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, width),
        "blip.visual_encoder.pos_embed": (1, 5, width),
        "blip.visual_encoder.patch_embed.proj.weight": (width, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (width,),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    for i in range(2):
        block = f"blip.visual_encoder.blocks.{i}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 2 * width, width)
        linear(f"{block}.mlp.fc2", width, 2 * width)
    norm("blip.visual_encoder.norm", width)
    h, inner = MED["hidden_size"], MED["intermediate_size"]
    shapes["blip.text_encoder.embeddings.word_embeddings.weight"] = (MED["vocab_size"], h)
    shapes["blip.text_encoder.embeddings.position_embeddings.weight"] = (MED["max_position_embeddings"], h)
    norm("blip.text_encoder.embeddings.LayerNorm", h)
    for i in range(2):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for kind, into in (("attention", h), ("crossattention", width)):
            linear(f"{layer}.{kind}.self.query", h, h)
            linear(f"{layer}.{kind}.self.key", h, into)
            linear(f"{layer}.{kind}.self.value", h, into)
            linear(f"{layer}.{kind}.output.dense", h, h)
            norm(f"{layer}.{kind}.output.LayerNorm", h)
        linear(f"{layer}.intermediate.dense", inner, h)
        linear(f"{layer}.output.dense", h, inner)
        norm(f"{layer}.output.LayerNorm", h)
    for index, (a, b) in zip((0, 2, 4, 6, 7), ((h, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        linear(f"mlp.layers.{index}", b, a)
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(s, generator=g) / max(s[-1], 1) ** 0.5 for k, s in shapes.items()}
    for name in [k for k in state if ("norm" in k.lower()) and k.endswith("weight")]:
        state[name] = 1 + 0.1 * state[name]
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    state["blip.vision_proj.weight"] = torch.zeros(4, width)  # unused by the reward
    return state


def write_image_reward(folder: Path) -> tuple[Path, Path]:
    """(folder of ImageReward.pt and med_config.json, folder of a BERT tokenizer)."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True)
    torch.save(image_reward_state(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "penguin", "blue", "star", "a"]
    (folder / "words").mkdir()
    (folder / "words" / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "words" / "vocab.txt")).save_pretrained(folder / "bert")
    return folder, folder / "bert"


def write_alexnet(folder: Path) -> Path:
    """torchvision's AlexNet, random; its classifier is left out, as nothing reads it."""
    from torchvision.models import alexnet

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state = {k: v for k, v in alexnet(weights=None).state_dict().items() if k.startswith("features.")}
    torch.save(state, folder / "alexnet.pth")
    return folder / "alexnet.pth"
