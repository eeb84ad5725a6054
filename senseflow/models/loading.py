"""Parts of a diffusers pipeline folder, or of a hub id, loaded with errors that say what to do."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch

from senseflow.config import UserError

GATED = "accept its licence on its hub page and set HF_TOKEN, or give a local folder"
# What a hub download leaves out: other frameworks' files, and variants, which double its size.
UNWANTED = (
    "*.bin",
    "*.pt",
    "*.ckpt",
    "*.msgpack",
    "*.h5",
    "*onnx*",
    "*openvino*",
    "*.fp16[.-]*",  # of one file, and of a shard
    "*.bf16[.-]*",
    "*.non_ema[.-]*",
)
# One of these holds what a tokenizer knows. transformers makes an empty one of a folder without, and says nothing.
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(": ") if lines else type(error).__name__


def _load_error(error: BaseException) -> str:
    """diffusers' words for a tensor that does not fit, made short; of another error the first line."""
    shape = r"(?:torch\.Size)?\(?(\[[\d, ]*\])\)?"
    found = re.search(rf"(\S+) expected shape {shape}, but got {shape}", str(error))
    if found:
        return f"{found[1]} has shape {found[3]} in its weights, {found[2]} by its config.json"
    return first_line(error)


def is_local(source: str | Path) -> bool:
    """Whether `source` is meant as a folder: it exists, or does not look like `owner/name`."""
    text = str(source)
    return Path(source).exists() or text.count("/") != 1 or text.startswith((".", "/", "~"))


def _stem(subfolder: str) -> str:
    return "model" if subfolder.startswith("text_encoder") else "diffusion_pytorch_model"


def _weights(part: Path, stem: str, variant: str) -> list[str]:
    """The safetensors files of a part: those that its index lists, or the one."""
    middle = f".{variant}" if variant else ""
    for index in (part / f"{stem}.safetensors.index{middle}.json", part / f"{stem}{middle}.safetensors.index.json"):
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise UserError(f"{index} is truncated or corrupt ({first_line(error)}): copy it again") from None
    return [f"{stem}{middle}.safetensors"]


def variant_of(part: Path, dtype: torch.dtype | None = None) -> str:
    """'' where a part has its plain weights, or none at all; else the variant to read instead: the one in `dtype` if
    there are several. A warning says so."""
    stem = _stem(part.name)
    if (part / f"{stem}.safetensors").is_file() or (part / f"{stem}.safetensors.index.json").is_file():
        return ""
    there = [v for v in ("bf16", "fp16") if any((part / name).is_file() for name in _weights(part, stem, v))]
    if not there:
        return ""
    own = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype or torch.float32, "")
    variant = own if own in there else there[0]
    warnings.warn(f"{part} has no plain weights: its variant {variant} is read", stacklevel=3)
    return variant


def check_local(folder: Path, subfolder: str, variant: str = "") -> None:
    """Raises UserError for the first thing a local pipeline folder lacks: the folder, the subfolder, its config.json,
    its weights (each shard that an index lists), or the end of a safetensors file."""
    part = folder / subfolder
    if not folder.is_dir():
        raise UserError(f"teacher folder {folder} does not exist: give a diffusers folder")
    if not (part / "config.json").is_file():
        raise UserError(f"teacher folder {folder} lacks {subfolder}/config.json")
    for name in _weights(part, _stem(subfolder), variant):
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


