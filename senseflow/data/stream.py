"""A source of image-text pairs as the trainer's batches, by position like `batches.EmbeddedData`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from senseflow.config import Config, Data, UserError
from senseflow.data.batches import Batch
from senseflow.data.dali import make_decoder
from senseflow.data.filters import Selection, kept_captions, select
from senseflow.data.loader import Loaded, Loader, Numbers, Share, Task, as_tensor
from senseflow.data.order import Order, bucket_sizes, nearest_bucket
from senseflow.data.samples import BadSample, Skipped, Source
from senseflow.data.sources import open_source
from senseflow.models.adapter import Condition


def columns_of(data: Data) -> tuple[str, ...]:
    """data.captions as names."""
    return tuple(name.strip() for name in data.captions.split(",") if name.strip())


def chosen(captions: Sequence[str], data: Data, u: float) -> tuple[int, str]:
    """(which, the caption): one of those of allowed length, by u in [0, 1). Raises BadSample where there is none."""
    kept = kept_captions(captions, data)
    if not kept:
        raise BadSample("no caption", "none has an allowed length")
    index = min(int(u * len(kept)), len(kept) - 1)
    return index, kept[index]


class PictureReader:
    """Pictures and one caption each, of the items `keep` of a source; captions alone from a list of prompts."""

    def __init__(self, source: Source, keep: np.ndarray, data: Data, decoder: Any):
        self.source, self.keep, self.data, self.decoder = source, keep, data, decoder
        self.batched = source.has_images and decoder.batched

    def key(self, item: int) -> str:
        return self.source.key(int(self.keep[item]))

    def load(self, task: Task) -> Loaded:
        """pixels uint8 [H, W, 3] and text; with a batched decoder the file instead of the pixels."""
        record = self.source.read(int(self.keep[task.item]))
        _, text = chosen(record.captions, self.data, task.caption)
        if record.image is None:
            return {"text": text}
        if self.batched:
            return {"file": record.image, "text": text}
        return {"pixels": as_tensor(self.decoder.decode(record.image, task.size, task.place)), "text": text}

    def finish(self, loaded: Sequence[Loaded | BadSample], tasks: Sequence[Task]) -> list[Loaded | BadSample]:
        """Decodes the files of one batch."""
        out = list(loaded)
        there = [i for i, row in enumerate(loaded) if not isinstance(row, BadSample)]
        jobs = [(loaded[i]["file"], tasks[i].place) for i in there]  # type: ignore[index]
        for i, picture in zip(there, self.decoder.decode_batch(jobs, tasks[0].size), strict=True):
            if isinstance(picture, BadSample):
                out[i] = picture
            else:
                out[i] = {"pixels": as_tensor(picture), "text": loaded[i]["text"]}  # type: ignore[index]
        return out


def to_pixels(uint8: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1]."""
    return uint8.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


class StreamData:
    """Batches of a source; what is unusable is replaced, listed and limited (`samples.Skipped`)."""

    encodes_text = True  # batch by batch: the text encoders stay

    def __init__(self, loader: Loader, adapter: Any, skipped: Skipped, fingerprint: str, has_images: bool):
        self.loader, self.adapter, self.skipped = loader, adapter, skipped
        self.fingerprint, self.has_images = fingerprint, has_images

    def __len__(self) -> int:
        return self.loader.order.count

    def begin(self, out: Path, first: int) -> None:
        """Lists what is not used in out/skipped.jsonl, from iteration `first` on (0: anew); ranks each their own."""
        rank = self.loader.rank
        name = f"skipped-rank{rank}.jsonl" if rank else "skipped.jsonl"
        self.skipped.begin(out / name, first == 0)

    def share(self, iteration: int, size: int) -> Share:
        """This rank's rows of the batch; raises UserError where too much is unusable."""
        found = self.loader.batch(iteration, size)
        self.skipped.add(found.skips, (iteration + 1) * size // self.loader.world)
        return found

    def batch(self, iteration: int, size: int) -> Batch:
        """The batch of an iteration; its samples carry the indices iteration * size + 0 ... size - 1."""
        share = self.share(iteration, size)
        cond = self.adapter.encode_prompts(share.texts["text"])
        if self.has_images:
            pixels = to_pixels(share.tensors["pixels"])
            return Batch(pixels, pixels, cond, share.samples, items=share.items)
        device, count = share.samples.device, len(share.samples)
        latents = torch.zeros(count, *self.adapter.latent_shape, device=device)
        nothing = torch.zeros(count, 3, 0, 0, device=device)
        return Batch(latents, nothing, cond, share.samples, encoded=True, items=share.items)

    def example(self) -> Condition:
        """Any one prompt."""
        return self.adapter.encode_prompts([""])

    def close(self) -> None:
        self.loader.close()


@dataclass(frozen=True)
class Items:
    """The wanted items of a source; sizes (height, width) in pixels, and of each item which (None: the first)."""

    source: Source
    selection: Selection
    sizes: list[tuple[int, int]]
    buckets: np.ndarray | None
    fingerprint: str


def choose(cfg: Config, quiet: bool = False) -> Items:
    """What cfg.data wants of cfg.data.path, said in one line. Raises UserError."""
    data, side = cfg.data, cfg.model.side
    source = open_source(data.path, columns_of(data))
    selection = select(source, data, max(data.workers, 1))
    if not quiet:
        print(selection.describe(len(source)), flush=True)
    sizes, buckets = [(side, side)], None
    if data.buckets and selection.width is not None and selection.height is not None:
        sizes = bucket_sizes(side)
        buckets = nearest_bucket(selection.width, selection.height, sizes)
    fingerprint = hashlib.sha256(source.fingerprint.encode() + selection.keep.tobytes()).hexdigest()
    return Items(source, selection, sizes, buckets, fingerprint)


def open_stream(
    cfg: Config, adapter: Any, draws: Numbers, device: torch.device, rank: int = 0, world: int = 1
) -> StreamData:
    """The batches of cfg.data.path, a source of pictures or of prompts.

    Raises UserError for a source that is not there or is unusable, and for prompts without images where the settings
    need images.
    """
    data = cfg.data
    items = choose(cfg, quiet=rank > 0)
    source, selection = items.source, items.selection
    if not source.has_images:
        check_without_images(cfg)
    decoder = make_decoder(data.decoder, data.workers, device) if source.has_images else None
    order = Order(len(selection.keep), cfg.seed, items.sizes, items.buckets)
    reader = PictureReader(source, selection.keep, data, decoder)
    loader = Loader(
        reader, order, draws, device, data.workers, data.prefetch, data.crop == "random", rank, world, data.timeout
    )
    skipped = Skipped(data.path, len(source) + sum(s.samples for s in source.dropped), source.dropped)
    return StreamData(loader, adapter, skipped, items.fingerprint, source.has_images)


def check_without_images(cfg: Config) -> None:
    """Raises UserError for settings that need real images."""
    wrong = []
    if cfg.rollout.backward_prob < 1:
        wrong.append("--rollout.backward_prob 1")
    if cfg.disc.kind != "none":
        wrong.append("--disc.kind none")
    if cfg.isg.midpoint == "adaptive":
        wrong.append("--isg.midpoint uniform")
    if wrong:
        raise UserError(
            f"data.path = {cfg.data.path!r} has no images: add {' '.join(wrong)}, or make the teacher's own samples of "
            "these prompts with senseflow.prepare --teacher-samples"
        )
