"""CLIP score, HPSv2 and 2.1, PickScore: cosines of a picture and its prompt in a CLIP space.

A row is the picture's unit embedding and, as its last number, the score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError
from senseflow.models.loading import first_line
from senseflow.scores.weights import find_file, find_folder, identity, library

HPS_ARCHITECTURE = "ViT-H-14"  # what the HPSv2 checkpoints fine-tune


def to_pil(picture: Tensor) -> Any:
    """uint8 [3, H, W] -> a PIL picture."""
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


class OpenClip:
    """A model of open_clip: unit embeddings, and their cosine."""

    def __init__(self, name: str, device: torch.device, state: Path | None = None):
        open_clip = library("open_clip")
        self.device = device
        try:
            made = open_clip.create_model_and_transforms(name, device=device, load_weights=state is None)
            self.model, self.preprocess = made[0].eval().requires_grad_(False), made[2]
            self.tokenize = open_clip.get_tokenizer(name)
            if state is not None:
                checkpoint = torch.load(state, map_location="cpu", weights_only=True)
                self.model.load_state_dict(checkpoint.get("state_dict", checkpoint))
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise UserError(f"{state or name} does not load as open_clip's {name}: {first_line(error)}") from None

    @torch.no_grad()
    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        """fp32 [B, D + 1]: the embedding, the cosine with the prompt (0 without prompts)."""
        x = torch.stack([self.preprocess(to_pil(p)) for p in pictures]).to(self.device)
        images = self.model.encode_image(x, normalize=True).float()
        if not prompts:
            return torch.cat([images, images.new_zeros(len(images), 1)], 1).cpu()
        texts = self.model.encode_text(self.tokenize(prompts).to(self.device), normalize=True).float()
        return torch.cat([images, (images * texts).sum(1, keepdim=True)], 1).cpu()


class TransformersClip:
    """A CLIPModel of transformers; scaled: times exp(logit_scale), PickScore's unit (its scores are about 20)."""

    def __init__(self, folder: Path, processor: Path, device: torch.device, scaled: bool):
        from transformers import CLIPModel, CLIPProcessor

        self.device, self.scaled = device, scaled
        try:
            net: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self.model = net.eval().requires_grad_(False).to(device)
            self.processor: Any = CLIPProcessor.from_pretrained(processor, local_files_only=True)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{folder} does not load as a CLIP of transformers: {first_line(error)}") from None

    @torch.no_grad()
    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        """fp32 [B, D + 1], as OpenClip's."""
        words = prompts or [""] * len(pictures)
        inputs = self.processor(
            text=words, images=[to_pil(p) for p in pictures], return_tensors="pt", padding=True, truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        )  # fmt: skip
        out = self.model(**inputs.to(self.device))
        images = torch.nn.functional.normalize(out.image_embeds.float(), dim=1)
        texts = torch.nn.functional.normalize(out.text_embeds.float(), dim=1)
        score = (images * texts).sum(1, keepdim=True)
        if self.scaled:
            score = score * self.model.logit_scale.exp().float()
        return torch.cat([images, score * bool(prompts)], 1).cpu()


class Clip:
    """The CLIP score. weights: a folder of open_clip or of transformers, or a hub id. The default, OpenCLIP ViT-g-14,
    is DMD2's; the paper does not say which it used."""

    def __init__(self, given: dict[str, str], device: torch.device, name: str = "clip"):
        folder = find_folder(name, given)
        self.about = dict(weights=str(given.get(name, folder.name)), sha256=identity(folder))
        if (folder / "open_clip_config.json").is_file():
            self.score: Any = OpenClip(f"local-dir:{folder}", device)
        else:
            self.score = TransformersClip(folder, folder, device, False)

    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        return self.score(pictures, prompts)


class PickScore:
    """PickScore v1 (Kirstain et al. 2023): exp(logit_scale) x cosine; the processor is its folder's, else
    ViT-H-14's."""

    def __init__(self, given: dict[str, str], device: torch.device):
        folder = find_folder("pickscore", given)
        own = any((folder / f"{name}_config.json").is_file() for name in ("preprocessor", "processor"))
        processor = folder if own else find_folder("pickscore-processor", given)
        self.about = dict(weights=str(given.get("pickscore", folder.name)), sha256=identity(folder))
        self.score = TransformersClip(folder, processor, device, True)

    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        return self.score(pictures, prompts)


class Hps:
    """HPSv2 (version "2.0") or 2.1 (Wu et al. 2023): the cosine of a fine-tuned ViT-H-14, on the whole picture: its
    longer side resized to the model's, the rest padded with black before normalising. weights: the .pt file, or an
    open_clip folder."""

    def __init__(self, given: dict[str, str], device: torch.device, name: str):
        if name in given and (Path(given[name]).expanduser() / "open_clip_config.json").is_file():
            path = Path(given[name]).expanduser()
            self.net = OpenClip(f"local-dir:{path}", device)
        else:
            path = find_file(name, given)
            self.net = OpenClip(HPS_ARCHITECTURE, device, path)
        size = self.net.model.visual.image_size
        self.net.preprocess = _LongestSide(size if isinstance(size, int) else size[0])
        self.about = dict(weights=path.name, sha256=identity(path))

    def __call__(self, pictures: list[Tensor], prompts: list[str]) -> Tensor:
        return self.net(pictures, prompts)


class _LongestSide:
    """The published preprocessing: bicubic on the tensor, longer side to `side`, zero padding, CLIP's normalisation."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, picture: Any) -> Tensor:
        F = library("torchvision.transforms.functional")
        x = F.to_tensor(picture.convert("RGB"))
        scale = self.side / max(x.shape[1:])
        if scale != 1:
            h, w = (round(n * scale) for n in x.shape[1:])
            x = F.resize(x, [h, w], F.InterpolationMode.BICUBIC)
            pad_h, pad_w = self.side - h, self.side - w
            x = F.pad(x, [pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2])
        constants = library("open_clip.constants")
        return F.normalize(x, list(constants.OPENAI_DATASET_MEAN), list(constants.OPENAI_DATASET_STD))
