"""Sets of pictures on disk, and the features of them, kept: a crash or a further metric costs no picture twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VERSION = 1  # of what an extractor's row holds: kept features of another are not used


@dataclass(frozen=True)
class PictureSet:
    """Files of one generator, those of one prompt together, `images` each. prompts: one per file, or none known."""

    name: str
    files: list[Path]
    prompts: list[str]
    images: int = 1


def read_picture(file: Path) -> Tensor:
    """uint8 [3, H, W]. Raises UserError for a file that is no picture."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from None


def picture_folder(name: str, folder: Path, prompts: list[str] | None = None) -> PictureSet:
    """The pictures of a user's folder, by name; their prompts from `prompts` (one per file, in that order), its
    samples.jsonl, or a .txt beside each. Raises UserError for a folder without pictures, or another number of
    prompts."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of pictures")
    record = folder / "samples.jsonl"
    if record.is_file():
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        files, found = [folder / row["file"] for row in rows], [row["prompt"] for row in rows]
        if absent := [f for f in files if not f.is_file()]:
            raise UserError(f"{record} names {absent[0].name}, which is not there")
    else:
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        texts = [f.with_suffix(".txt") for f in files]
        found = [t.read_text().strip() for t in texts] if all(t.is_file() for t in texts) else []
    if not files:
        raise UserError(f"{folder} holds no pictures: allowed are {', '.join(SUFFIXES)}")
    if prompts is not None and len(prompts) != len(files):
        raise UserError(
            f"{folder} holds {len(files)} pictures, and {len(prompts)} prompts are given: allowed is one each"
        )
    prompts = prompts if prompts is not None else found
    return PictureSet(name, files, prompts, _images(prompts))


def _images(prompts: list[str]) -> int:
    """How many pictures of one prompt stand together, where that is the same number for all; else 1."""
    if not prompts:
        return 1
    runs = [1]
    for a, b in pairwise(prompts):
        if a == b:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs[0] if len(set(runs)) == 1 else 1


class FeatureStore:
    """Rows of one extractor over picture sets, in OUT/features, a file per batch."""

    def __init__(self, folder: Path, batch: int):
        self.folder, self.batch = folder, batch

    def _parts(self, pictures: PictureSet) -> list[slice]:
        size = max(self.batch // pictures.images, 1) * pictures.images
        return [slice(i, min(i + size, len(pictures.files))) for i in range(0, len(pictures.files), size)]

    def _file(self, pictures: PictureSet, extractor: str, about: dict[str, Any], part: slice) -> tuple[Path, str]:
        key = hashlib.sha256(json.dumps([VERSION, extractor, about], sort_keys=True).encode()).hexdigest()[:12]
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in pictures.files[part]]
        content = hashlib.sha256(json.dumps([stats, pictures.prompts[part], pictures.images]).encode()).hexdigest()
        return self.folder / f"{extractor}-{key}" / pictures.name / f"{part.start:07d}.safetensors", content

    def make(self, pictures: PictureSet, extractor: str, net: Any, whole: bool, rank: int, world: int) -> Iterator[int]:
        """Computes this process's batches that are not kept yet; yields how many pictures each was."""
        from safetensors.torch import save_file

        for k, part in enumerate(self._parts(pictures)):
            if k % world != rank:
                continue
            file, content = self._file(pictures, extractor, net.about, part)
            if self._kept(file, content) is None:
                files, prompts = pictures.files[part], pictures.prompts[part]
                step = pictures.images if whole else len(files)
                rows = [
                    net([read_picture(f) for f in files[i : i + step]], prompts[i : i + step])
                    for i in range(0, len(files), step)
                ]
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{file.name}.{os.getpid()}")
                save_file({"rows": torch.cat(rows).contiguous()}, partial, metadata={"content": content})
                os.replace(partial, file)
            yield part.stop - part.start

    def _kept(self, file: Path, content: str) -> Tensor | None:
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as f:
                same = (f.metadata() or {}).get("content") == content
                return f.get_tensor("rows") if same else None
        except (OSError, SafetensorError):  # cut off by a crash
            return None

    def rows(self, pictures: PictureSet, extractor: str, about: dict[str, Any]) -> Tensor | None:
        """fp32 [N, D] of the whole set; None while other processes have not made theirs."""
        found = []
        if not all(file.is_file() for file in pictures.files):
            return None
        for part in self._parts(pictures):
            rows = self._kept(*self._file(pictures, extractor, about, part))
            if rows is None:
                return None
            found.append(rows)
        return torch.cat(found)
