"""What a cache is made of: samples read, encoded and put together to a shard's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from senseflow.algo.rollout import sample_euler
from senseflow.config import Config
from senseflow.data.dali import make_decoder
from senseflow.data.filters import kept_captions
from senseflow.data.loader import as_tensor
from senseflow.data.samples import BadSample
from senseflow.data.stream import Items, to_pixels
from senseflow.data.threads import Threads, result
from senseflow.draws import Draws
from senseflow.models import vae as autoencoder
from senseflow.models.families import compute, make_adapter
from senseflow.models.vfm import find_dinov2
from senseflow.sample import teacher_sigmas

SEED = 4  # of the teacher's own samples
LATENT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What prepare has besides a run's settings; the second of a pair is the help text."""

    out: str = ""
    latents: str = "posterior"
    latents_dtype: str = "auto"
    pixels: int = -1
    shard: int = 256
    batch: int = 4
    processes: int = 0
    features: bool = False
    teacher_samples: int = 0
    verify: bool = False


class Maker:
    """Makes the tensors of shards. Networks are loaded when they are needed first."""

    def __init__(self, cfg: Config, options: Options, items: Items, device: torch.device):
        self.cfg, self.options, self.items, self.device = cfg, options, items, device
        self.adapter = make_adapter(cfg.model, device)
        self.images = items.source.has_images
        self.decoder: Any = make_decoder(cfg.data.decoder, cfg.data.workers, device) if self.images else None
        self.pool = Threads(max(cfg.data.workers, 1), "senseflow-data")
        self.dtype = LATENT_DTYPES[options.latents_dtype]
        self.draws, self._prompt_bytes = Draws(SEED), 0
        self.vfm: Any = find_dinov2(cfg.disc.backbone).to(device) if options.features else None
        self.teacher = self.adapter.load_network(compute(cfg.model, device)) if options.teacher_samples else None

    def close(self) -> None:
        """Ends the threads."""
        self.pool.close()

    def shard(self, number: int) -> range:
        """Positions in the selection."""
        size = self.options.shard
        return range(number * size, min((number + 1) * size, len(self.items.selection.keep)))

    def _size(self, position: int) -> tuple[int, int]:
        return self.items.sizes[0 if self.items.buckets is None else int(self.items.buckets[position])]

    def _read(self, position: int) -> Any:
        """(captions, uint8 [H, W, 3], the file where the decoder takes batches, or None), or BadSample."""
        try:
            record = self.items.source.read(int(self.items.selection.keep[position]))
            captions = kept_captions(record.captions, self.cfg.data)
            if not captions:
                raise BadSample("no caption", "none has an allowed length")
            if record.image is None:
                return captions, None
            if self.decoder.batched:
                return captions, record.image
            return captions, self.decoder.decode(record.image, self._size(position), (0.5, 0.5))
        except BadSample as error:
            return error

    def _samples(self, positions: list[int]) -> Iterator[tuple[int, Any]]:
        """(position, (captions, picture) or BadSample), read a few batches ahead."""
        step = self.options.batch * 4
        groups = [positions[i : i + step] for i in range(0, len(positions), step)]
        futures = [[self.pool.submit(self._read, p) for p in group] for group in groups[:2]]
        for number, group in enumerate(groups):
            found = [result(future, self.cfg.data.timeout, "sample") for future in futures[number]]
            if number + 2 < len(groups):
                futures.append([self.pool.submit(self._read, p) for p in groups[number + 2]])
            if self.images and self.decoder.batched:
                found = self._decoded(group, found)
            futures[number] = []
            yield from zip(group, found, strict=True)

    def _decoded(self, group: list[int], found: list[Any]) -> list[Any]:
        there = [i for i, f in enumerate(found) if not isinstance(f, BadSample)]
        for size in dict.fromkeys(self._size(group[i]) for i in there):
            same = [i for i in there if self._size(group[i]) == size]
            pictures = self.decoder.decode_batch([(found[i][1], (0.5, 0.5)) for i in same], size)
            for i, picture in zip(same, pictures, strict=True):
                found[i] = picture if isinstance(picture, BadSample) else (found[i][0], picture)
        return found

    def images_of(self, number: int, count: Callable[[int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, record) of an image shard. count(n) is called as samples are done.

        Pictures are encoded size by size, in the order of the samples and always in the same groups: so a shard is the
        same bytes whenever and by whichever process it is made.
        """
        rows, skips, tensors = [], [], {}
        positions = sorted(self.shard(number), key=self._size)
        for size in dict.fromkeys(map(self._size, positions)):
            kept: list[tuple[int, tuple[str, ...], Any]] = []
            done: list[dict[str, Tensor]] = []
            for position, found in self._samples([p for p in positions if self._size(p) == size]):
                if isinstance(found, BadSample):
                    key = self.items.source.key(int(self.items.selection.keep[position]))
                    skips.append([key, found.reason, found.detail, 1])
                else:
                    kept.append((position, found[0], found[1]))
                    if len(kept) % self.options.batch == 0:
                        done.append(self._encoded(kept[-self.options.batch :], size))
                        kept[-self.options.batch :] = [(p, c, None) for p, c, _ in kept[-self.options.batch :]]
                count(1)
            if rest := len(kept) % self.options.batch:
                done.append(self._encoded(kept[-rest:], size))
            name = f"{size[0]}x{size[1]}"
            tensors |= {f"{k}.{name}": torch.cat([d[k] for d in done]) for k in (done[0] if done else ())}
            rows += [(position, size, row, captions) for row, (position, captions, _) in enumerate(kept)]
        rows.sort(key=lambda row: row[0])
        record = dict(rows=[list(row[1:]) for row in rows], skipped=skips)
        return tensors, record | {"tensors": sorted({k.partition(".")[0] for k in tensors})}

    @torch.no_grad()
    def _encoded(self, group: list[tuple[int, tuple[str, ...], Any]], size: tuple[int, int]) -> dict[str, Tensor]:
        """What is kept of a few samples of one size, on the host."""
        if self.teacher is not None:
            return self._sampled(group)
        if not self.images:
            return {}
        uint8 = torch.stack([as_tensor(picture) for *_, picture in group]).to(self.device)
        pixels = to_pixels(uint8)
        out: dict[str, Tensor] = {}
        if self.adapter.vae is not None:
            mean, logvar = autoencoder.posterior(self.adapter.vae, pixels)
            out["mean"] = mean.to(self.dtype).cpu()
            if self.options.latents == "posterior":
                out["logvar"] = logvar.to(self.dtype).cpu()
        return out | self._looked_at(uint8, pixels)

    def _looked_at(self, uint8: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """What the discriminator needs: uint8 [b, h, w, 3], and the backbone's taps where asked for."""
        out = {}
        if self.options.pixels:
            out["pixels"] = shrunk(uint8.cpu(), self.options.pixels)
        if self.vfm is not None:
            d = self.cfg.disc
            taps = self.vfm.features(pixels, d.taps, d.size)
            out |= {f"tap{i}": tap.to(torch.bfloat16).cpu() for i, tap in enumerate(taps)}
        return out

    def _sampled(self, group: list[tuple[int, tuple[str, ...], Any]]) -> dict[str, Tensor]:
        """The teacher's own samples of the first caption of each; noise by the sample's position alone."""
        cfg, e = self.cfg, self.cfg.eval
        ids = torch.tensor([position for position, *_ in group], device=self.device)
        cond = self.adapter.encode_prompts([captions[0] for _, captions, _ in group])
        uncond = self.adapter.uncond(len(group))
        sigmas = teacher_sigmas(self.adapter.schedule, self.options.teacher_samples, e.teacher_shift)
        noise = self.draws.normal(0, ids, "teacher", self.adapter.latent_shape)
        w = torch.full((len(group),), cfg.eval.teacher_guidance, device=self.device)
        assert self.teacher is not None
        latents = sample_euler(self.adapter, self.teacher, noise, sigmas, cond, w, uncond)
        pixels = self.adapter.decode(latents).float().clamp(-1, 1)
        uint8 = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return {"latents": latents.to(self.dtype).cpu()} | self._looked_at(uint8, pixels)

    def prompt_bytes(self) -> int:
        """What a prompt takes in the cache. Loads the text encoders."""
        if not self._prompt_bytes:
            cond = self.adapter.encode_prompts([""])
            self._prompt_bytes = cond.embeds.nbytes + cond.pooled.nbytes
        return self._prompt_bytes

    @torch.no_grad()
    def prompts_of(self, captions: list[str], count: Callable[[int], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, record) of a prompt shard: embeds [n, L, D] at full length, pooled [n, P], in the
        encoder's dtype."""
        parts = []
        for i in range(0, len(captions), self.options.batch):
            cond = self.adapter.encode_prompts(captions[i : i + self.options.batch])
            parts.append((cond.embeds.cpu(), cond.pooled.cpu()))
            count(len(cond))
        embeds, pooled = (torch.cat(t) for t in zip(*parts, strict=True))
        return {"embeds": embeds, "pooled": pooled}, {"text_dtype": str(embeds.dtype).removeprefix("torch.")}


def shrunk(uint8: Tensor, side: int) -> Tensor:
    """uint8 [b, H, W, 3] with a short side of `side` pixels, Lanczos; as it is where it has no more than that."""
    from PIL import Image

    height, width = uint8.shape[1:3]
    if side < 0 or min(height, width) <= side:
        return uint8.contiguous()
    f = side / min(height, width)
    small = [Image.fromarray(p.numpy()).resize((round(width * f), round(height * f)), Image.Resampling.LANCZOS)
             for p in uint8]  # fmt: skip
    return torch.stack([as_tensor(np.asarray(picture)) for picture in small])


def space(maker: Maker) -> dict[str, int]:
    """Bytes a sample takes, by what they are; prompts come later."""
    o, m, d = maker.options, maker.cfg.model, maker.cfg.disc
    out: dict[str, int] = {}
    if maker.images and maker.adapter.vae is not None:
        out["latents"] = (
            math.prod(maker.adapter.latent_shape) * maker.dtype.itemsize * (2 if o.latents == "posterior" else 1)
        )
    elif maker.teacher is not None:
        out["latents"] = math.prod(maker.adapter.latent_shape) * maker.dtype.itemsize
    if o.pixels and (maker.images or maker.teacher is not None):
        out["pixels"] = 3 * (m.side if o.pixels < 0 else min(o.pixels, m.side)) ** 2
    if maker.vfm is not None:
        out["features"] = len(d.taps) * maker.vfm.dims[0] * (d.size // 14) ** 2 * 2
    return out
