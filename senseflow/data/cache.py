"""A cache that `python -m senseflow.prepare` made, read as the trainer's batches.

settings.json               everything that made it; written first
shards/images-00000.safetensors   mean.HxW, logvar.HxW, pixels.HxW, ...: [n, ...] per picture size
shards/prompts-00000.safetensors   embeds [n, L, D], pooled [n, P]: each distinct caption once
index.safetensors           of each sample its shard, size and row, and its captions' numbers
index.json                  counts and the sha256 of every file; written last: without it the cache is unfinished
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from senseflow.config import Config, Data, UserError
from senseflow.data.batches import Batch
from senseflow.data.files import read_range
from senseflow.data.loader import Loaded, Loader, Numbers, Task
from senseflow.data.order import Order
from senseflow.data.samples import BadSample, Skipped
from senseflow.data.stream import StreamData, check_without_images, to_pixels
from senseflow.models.adapter import Condition

FORMAT = 1
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64}
# data.* fields that decide which samples a cache holds. One left at its default in training is taken as the cache's.
CHOICES = ("crop", "buckets", "captions", "caption_min", "caption_max", "min_side", "max_aspect", "min_aesthetic",
           "max_nsfw")  # fmt: skip


def is_cache(path: str) -> bool:
    """Whether a path is a cache's folder, finished or not."""
    return bool(path) and (Path(path) / "settings.json").is_file()


def read_json(file: Path) -> dict[str, Any]:
    """One of a cache's own files. Raises UserError where it is spoiled."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy the cache again, or prepare another") from None


def read_index(file: Path) -> dict[str, np.ndarray]:
    """index.safetensors. Raises UserError where it is missing or spoiled."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy the cache again, or prepare another") from None


@lru_cache(maxsize=4096)
def header(path: str) -> tuple[int, dict[str, Any]]:
    """(where the data begins, name -> dtype, shape, data_offsets) of a safetensors file. Raises BadSample, ValueError,
    TypeError, KeyError, struct.error."""
    (length,) = struct.unpack("<Q", read_range(path, 0, 8))
    fields = {k: v for k, v in dict(json.loads(read_range(path, 8, 8 + length))).items() if k != "__metadata__"}
    for name, field in fields.items():
        first, last = field["data_offsets"]
        if last - first != prod(field["shape"]) * DTYPES[field["dtype"]].itemsize:
            raise ValueError(f"{name} is {field}")
    return 8 + length, fields


def read_row(path: str, name: str, row: int) -> Tensor:
    """Row `row` of a tensor in a safetensors file: plain reads, as a mapped file that vanishes would kill the process.

    Raises BadSample.
    """
    try:
        start, fields = header(path)
        dtype, (rows, *shape) = DTYPES[fields[name]["dtype"]], fields[name]["shape"]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise BadSample("corrupt shard", f"{path}: {error!r}") from None
    if row >= rows:
        raise BadSample("corrupt shard", f"{path}: {name} has {rows} rows, not {row + 1}")
    size = prod(shape) * dtype.itemsize
    first = start + fields[name]["data_offsets"][0] + row * size
    raw = bytearray(read_range(path, first, first + size))
    if len(raw) < size:
        raise BadSample("corrupt shard", f"{path} is cut off")
    return torch.frombuffer(raw, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


class CacheReader:
    """Samples of a finished cache."""

    batched = False

    def __init__(self, folder: Path):
        self.shards = folder / "shards"
        self.record = read_json(folder / "index.json")
        if self.record["format"] != FORMAT:
            raise UserError(
                f"cache {folder} has format {self.record['format']}, allowed is {FORMAT}: prepare another cache"
            )
        index = read_index(folder / "index.safetensors")
        self.shard, self.size, self.row = (index[k] for k in ("shard", "size", "row"))
        self.first, self.prompts = index["first"], index["prompts"]  # captions of item i: first[i] to first[i + 1]
        self.sizes = [tuple(s) for s in self.record["sizes"]]
        self.names = self.record["tensors"]
        self.per_shard = self.record["prompts_per_shard"]

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, item: int) -> str:
        return f"images-{int(self.shard[item]):05d} {self.size[item]} {self.row[item]}"

    def load(self, task: Task) -> Loaded:
        """Every tensor of a sample, and its caption's embeds [L, D] and pooled [P]."""
        i = task.item
        out: Loaded = {}
        if self.names:
            h, w = self.sizes[self.size[i]]
            file = str(self.shards / f"images-{int(self.shard[i]):05d}.safetensors")
            out = {name: read_row(file, f"{name}.{h}x{w}", int(self.row[i])) for name in self.names}
        first, last = int(self.first[i]), int(self.first[i + 1])
        prompt = int(self.prompts[first + min(int(task.caption * (last - first)), last - first - 1)])
        return out | self.prompt(prompt)

    def prompt(self, number: int) -> Loaded:
        """embeds and pooled of one distinct caption."""
        shard, row = divmod(number, self.per_shard)
        file = str(self.shards / f"prompts-{shard:05d}.safetensors")
        return {name: read_row(file, name, row) for name in ("embeds", "pooled")}

    def finish(self, loaded: Sequence[Loaded | BadSample], tasks: Sequence[Task]) -> list[Loaded | BadSample]:
        raise NotImplementedError  # batched is False


