"""Pictures from a student or a teacher: `python -m senseflow.sample --student runs/tiny --prompts "red apple"`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.algo.rollout import sample_euler, sample_renoise
from senseflow.cli import status_of
from senseflow.config import Config, UserError
from senseflow.data.cache import is_cache
from senseflow.data.emoji import default_names, to_float, to_uint8
from senseflow.data.samples import BadSample
from senseflow.data.sources import open_source
from senseflow.draws import Draws
from senseflow.flow import DiffusionSchedule
from senseflow.models.adapter import Adapter, Condition
from senseflow.models.families import DTYPES, make_adapter
from senseflow.models.loading import is_local, local_folder, read_config
from senseflow.presets import PRESETS
from senseflow.student import default_device, find_student, load_student

__all__ = ["load_student", "main", "picture_grid", "save_png", "student_samples", "teacher_samples"]

SAMPLERS = ("renoise", "euler")
SHEET = 64  # pictures on the sheet, at most
# The pipelines whose teachers can be sampled by themselves, and the preset with their published settings.
PRESET_OF = {"StableDiffusion3Pipeline": "sd35-large", "FluxPipeline": "flux-dev", "StableDiffusionXLPipeline": "sdxl",
             "Flux2KleinPipeline": "flux2-klein"}  # fmt: skip


def _batches(cond: Condition, samples: Tensor, batch: int):
    for start in range(0, len(samples), batch):
        index = torch.arange(start, min(start + batch, len(samples)), device=samples.device)
        yield cond.index(index), samples[index]


def _indices(cond: Condition, samples: Tensor | None) -> Tensor:
    device = cond.embeds.device
    return torch.arange(len(cond), device=device) if samples is None else samples.to(device)


@torch.no_grad()
def student_samples(
    adapter: Adapter, net: nn.Module, anchors: Sequence[float], cond: Condition,
    seed: int = 0, sampler: str = "renoise", batch: int = 64, samples: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pictures fp32 [N, 3, H, W] of N prompts, one network call per anchor, no guidance.

    `renoise` is how the student is trained: x0, then fresh noise at the next anchor. `euler` follows the velocity.
    The noise of picture i depends on (seed, i) alone; samples: their indices int64 [N], default 0 ... N - 1.
    """
    draws, shape = Draws(seed), adapter.latent_shape
    pictures = []
    for part, ids in _batches(cond, _indices(cond, samples), batch):
        noises = [draws.normal(0, ids, f"sample{k}", shape) for k in range(len(anchors))]
        if sampler == "renoise":
            x0 = sample_renoise(adapter, net, noises, list(anchors), part)
        else:
            x0 = sample_euler(adapter, net, noises[0], [*anchors, 0.0], part)
        pictures.append(adapter.decode(x0).float())
    return torch.cat(pictures)


def teacher_sigmas(schedule: Any, steps: int, shift: float) -> list[float]:
    """Descending sigmas of a teacher's sampler, the last one 0: u = 1, ..., 1 / steps, shifted; for SDXL's schedule,
    which has no shift, timesteps 1000 j / steps - 1."""
    if isinstance(schedule, DiffusionSchedule):
        u = torch.arange(steps, 0, -1, dtype=torch.float64) / steps - 1 / 1000
        return [*schedule.sigma(u).tolist(), 0.0]
    return dataclasses.replace(schedule, shift=shift).sigma(torch.linspace(1, 0, steps + 1).double()).tolist()