def read_config(file: Path) -> dict[str, Any]:
    """A component's or pipeline's JSON. Raises UserError where it is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON file ({first_line(error)}): copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object: copy it again")
    return found


def dtype_argument() -> str:
    """What this diffusers calls from_pretrained's dtype: `torch_dtype` was renamed in 0.42."""
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def quiet() -> None:
    """No bars of diffusers' and transformers' own while files load: they are noise beside ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def local_folder(source: str | Path, parts: Sequence[str]) -> Path:
    """`source` itself, or the folder where a hub id's files lie: its cached snapshot if that has `parts` (subfolders
    or files), else after a download of them. Raises UserError without network, licence or such a repository."""
    if is_local(source):
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(source), local_files_only=True))
        if all(_is_whole(folder, part) for part in parts):
            return folder
    except (OSError, ValueError):  # not cached, or no possible name: the next call says which
        pass
    return _download(str(source), parts)


def _is_whole(folder: Path, part: str) -> bool:
    if not (folder / part / "config.json").is_file():  # a tokenizer, a scheduler, a file
        return (folder / part).exists()
    try:
        check_local(folder, part)
    except UserError:
        return False
    return True


def _download(source: str, parts: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = [p for part in parts for p in (part, f"{part}/*")]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=list(UNWANTED)))
    except GatedRepoError:
        raise UserError(f"{source} needs a licence: {GATED}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{source} is neither a local folder nor a hub id that this HF_TOKEN may read: give a local folder"
        ) from None
    except (OSError, ValueError) as error:
        why = first_line(error)
        raise UserError(f"{source} is not cached here and the hub gives nothing ({why}): give a local folder") from None


def load_component(
    cls: Any, source: str | Path, subfolder: str, dtype: torch.dtype, device: str | torch.device = "cpu",
    variant: str = "", check_finite: bool = True,
) -> Any:  # fmt: skip
    """The network of class `cls` in `source`/`subfolder`, frozen, in eval mode, straight in `dtype` and on `device`:
    tensor by tensor, so that never more than one copy of it is in memory.

    source: a local diffusers folder, or a hub id (its local cache first, then the network). variant: "fp16", "bf16";
    "" is the plain weights, or where there are none the variant that is there.
    On the device "meta" from its config.json alone. Raises UserError for what is missing, cut off, of another class or
    shape, left over, gated, or not finite.
    """
    folder = local_folder(source, [subfolder])
    if torch.device(device).type == "meta":
        return _shapes_alone(cls, folder, subfolder, dtype)
    variant = variant or variant_of(folder / subfolder, dtype)
    check_local(folder, subfolder, variant)
    found = read_config(folder / subfolder / "config.json").get("_class_name", cls.__name__)
    if found != cls.__name__:
        raise UserError(f"{folder / subfolder} holds a {found}, expected {cls.__name__}")
    kwargs: dict[str, Any] = {dtype_argument(): dtype, "variant": variant or None, "output_loading_info": True}
    if subfolder.startswith("text_encoder"):
        kwargs["ignore_mismatched_sizes"] = True  # or transformers says that there are some, and not which
    else:
        kwargs["low_cpu_mem_usage"] = has_accelerate()  # without accelerate: a plain construction first
    if torch.device(device).type != "cpu" and has_accelerate():
        kwargs["device_map"] = {"": torch.device(device)}
    quiet()
    try:
        net, info = cls.from_pretrained(folder, subfolder=subfolder, local_files_only=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: {subfolder} does not load: {_load_error(error)}") from None
    _check_complete(info, f"{source}: {subfolder}")
    if check_finite:
        for name, t in net.state_dict().items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise UserError(f"{source}: {subfolder} has a NaN or an infinity in {name}")
    return net.to(device).eval().requires_grad_(False)


def _check_complete(info: dict[str, Any], where: str) -> None:
    """Raises UserError for tensors that from_pretrained missed, had left, or (transformers alone) saw misshapen."""
    for name, weights, config in sorted(info.get("mismatched_keys", ())):  # a set
        raise UserError(f"{where} does not load: {name} has shape {[*weights]} in its weights, {[*config]} by its "
                        "config.json")  # fmt: skip
    for problem in ("missing", "unexpected"):
        # old CLIP files hold a buffer that is now made
        if names := sorted(n for n in info[f"{problem}_keys"] if not n.endswith("position_ids")):
            raise UserError(
                f"{where} has {len(names)} {problem} tensors, first {names[0]}: its config.json and its weights do not "
                "belong together"
            )


def _shapes_alone(cls: Any, folder: Path, subfolder: str, dtype: torch.dtype) -> Any:
    """What `load_component` gives, on the meta device: from the config.json alone, without weights."""
    file = folder / subfolder / "config.json"
    if not file.is_file():
        raise UserError(f"teacher folder {folder} lacks {subfolder}/config.json")
    with torch.device("meta"):
        net = cls.from_config(read_config(file))
    net = net.float() if dtype == torch.float32 else net.bfloat16()
    return net.eval().requires_grad_(False)


def has_accelerate() -> bool:
    from importlib.util import find_spec

    return find_spec("accelerate") is not None


def components(source: str | Path) -> dict[str, Any]:
    """Name -> [library, class] of a pipeline's parts, from its model_index.json. Raises UserError without one."""
    folder = local_folder(source, ["model_index.json"])
    if not (folder / "model_index.json").is_file():
        raise UserError(f"teacher folder {folder} lacks model_index.json: give a diffusers pipeline folder")
    index = read_config(folder / "model_index.json")
    return {k: v for k, v in index.items() if isinstance(v, list) and v and v[0] is not None}


