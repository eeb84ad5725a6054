"""Where a metric's published weights are: a local path, a hub id, or a file at a known address."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senseflow.config import UserError
from senseflow.data.packages import file_digest
from senseflow.models.loading import first_line, is_local

INSTALL = "run: pip install -e '.[train,eval]'"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Default:
    """What is used where --weights names nothing. source: hub id or address; file: one file of the hub id's."""

    source: str
    file: str = ""


NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
DEFAULTS = {
    "inception": Default(f"{NVIDIA}/inception-2015-12-05.pt"),
    "clip": Default("laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
    "hpsv2": Default("xswu/HPSv2", "HPS_v2_compressed.pt"),
    "hpsv2.1": Default("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "pickscore": Default("yuvalkirstain/PickScore_v1"),
    "pickscore-processor": Default("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "imagereward": Default("THUDM/ImageReward", "ImageReward.pt"),
    "bert": Default("google-bert/bert-base-uncased"),
    "lpips": Default("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
}  # fmt: skip


def library(name: str) -> Any:
    """An optional package. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"package {name.partition('.')[0]} is not installed ({first_line(error)}): {INSTALL}") from None


def source_of(name: str, given: dict[str, str]) -> str:
    """The --weights value of a network, or its published place."""
    return given.get(name, DEFAULTS[name].source)


def offline() -> bool:
    """Whether the user forbids downloads, by the hub's own variable."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def find_file(name: str, given: dict[str, str], file: str = "") -> Path:
    """A file of weights: of the --weights path (itself, or `file` in that folder), the hub id's, or the address's,
    which is looked for in torch.hub's folder and then downloaded.

    Raises UserError, naming --weights, where it cannot be had.
    """
    source, default = source_of(name, given), DEFAULTS[name]
    file = file or default.file or Path(default.source).name
    hint = f"give --weights {name}=PATH"
    if source.startswith("https://"):
        return _address(name, source, hint)
    if not is_local(source):
        return hub_file(source, file, hint)
    path = Path(source).expanduser()
    path = path / file if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{name}: {path} does not exist: {hint}")
    return path


def hub_file(source: str, file: str, hint: str) -> Path:
    """One file of a hub id, from its cache or downloaded. Raises UserError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, file))
    except Exception as error:  # the hub's many kinds, and the network's
        raise UserError(f"{file} of {source} is not here ({type(error).__name__}): {hint}") from None


def _address(name: str, url: str, hint: str) -> Path:
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if path.is_file():
        return path
    if offline():
        raise UserError(f"{name}: {path.name} is not in {path.parent} and HF_HUB_OFFLINE is set: {hint} of {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:
        raise UserError(f"{name}: {url} gives nothing ({first_line(error)}): {hint}") from None
    return path


def find_folder(name: str, given: dict[str, str]) -> Path:
    """The folder of a model that transformers or open_clip reads. Raises UserError where it cannot be had."""
    source = source_of(name, given)
    hint = f"give --weights {name}=FOLDER"
    if is_local(source):
        path = Path(source).expanduser()
        if not path.is_dir():
            raise UserError(f"{name}: folder {path} does not exist: {hint}")
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except Exception as error:  # as above
        raise UserError(f"{name}: {source} is not here ({type(error).__name__}): {hint}") from None


def identity(path: Path) -> str:
    """sha256 of a weights file, or over those of a folder's weights files and JSON: what a cached feature belongs
    to."""
    import hashlib

    if path.is_file():
        return file_digest(path)
    files = sorted(p for p in path.iterdir() if p.suffix in (*WEIGHT_SUFFIXES, ".json"))
    if not any(p.suffix in WEIGHT_SUFFIXES for p in files):
        raise UserError(f"{path} holds no weights: allowed are files ending in {', '.join(WEIGHT_SUFFIXES)}")
    return hashlib.sha256("".join(f"{p.name} {file_digest(p)}\n" for p in files).encode()).hexdigest()
