"""Parts of a diffusers pipeline folder, or of a hub id, loaded with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from senseflow.config import UserError

GATED = "accept its licence on its hub page and set HF_TOKEN, or give a local folder"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_local(folder: Path, subfolder: str, variant: str = "") -> None:
    """Raises UserError for the first thing a local pipeline folder lacks: the folder, the subfolder, its config.json,
    its weights (each shard that an index lists), or the end of a safetensors file."""
    part = folder / subfolder
    if not folder.is_dir():
        raise UserError(f"teacher folder {folder} does not exist: give a diffusers folder")
    if not (part / "config.json").is_file():
        raise UserError(f"teacher folder {folder} lacks {subfolder}/config.json")
    middle = f".{variant}" if variant else ""
    stem = "model" if subfolder.startswith("text_encoder") else "diffusion_pytorch_model"
    for index in (part / f"{stem}.safetensors.index{middle}.json", part / f"{stem}{middle}.safetensors.index.json"):
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            break
    else:
        files = [f"{stem}{middle}.safetensors"]
    for name in files:
        if not (part / name).is_file():
            raise UserError(f"teacher folder {folder} lacks {subfolder}/{name}")
        check_safetensors(part / name)


def check_safetensors(file: Path) -> None:
    """Raises UserError where the file is cut off or not safetensors; reads its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as f:
            f.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt ({error}): copy it again") from None


def dtype_argument() -> str:
    """What this diffusers calls from_pretrained's dtype: `torch_dtype` was renamed in 0.42."""
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def is_local(source: str | Path) -> bool:
    """Whether `source` is meant as a folder: it exists, or does not look like `owner/name`."""
    text = str(source)
    return Path(source).exists() or text.count("/") != 1 or text.startswith((".", "/", "~"))


def load_component(
    cls: Any, source: str | Path, subfolder: str, dtype: torch.dtype, device: str | torch.device = "cpu",
    variant: str = "", check_finite: bool = True,
) -> Any:  # fmt: skip
    """The network of class `cls` in `source`/`subfolder`, frozen, in eval mode, straight in `dtype`.

    source: a local diffusers folder, or a hub id (its local cache first, then the network). variant: "fp16", "bf16".
    Raises UserError for what is missing, cut off, of another class or shape, gated, or not finite.
    """
    if is_local(source):
        check_local(Path(source), subfolder, variant)
        found = json.loads((Path(source) / subfolder / "config.json").read_text()).get("_class_name", cls.__name__)
        if found != cls.__name__:
            raise UserError(f"{Path(source) / subfolder} holds a {found}, expected {cls.__name__}")
    kwargs: dict[str, Any] = {"subfolder": subfolder, dtype_argument(): dtype, "variant": variant or None}
    if not subfolder.startswith("text_encoder"):
        kwargs["low_cpu_mem_usage"] = _has_accelerate()  # without accelerate: a plain construction first
    try:
        net = _offline_first(cls, source, kwargs)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if "gated" in str(error).lower() or "401" in str(error):
            raise UserError(f"{source} needs a licence: {GATED}") from None
        raise UserError(f"{source}: {subfolder} does not load: {first_line(error)}") from None
    if check_finite:
        for name, p in net.named_parameters():
            if not bool(torch.isfinite(p).all()):
                raise UserError(f"{source}: {subfolder} has a NaN or an infinity in {name}")
    return net.to(device).eval().requires_grad_(False)


def _offline_first(cls: Any, source: str | Path, kwargs: dict[str, Any]) -> Any:
    try:
        return cls.from_pretrained(source, local_files_only=True, **kwargs)
    except OSError:
        if is_local(source):
            raise
        return cls.from_pretrained(source, **kwargs)


def _has_accelerate() -> bool:
    from importlib.util import find_spec

    return find_spec("accelerate") is not None


def load_pipeline_shell(cls: Any, source: str | Path, dtype: torch.dtype, without: tuple[str, ...]) -> Any:
    """A diffusers pipeline of `cls` with the components `without` left out (None): its tokenizers and encoders.

    Raises UserError when a part is missing or does not load.
    """
    empty = dict.fromkeys(without)
    try:
        return cls.from_pretrained(source, local_files_only=is_local(source), **{dtype_argument(): dtype}, **empty)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: text encoders do not load: {first_line(error)}") from None


def network_class(folder: Path) -> Any:
    """The diffusers class that a component folder's config.json names. Raises UserError where there is none."""
    import diffusers

    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} lacks config.json")
    name = json.loads(file.read_text()).get("_class_name", "")
    if not hasattr(diffusers, name or " "):
        raise UserError(f"{file} names the class {name!r}, which this diffusers {diffusers.__version__} has not")
    return getattr(diffusers, name)