@torch.no_grad()
def teacher_samples(
    adapter: Any, net: nn.Module, steps: int, guidance: float, shift: float, cond: Condition,
    seed: int = 0, batch: int = 64, progress: Any = None, samples: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pictures fp32 [N, 3, H, W] of N prompts: `steps` Euler (DDIM) steps at the given shift; two calls each if guided,
    one where the network embeds its guidance. samples: as in student_samples."""
    draws = Draws(seed)
    sigmas = teacher_sigmas(adapter.schedule, steps, shift)
    pictures = []
    for part, ids in _batches(cond, _indices(cond, samples), batch):
        noise = draws.normal(0, ids, "sample0", adapter.latent_shape)
        uncond = adapter.uncond(len(ids)) if guidance != 1 else None
        embedded = bool(getattr(getattr(net, "config", None), "guidance_embeds", False))
        w = torch.full((len(ids),), guidance, device=ids.device) if uncond is not None or embedded else None
        x0 = sample_euler(adapter, net, noise, sigmas, part, w, uncond)
        pictures.append(adapter.decode(x0).float())
        if progress:
            progress(len(ids))
    return torch.cat(pictures)


def picture_grid(pictures: Tensor, columns: int, scale: int = 2, gap: int = 4) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> one uint8 picture [3, H', W'] of N / columns rows on light grey."""
    n, _, h, w = pictures.shape
    rows = -(-n // columns)
    cell_h, cell_w = h * scale + gap, w * scale + gap
    sheet = torch.full((3, rows * cell_h + gap, columns * cell_w + gap), 225, dtype=torch.uint8)
    big = to_uint8(pictures).repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu()
    for i in range(n):
        top, left = gap + (i // columns) * cell_h, gap + (i % columns) * cell_w
        sheet[:, top : top + h * scale, left : left + w * scale] = big[i]
    return sheet


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file: a folder that cannot be written, or a full disk, is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def save_png(picture: Tensor, path: Path, text: Mapping[str, Any] | None = None) -> None:
    """Writes a uint8 picture [3, H, W]; text: PNG text chunks. A reader never sees half a file."""
    from PIL import Image, PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, str(value))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(partial, format="PNG", pnginfo=chunks)
        os.replace(partial, path)


def read_png(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """From exactly one of the command line, a file with one prompt a line, a data set, and the embedded one; the first
    --limit of them."""
    given = [args.prompts is not None, args.prompts_file is not None, args.data is not None, args.embedded]
    if sum(given) != 1:
        raise UserError("prompts come from one of --prompts, --prompts-file, --data and --embedded")
    if args.limit < 0:
        raise UserError(f"--limit {args.limit}: allowed is 0 or more")
    return _all_prompts(args)[: args.limit or None]


def _all_prompts(args: argparse.Namespace) -> list[str]:
    if args.data is not None:
        return data_prompts(args.data, args.limit)
    if args.prompts_file is not None:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {args.prompts_file} cannot be read: {error}") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompts-file {args.prompts_file} holds no prompt: one a line")
        return prompts
    return default_names() if args.embedded else args.prompts


def data_prompts(path: str, limit: int) -> list[str]:
    """The first caption of each item of a data set, in its order, up to `limit` (0: all); what is unusable is left
    out, and said. Raises UserError for a path that senseflow.train would refuse, or one without captions."""
    if is_cache(path):
        raise UserError(f"--data {path} is a cache, which holds no captions: give what it was made of")
    source, prompts, bad = open_source(path), [], 0
    for item in range(len(source)):
        if len(prompts) == limit > 0:
            break
        try:
            prompts.append(source.read(item, 1).captions[0])  # of a picture its first byte
        except BadSample:
            bad += 1
    bad += len(source.dropped)
    if not prompts:
        raise UserError(f"--data {path} holds no caption that can be used")
    if bad:
        print(f"{path}: {bad} items without a usable caption left out", file=sys.stderr)
    return prompts


class Source:
    """What is sampled: a student, or a teacher by itself. about: what the metadata says of all pictures."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.student = find_student(args.student, args.weights) if args.student else None
        self.adapter: Any
        if self.student is not None:
            self._student_settings()
        else:
            self._teacher_settings()

    def _student_settings(self) -> None:
        args, student = self.args, self.student
        assert student is not None
        if wrong := [f"--{n}" for n in ("guidance", "shift", "side") if getattr(args, n) is not None]:
            raise UserError(f"{wrong[0]} is for --teacher alone: a student has its own")
        self.adapter = student.adapter(args.teacher, args.dtype, self.device)
        self.anchors = list(student.record["anchors"])
        if args.steps is not None and args.steps != len(self.anchors):
            self.anchors = teacher_sigmas(self.adapter.schedule, args.steps, student.model.shift)[:-1]
        self.about = dict(student=str(args.student), weights=args.weights or "as shipped", sampler=args.sampler,
                          steps=len(self.anchors), sigmas=[round(s, 6) for s in self.anchors])  # fmt: skip

    def _teacher_settings(self) -> None:
        args = self.args
        if not args.teacher:
            raise UserError("nothing to sample: give --student RUN or --teacher FOLDER_OR_HUB_ID (or embedded)")
        if args.sampler != "euler":
            raise UserError(f"--sampler {args.sampler}: a teacher knows euler alone")
        preset = teacher_preset(args.teacher)
        model = dataclasses.replace(preset.model, teacher=args.teacher, side=args.side or preset.model.side)
        if args.dtype:
            model = dataclasses.replace(model, dtype=args.dtype, decode=args.dtype)
        self.adapter, self.model = make_adapter(model, self.device), model
        self.guidance = preset.eval.teacher_guidance if args.guidance is None else args.guidance
        self.shift = preset.eval.teacher_shift if args.shift is None else args.shift
        self.steps = args.steps or preset.eval.teacher_steps
        self.about = dict(teacher=args.teacher, sampler="euler", steps=self.steps, guidance=self.guidance,
                          shift=self.shift)  # fmt: skip

    @property
    def calls(self) -> int:
        """Network calls of a picture: guidance is a second one, but where the network embeds it (FLUX.1)."""
        if self.student is not None:
            return len(self.anchors)
        return self.steps * (1 if self.guidance == 1 or self.model.family == "flux" else 2)

    def network(self) -> nn.Module:
        if self.student is not None:
            return self.student.network(self.adapter)
        return self.adapter.load_network(DTYPES[self.model.dtype])

    def pictures(self, net: nn.Module, cond: Condition, samples: Tensor) -> Tensor:
        """fp32 [N, 3, H, W] of prompts with these global indices, one batch."""
        seed, n = self.args.seed, len(samples)
        if self.student is not None:
            return student_samples(self.adapter, net, self.anchors, cond, seed, self.args.sampler, n, samples)
        return teacher_samples(self.adapter, net, self.steps, self.guidance, self.shift, cond, seed, n, samples=samples)


def teacher_preset(source: str) -> Config:
    """The preset of a teacher's family, found by the class its model_index.json names. Raises UserError for others."""
    if source == "embedded" or (is_local(source) and not (Path(source).expanduser() / "model_index.json").is_file()):
        return PRESETS["tiny"]()  # its folder has no pipeline; a missing or wrong one is named when it loads
    file = local_folder(source, ["model_index.json"]) / "model_index.json"
    name = read_config(file).get("_class_name", "")
    if name not in PRESET_OF:
        raise UserError(f"{source} is a {name}: allowed are {', '.join(PRESET_OF)}")
    return PRESETS[PRESET_OF[name]]()


def shares(count: int, batch: int, rank: int, world: int) -> Iterator[Tensor]:
    """Global indices int64 of this process's batches. Whole batches go round, so that each is made of the same
    pictures on any number of processes, and a sum inside the network is rounded the same."""
    for start in range(rank * batch, count, world * batch):
        yield torch.arange(start, min(start + batch, count))


def write_sheet(files: list[Path], out: Path) -> bool:
    """The first pictures on one sheet, once all files are there: whichever process ends last writes it whole."""
    if not all(file.is_file() for file in files):
        return False
    pictures = torch.stack([to_float(read_png(file)) for file in files[:SHEET]])
    save_png(picture_grid(pictures, min(8, len(pictures)), scale=1), out / "sheet.png")
    return True


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m senseflow.sample", description=__doc__)
    add = parser.add_argument
    add("--student", type=Path, help="run, its student folder, an exported folder, or a checkpoint step-...")
    add("--teacher", default="", help="folder, hub id or `embedded`: sampled itself, or with --student where its text "
        "encoders and VAE are, if not where they were in training")  # fmt: skip
    add("--weights", choices=("ema", "raw"), default="", help="of a run's newest checkpoint; default: as shipped")
    add("--prompts", nargs="+", help="one picture each")
    add("--prompts-file", type=Path, help="one prompt a line")
    add("--data", help="captions of a data set: whatever senseflow.train --data takes, but for a cache")
    add("--limit", type=int, default=0, help="the first so many prompts; 0: all")
    add("--embedded", action="store_true", help="the captions of the embedded data set")
    add("--images", type=int, default=1, help="pictures of each prompt")
    add("--steps", type=int, help="student: 1 to 8, default as trained; teacher: default its preset's")
    add("--sampler", choices=SAMPLERS, help="default: renoise for a student, euler for a teacher")
    add("--guidance", type=float, help="of a teacher; default: its preset's")
    add("--shift", type=float, help="of a teacher's steps; default: its preset's")
    add("--side", type=int, help="pixels, of a teacher; default: its preset's")
    add("--seed", type=int, default=0, help="picture i depends on (seed, i) alone")
    add("--batch", type=int, default=8, help="pictures at a time")
    add("--dtype", choices=tuple(DTYPES), default="", help="of the arithmetic; default: as trained")
    add("--out", type=Path, help="folder; default STUDENT/samples, or samples for a teacher")
    return parser


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """What the pictures are, a line each."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pictures(
    source: Source, prompts: list[str], files: list[Path], rows: list[dict[str, Any]], rank: int, world: int,
    resume: bool = False, enlarge: bool = True,
) -> Iterator[int]:  # fmt: skip
    """Writes this process's pictures, the row of each in its PNG; yields how many there are in each batch.

    resume: a batch whose files are all there is left as it is; the network is loaded where something is missing alone.
    enlarge: pictures under 128 pixels are written several times as large, to be seen.
    """
    args, adapter = source.args, source.adapter
    mine = list(shares(len(prompts), args.batch, rank, world))
    if resume:
        mine = [part for part in mine if not all(files[i].is_file() for i in part.tolist())]
    if not mine:
        return
    conds = [adapter.encode_prompts([prompts[i] for i in part.tolist()]).to("cpu") for part in mine]
    if args.guidance != 1 and source.student is None:
        adapter.uncond(1)  # needs the encoders, which make room for the network
    adapter.free_text()
    net = source.network()
    for part, cond in _shown(list(zip(mine, conds, strict=True)), rank):
        pictures = to_uint8(source.pictures(net, cond.to(adapter.device), part)).cpu()
        for i, picture in zip(part.tolist(), pictures, strict=True):
            scale = max(1, 128 // picture.shape[2]) if enlarge else 1  # a picture of 32 pixels is hard to see
            big = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            save_png(big, files[i], {k: v for k, v in rows[i].items() if k != "file"})
        yield len(part)


def run(args: argparse.Namespace) -> None:
    """Writes this process's share: a PNG a picture; the first process also samples.jsonl, the last one the sheet."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    most = 8 if args.student else 1000
    if args.steps is not None and not 1 <= args.steps <= most:
        raise UserError(f"--steps {args.steps} is out of range: allowed is 1 to {most}")
    for name in ("batch", "images"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: allowed is 1 or more")
    args.sampler = args.sampler or ("renoise" if args.student else "euler")
    prompts = [prompt for prompt in read_prompts(args) for _ in range(args.images)]
    if bad := next((p for p in prompts if any("\ud800" <= c <= "\udfff" for c in p)), None):
        raise UserError(f"prompt {bad!r} is no UTF-8: allowed is text")
    source = Source(args, default_device())
    out = args.out or (args.student if args.student else Path()) / "samples"
    words = ["".join(c if c.isalnum() else "-" for c in prompt)[:50] for prompt in prompts]
    files = [out / f"{i:0{max(3, len(str(len(prompts) - 1)))}d}-{word}.png" for i, word in enumerate(words)]
    rows = [
        dict(file=file.name, index=i, prompt=prompt, seed=args.seed, **source.about)
        for i, (file, prompt) in enumerate(zip(files, prompts, strict=True))
    ]
    for _ in make_pictures(source, prompts, files, rows, rank, world):
        pass
    if rank == 0:  # after them: bad input leaves nothing behind
        write_rows(out / "samples.jsonl", rows)
    if write_sheet(files, out):
        where = f", the first {SHEET} of them" if len(files) > SHEET else ", all of them"
        print(f"{len(files)} pictures in {out}{where} on {out / 'sheet.png'}; what they are: {out / 'samples.jsonl'}")


def _shown(parts: list, rank: int) -> Iterator:
    """The parts, with a bar on the first process's terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(parts, "sampling", console=console, disable=rank > 0 or not console.is_terminal)


def main(argv: list[str] | None = None) -> int:
    """Command line: pictures, samples.jsonl and a sheet. Bad input is one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    return status_of("sample", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