def check_tokenizer(folder: Path, part: str) -> None:
    """Raises UserError where a tokenizer's folder, or its vocabulary, is not there."""
    if not any((folder / part / name).is_file() for name in VOCABULARIES):
        raise UserError(f"teacher folder {folder} lacks {part}/{VOCABULARIES[0]} (or {', '.join(VOCABULARIES[1:])})")


def text_class(cls: Any, part: str, found: str) -> Any:
    """The transformers class of a pipeline's text encoder, `found` by its model_index.json. Raises UserError where the
    pipeline `cls` expects another."""
    import transformers

    expected = get_type_hints(cls.__init__).get(part)
    if isinstance(expected, type) and expected.__name__ != found:
        raise UserError(f"{part} is a {found} by model_index.json, expected {expected.__name__}")
    if not hasattr(transformers, found):
        raise UserError(f"{part} is a {found}, which this transformers {transformers.__version__} has not")
    return getattr(transformers, found)


def load_pipeline_shell(cls: Any, source: str | Path, dtype: torch.dtype, without: tuple[str, ...]) -> Any:
    """A diffusers pipeline of `cls` with the components `without` left out (None): its tokenizers and encoders, on the
    CPU, the encoders through `load_component`.

    Raises UserError when a part is missing, is of another class, or does not load.
    """
    named = {name: kind for name, kind in components(source).items() if name not in without}
    optional = getattr(cls, "_optional_components", ())
    for part in get_type_hints(cls.__init__):
        if part.startswith(("text_encoder", "tokenizer")) and part not in named and part not in optional:
            raise UserError(f"{source}: model_index.json names no {part}, which {cls.__name__} needs")
    quiet()
    folder = local_folder(source, ["model_index.json", *named])
    kwargs: dict[str, Any] = {dtype_argument(): dtype, **dict.fromkeys(without)}
    for part, (_, name) in named.items():
        if part.startswith("tokenizer"):
            check_tokenizer(folder, part)
        if part.startswith("text_encoder"):
            kwargs[part] = load_component(text_class(cls, part, name), folder, part, dtype)
    try:
        return cls.from_pretrained(folder, local_files_only=True, **kwargs)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{source}: {cls.__name__} does not load: {first_line(error)}") from None


def network_class(folder: Path) -> Any:
    """The diffusers class that a component folder's config.json names. Raises UserError where there is none."""
    import diffusers

    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} lacks config.json")
    name = read_config(file).get("_class_name", "")
    if not hasattr(diffusers, name or " "):
        raise UserError(f"{file} names the class {name!r}, which this diffusers {diffusers.__version__} has not")
    return getattr(diffusers, name)
