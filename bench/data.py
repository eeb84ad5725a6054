"""Images a second from tars to uint8 batches of 512 and 1024 pixels: this trainer's loader beside what others use.

    python -m bench.data [--images 48] [--rounds 5] [--out FILE.json]

One set for all: JPEGs of 1.6 times the side wanted, quality 90, in webdataset tars on the local disk (in the page
cache), centre crop, Lanczos resize. All forms get the same number of threads or processes and run in turns, round by
round; a round is one pass over the set, workers already started. Forms:

    loader pil, loader dali   senseflow.data.loader: threads, sharded, resumable; DALI where it is installed
    dataloader pil            torch DataLoader processes over the same files, Pillow's decode and resize
    webdataset                WebDataset(...).decode("pilrgb") in DataLoader processes, then the same resize
    cache                     a cache of senseflow.prepare with uint8 pixels and SD-shaped latents, read back

With a GPU, `loader dali` decodes there ("mixed", nvJPEG). Errors are the mean absolute difference to `loader pil`.
On a machine with other work, read `vs_loader_pil` (the median over the rounds of the rate over `loader pil`'s of the
same round) and the processor's time an image, workers' processes included.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from bench.harness import device_slug, environment
from senseflow.config import Data
from senseflow.data.cache import read_row
from senseflow.data.dali import DaliDecoder, why_not
from senseflow.data.loader import Loader
from senseflow.data.order import Order
from senseflow.data.pil import PilDecoder, fitted
from senseflow.data.sources import open_source
from senseflow.data.stream import PictureReader
from senseflow.draws import Draws

BATCH, SHARDS, MIDDLE = 8, 4, (0.5, 0.5)
Pass = Callable[[], Iterator[Any]]  # one pass over the set: uint8 [B, H, W, 3] batches


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG with a photograph's spectrum (amplitude 1 / frequency), so bytes and decoding cost are near one's."""
    from PIL import Image

    r = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None, None], np.fft.rfftfreq(width)[None, :, None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height))
    phases = np.exp(2j * np.pi * r.random((height, width // 2 + 1, 3)))
    values = np.fft.irfft2(amplitude * phases, s=(height, width), axes=(0, 1))
    values = (values - values.mean()) / values.std() * 50 + 127
    out = io.BytesIO()
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_set(folder: Path, images: int, side: int) -> int:
    """Tars of `images` pictures of 1.6 x 1.2 times the side; returns the mean bytes of a file."""
    total = 0
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, images, SHARDS):
                data = photo(i, round(1.6 * side), round(1.2 * side))
                total += len(data)
                for ext, content in (("jpg", data), ("txt", b"a photo")):
                    info = tarfile.TarInfo(f"{i:06d}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return total // images


def our_loader(folder: Path, side: int, workers: int, decoder: Any) -> Pass:
    source = open_source(str(folder))
    reader = PictureReader(source, np.arange(len(source)), Data(), decoder)
    return passes(Loader(reader, Order(len(source), 0, [(side, side)]), Draws(0), torch.device("cpu"), workers, 2))


def passes(loader: Loader) -> Pass:
    """One pass after another; none begins with batches that were made during another form's turn."""
    count, state = loader.order.count // BATCH, {"next": 0}

    def run() -> Iterator[Any]:
        first = state["next"]
        state["next"] = loader.last = first + count
        for number in range(first, first + count):
            yield loader.batch(number, BATCH).tensors["pixels"]

    return run


class Pictures(torch.utils.data.Dataset):
    """The same samples for torch's DataLoader."""

    def __init__(self, folder: Path, side: int):
        self.source, self.side, self.decoder = open_source(str(folder)), side, PilDecoder()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = self.source.read(i).image
        assert image is not None
        return torch.from_numpy(self.decoder.decode(image, (self.side, self.side), MIDDLE).copy())


def torch_loader(folder: Path, side: int, workers: int) -> Pass:
    loader = torch.utils.data.DataLoader(
        Pictures(folder, side), BATCH, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return lambda: iter(loader)


class Fit:
    """A picture that webdataset decoded, resized as ours are; picklable."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, sample: Any) -> tuple[torch.Tensor]:
        return (torch.from_numpy(fitted(sample[0], (self.side, self.side), MIDDLE).copy()),)


def web_loader(folder: Path, side: int, workers: int) -> Pass:
    import webdataset

    wds: Any = webdataset
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=SHARDS).shuffle(64).decode("pil").to_tuple("jpg").map(Fit(side))
    loader = torch.utils.data.DataLoader(data.batched(BATCH), None, num_workers=workers, persistent_workers=True)
    return lambda: (pixels for (pixels,) in loader)


def cache_loader(folder: Path, side: int, workers: int, images: int) -> Pass:
    """Rows as a cache of SD 3.5 has them: pixels, mean and logvar fp16 [16, side/8, side/8], bf16 prompt embeddings."""
    from safetensors.torch import save_file

    latent, file = (images, 16, side // 8, side // 8), folder / "cache.safetensors"
    save_file({
        "pixels": torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8),
        "mean": torch.randn(latent).half(), "logvar": torch.randn(latent).half(),
        "embeds": torch.randn(images, 333, 4096).bfloat16(),
    }, file)  # fmt: skip

    class Rows:
        batched = False

        def key(self, item: int) -> str:
            return str(item)

        def load(self, task: Any) -> Any:
            return {name: read_row(str(file), name, task.item) for name in ("pixels", "mean", "logvar", "embeds")}

        finish = None

    reader: Any = Rows()
    return passes(Loader(reader, Order(images, 0, [(side, side)]), Draws(0), torch.device("cpu"), workers, 2))


def forms(folder: Path, side: int, workers: int, images: int, skipped: list[dict[str, str]]) -> dict[str, Pass]:
    found = {"loader pil": our_loader(folder, side, workers, PilDecoder())}
    if reason := why_not():
        skipped.append(dict(case=f"{side} px", form="loader dali", reason=reason))
    else:
        device = 0 if torch.cuda.is_available() else None
        found["loader dali"] = our_loader(folder, side, workers, DaliDecoder(workers, device))
    found["dataloader pil"] = torch_loader(folder, side, workers)
    try:
        found["webdataset"] = web_loader(folder, side, workers)
    except ImportError as error:
        skipped.append(dict(case=f"{side} px", form="webdataset", reason=str(error)))
    found["cache"] = cache_loader(folder, side, workers, images)
    return found


def processor_seconds() -> float:
    """Of this process and its children, so far. Linux alone: elsewhere children count nothing."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / tick  # utime, stime
    return total


def measure(folder: Path, side: int, options: Any, skipped: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A row a form: median and quartiles of images/s over the rounds."""
    size = write_set(folder, options.images, side)
    made = forms(folder, side, options.workers, options.images, skipped)
    rates: dict[str, list[float]] = {name: [] for name in made}
    processor: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(options.rounds + 1):  # the first starts workers and fills caches
        for name, run in made.items():
            before, cpu = time.perf_counter(), processor_seconds()
            shapes = [tuple(batch.shape) for batch in run()]
            seconds, count = time.perf_counter() - before, sum(shape[0] for shape in shapes)
            assert count == options.images and {shape[1:] for shape in shapes} == {(side, side, 3)}, (name, shapes)
            if turn:
                rates[name].append(count / seconds)
                processor[name].append((processor_seconds() - cpu) / count)
    dali = DaliDecoder(1) if not why_not() else None
    error = None
    if dali is not None:
        jobs = [(photo(i, round(1.6 * side), round(1.2 * side)), MIDDLE) for i in range(4)]
        pairs = zip(jobs, dali.decode_batch(jobs, (side, side)), strict=True)
        error = float(np.mean([
            np.abs(np.asarray(got, float) - PilDecoder().decode(data, (side, side), MIDDLE)).mean()
            for (data, _), got in pairs
        ]))  # fmt: skip
    rows = []
    for name, values in rates.items():
        low, _, high = quantiles(values, n=4)
        row: dict[str, Any] = dict(
            case=f"{side} px", form=name, images_per_s=median(values), quartiles=[low, high], rounds=len(values),
                   vs_loader_pil=median(a / b for a, b in zip(values, rates["loader pil"], strict=True)),
                   cpu_ms_per_image=1e3 * median(processor[name]),
                   workers=options.workers, images=options.images, file_bytes=size)  # fmt: skip
        if name == "loader dali":
            row["mean_error_of_255"] = error
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown of a result file: images/s, the median and the quartiles of the rounds; the processor's ms an image."""
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    head = [f"{case}: images/s | CPU ms each" for case in cases]
    lines = [f"| | {' | '.join(head)} |", "|---" * (1 + 2 * len(cases)) + "|"]
    for form in dict.fromkeys(row["form"] for row in result["rows"]):
        cells = []
        for case in cases:
            row = next((r for r in result["rows"] if (r["case"], r["form"]) == (case, form)), None)
            if row is None:
                cells += ["", ""]
                continue
            low, high = row["quartiles"]
            cells.append(f"{row['images_per_s']:.3g} ({low:.3g} to {high:.3g})")
            cells.append(f"{row['cpu_ms_per_image']:.3g}" if "cpu_ms_per_image" in row else "")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--images", type=int, default=48, help="a multiple of the batch of 8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sides", default="512,1024")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None, help="print the table of a result file, measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for side in map(int, options.sides.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SENSEFLOW_CACHE"] = folder  # the index of a set that is gone afterwards
            rows += measure(Path(folder), side, options, skipped)
        for row in rows[-5:]:
            print(f"{row['case']:>8}  {row['form']:<16} {row['images_per_s']:8.1f} images/s "
                  f"{row['vs_loader_pil']:6.2f}x {row['cpu_ms_per_image']:7.1f} ms CPU each", flush=True)  # fmt: skip
    given = {name: getattr(options, name) for name in ("images", "rounds", "workers", "sides")}
    env = environment() | {"command": "python -m bench.data", "arguments": given}
    out = options.out or Path(__file__).parent / "results" / f"data-{device_slug()}.json"
    out.write_text(json.dumps(dict(format=1, environment=env, rows=rows, skipped=skipped), indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