class CacheData(StreamData):
    """Batches of a cache: nothing is encoded in the loop."""

    encodes_text = False

    def __init__(self, reader: CacheReader, loader: Loader, adapter: Any, skipped: Skipped, dtype: torch.dtype):
        record = reader.record  # with nothing skipped the order is that of the source itself, else another
        left_out = record["selected"] - record["samples"]
        fingerprint = record["fingerprint"] + (f"-{left_out}" if left_out else "")
        super().__init__(loader, adapter, skipped, fingerprint, bool(reader.names))
        self.reader, self.dtype, self.device = reader, dtype, loader.device

    def batch(self, iteration: int, size: int) -> Batch:
        """The batch of an iteration; its latents are still to be drawn where the cache holds the posterior."""
        share = self.share(iteration, size)
        t = share.tensors
        cond = Condition(t["embeds"].to(self.dtype), t["pooled"].to(self.dtype))
        count, device = len(share.samples), share.samples.device
        pixels = to_pixels(t["pixels"]) if "pixels" in t else torch.zeros(count, 3, 0, 0, device=device)
        batch = Batch(pixels, pixels, cond, share.samples, items=share.items)
        if "latents" in t or not self.has_images:
            zeros = torch.zeros(count, *self.adapter.latent_shape, device=device)
            batch.latents, batch.encoded = t["latents"].float() if "latents" in t else zeros, True
        elif "mean" in t:
            batch.mean = t["mean"].float()
            batch.logvar = t["logvar"].float() if "logvar" in t else None
        if taps := sorted((k for k in t if k.startswith("tap")), key=lambda k: int(k[3:])):
            batch.reference = [t[k].float() for k in taps]
        return batch

    def example(self) -> Condition:
        """The first prompt."""
        row = self.reader.prompt(0)
        cond = Condition(row["embeds"][None].to(self.dtype), row["pooled"][None].to(self.dtype))
        return cond.to(self.device)


def differing(settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError naming the first field of `wanted` in which a cache's settings differ."""
    for field, value in wanted.items():
        if field in settings and settings[field] != value:
            raise UserError(f"{field} is {settings[field]!r} in the cache and {value!r} here: prepare another cache")


def check_settings(settings: dict[str, Any], cfg: Config, made_by: dict[str, str]) -> None:
    """Raises UserError where a cache does not suit a run: another family, size, text length, dtype or weights; another
    choice of samples than one that the run names; real images asked for where there are none."""
    m = cfg.model
    wanted: dict[str, Any] = {f"model.{k}": getattr(m, k) for k in ("family", "side", "text_length", "dtype")}
    default = Data()
    for name in CHOICES:
        if getattr(cfg.data, name) != getattr(default, name):
            wanted[f"data.{name}"] = getattr(cfg.data, name)
    differing(settings, wanted | {f"weights.{k}": v for k, v in made_by.items()})
    if taps := settings["features"]:
        d = cfg.disc
        differing(taps, {"disc.backbone": d.backbone, "disc.taps": list(d.taps), "disc.size": d.size})
    if settings["images"] == "none":
        check_without_images(cfg)
    elif cfg.disc.kind == "vfm" and not settings["pixels"]:
        raise UserError("disc.kind = 'vfm': this cache holds no pixels; prepare it with --pixels, or set another kind")


def open_cache(
    cfg: Config, adapter: Any, draws: Numbers, device: torch.device, made_by: dict[str, str], rank: int = 0,
    world: int = 1,
) -> CacheData:  # fmt: skip
    """The batches of the cache cfg.data.path. made_by: hashes of the weights that would have to have made it.

    Raises UserError for an unfinished one, missing files, and settings that differ.
    """
    folder, data = Path(cfg.data.path), cfg.data
    check_settings(read_json(folder / "settings.json"), cfg, made_by)
    if not (folder / "index.json").is_file():
        raise UserError(f"cache {folder} is not finished: run the same senseflow.prepare again, it goes on")
    reader = CacheReader(folder)
    for name in reader.record["files"]:
        if not (folder / name).is_file():
            raise UserError(f"cache {folder} lacks {name}: copy it again")
    sizes: list[Any] = reader.sizes or [(cfg.model.side, cfg.model.side)]
    order = Order(len(reader), cfg.seed, sizes, reader.size.astype(np.int64) if len(sizes) > 1 else None)
    loader = Loader(
        reader, order, draws, device, data.workers, data.prefetch, rank=rank, world=world, timeout=data.timeout
    )
    dtype = getattr(torch, reader.record["text_dtype"])
    return CacheData(reader, loader, adapter, Skipped(data.path, len(reader)), dtype)


def setting_fields(cfg: Config) -> dict[str, Any]:
    """The settings of a run that decide what a cache holds, as "section.field" -> value."""
    out = {f"model.{k}": getattr(cfg.model, k) for k in ("family", "side", "text_length", "dtype")}
    columns = {"data.aesthetic": cfg.data.aesthetic, "data.nsfw": cfg.data.nsfw}
    return out | {f"data.{k}": getattr(cfg.data, k) for k in CHOICES} | columns
