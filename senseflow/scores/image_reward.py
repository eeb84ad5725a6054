"""ImageReward v1.0 (Xu et al. 2023): its published checkpoint, run on transformers' BLIP.

The picture goes through BLIP's ViT, the prompt through BERT layers that attend to it; five linear layers read the first
token. The metric's own package needs a transformers of 2023.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.config import UserError
from senseflow.models.loading import first_line
from senseflow.scores.clip import to_pil
from senseflow.scores.weights import DEFAULTS, find_file, find_folder, hub_file, identity, library, source_of

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards of its training set, as published
TOKENS, SIDE, HEAD = 35, 224, 64
LAYERS = (1024, 128, 64, 16, 1)
VISION_NAMES = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.", "encoder.layers."),
]


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's tensors under transformers' names: (BlipVisionModel, BlipTextModel, linear layers)."""
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for pattern, new in VISION_NAMES:
                if re.search(pattern, name):
                    name = re.sub(pattern, new, name)
                    break
            vision[name] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            text[key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("mlp.layers."):
            head[key.removeprefix("mlp.layers.")] = value
    return vision, text, head


def head_layers(width: int) -> nn.Sequential:
    """The linear layers at the indices they have in the checkpoint, between dropouts that do nothing here."""
    sizes = (width, *LAYERS)
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    parts: list[nn.Module] = []
    for i, layer in enumerate(linear):
        parts += [layer, nn.Identity()] if i < 3 else [layer]
    return nn.Sequential(*parts)


class ImageReward:
    """Pictures and prompts -> fp32 [B, 1]. weights: the folder of ImageReward.pt and med_config.json, or a hub id;
    `bert`: the tokenizer's folder, or hub id."""

    def __init__(self, given: dict[str, str], device: torch.device):
        self.device = device
        file = find_file("imagereward", given)
        beside = file.parent / "med_config.json"
        config = beside if beside.is_file() else hub_file(DEFAULTS["imagereward"].source, beside.name, "put it beside")
        self.tokenizer = _tokenizer(given)
        networks: list[Any] = [n.eval().requires_grad_(False).to(device) for n in _networks(file, config)]
        self.vision, self.text, self.head = networks
        self.about = dict(weights=file.name, sha256=identity(file), tokenizer=source_of("bert", given))

    def prepared(self, picture: Tensor) -> Tensor:
        """uint8 [3, H, W] -> fp32 [3, S, S]: shorter side resized, bicubic, centre crop, CLIP's normalisation."""
        F = library("torchvision.transforms.functional")
        side: Any = self.vision.config.image_size
        shown: Any = to_pil(picture)
        x: Any = F.center_crop(F.resize(shown, side, F.InterpolationMode.BICUBIC), [side, side])
        return F.normalize(F.to_tensor(x), [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

    @torch.no_grad()
    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        x = torch.stack([self.prepared(p) for p in pictures]).to(self.device)
        words = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        seen = self.vision(x).last_hidden_state
        out = self.text(
            input_ids=words.input_ids.to(self.device), attention_mask=words.attention_mask.to(self.device),
            encoder_hidden_states=seen, encoder_attention_mask=torch.ones(seen.shape[:2], device=self.device).long(),
        )  # fmt: skip
        return ((self.head(out.last_hidden_state[:, 0].float()) - MEAN) / STD).cpu()


def _tokenizer(given: dict[str, str]) -> Any:
    from transformers import BertTokenizer

    library("torchvision")
    folder = find_folder("bert", given)
    try:
        tokenizer: Any = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"bert: {folder} holds no tokenizer: {first_line(error)}") from None
    return tokenizer


def _networks(file: Path, config: Path) -> tuple[Any, Any, nn.Module]:
    """(vision, text, head) with the checkpoint's weights, all of them. Raises UserError for another file."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    try:
        vision, text, head = split_state(torch.load(file, map_location="cpu", weights_only=True))
        med = json.loads(config.read_text())
        patch, width = vision["embeddings.patch_embedding.weight"], vision["embeddings.class_embedding"].shape[2]
        grid = round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
        depth = 1 + max(int(k.split(".")[2]) for k in vision if k.startswith("encoder.layers."))
        eyes = BlipVisionModel(BlipVisionConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // HEAD, patch_size=patch.shape[3],
            intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0], image_size=grid * patch.shape[3],
            hidden_act="gelu", layer_norm_eps=1e-6,  # timm's
        ))  # fmt: skip
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "max_position_embeddings", "layer_norm_eps", "hidden_act")  # fmt: skip
        special: dict[str, Any] = dict(
            bos_token_id=0, eos_token_id=0, sep_token_id=0, pad_token_id=0
        )  # unused: nothing is generated
        words = BlipTextModel(BlipTextConfig(
            **{n: med[n] for n in names if n in med}, **special, encoder_hidden_size=width, is_decoder=True,
        ), add_pooling_layer=False)  # fmt: skip  # is_decoder: it has cross-attention; called without a causal mask
        layers = head_layers(med["hidden_size"])
        eyes.load_state_dict(vision)
        words.load_state_dict(text)
        layers.load_state_dict(head)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{file} does not load as ImageReward v1.0: {first_line(error)}") from None
    return eyes, words, layers
