"""The same pictures from NVIDIA DALI: nvJPEG on a GPU ("mixed" decoding), its CPU decoder and resize elsewhere.

DALI gets plain JPEGs that end where a JPEG ends: RGB or grey, 8 bits. All others (PNG, WebP, CMYK, alpha, cut off)
take the Pillow path, so that both decoders agree about colour and about what is unusable. What differs for JPEGs: DALI
resizes in floats and rounds once, Pillow rounds between its two passes; nvJPEG's inverse DCT is another one too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from senseflow.config import UserError
from senseflow.data.pil import PilDecoder, opened, oriented_size, window
from senseflow.data.samples import BadSample
from senseflow.data.threads import Threads

INSTALL = "pip install -e '.[dali]'"
Job = tuple[bytes, tuple[float, float]]  # a file, and the place of its window


def why_not() -> str:
    """Why DALI cannot be used here, empty where it can."""
    try:
        import nvidia.dali  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"DALI does not import ({error}): {INSTALL}"
    return ""


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height), upright, of a file that DALI gets; None for one that is Pillow's. Raises BadSample."""
    image = opened(data)
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or b"\xff\xd9" not in data[-64:]:
        return None
    return oriented_size(image)


class DaliDecoder:
    """Decodes whole batches. One pipeline, built for the largest batch so far; calls take turns.

    Raises UserError where DALI is not installed.
    """

    batched = True

    def __init__(self, threads: int = 4, device_id: int | None = None):
        """threads: DALI's own, and those that do what is Pillow's; device_id: the GPU, None: the CPU."""
        if reason := why_not():
            raise UserError(f"data.decoder = 'dali': {reason}")
        self.threads, self.device_id = max(threads, 1), device_id
        self.name = "dali" if device_id is None else "dali on a GPU"
        self.pil = PilDecoder()
        self.pool = Threads(self.threads, "senseflow-dali")
        self.lock = threading.Lock()
        self.pipe: Any = None
        self.capacity, self.said = 0, False

    def _build(self, batch: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]

        @pipeline_def(batch_size=batch, num_threads=self.threads, device_id=self.device_id, prefetch_queue_depth=1)
        def decoded():
            files = fn.external_source(name="files", device="cpu", dtype=types.UINT8, ndim=1)
            start, end, size = (
                fn.external_source(name=name, device="cpu", dtype=types.FLOAT, ndim=1)
                for name in ("start", "end", "size")
            )
            device = "cpu" if self.device_id is None else "mixed"
            pictures = fn.decoders.image(files, device=device, output_type=types.RGB)
            return fn.resize(
                pictures, size=size, roi_start=start, roi_end=end, interp_type=types.INTERP_LANCZOS3, antialias=True
            )

        pipe = decoded()
        pipe.build()
        return pipe

    def decode_batch(self, jobs: Sequence[Job], size: tuple[int, int]) -> list[np.ndarray | torch.Tensor | BadSample]:
        """Of each job its picture, uint8 [height, width, 3] (on the GPU where that decodes), or why there is none."""
        found: list[Any] = self.pool.map(lambda job: self._sorted_out(job, size), jobs)
        ours = [i for i, f in enumerate(found) if isinstance(f, tuple)]
        if ours:
            boxes = [window(found[i], size, jobs[i][1]) for i in ours]
            with self.lock:
                pictures = self._decoded([jobs[i] for i in ours], boxes, size)
            for i, picture in zip(ours, pictures, strict=True):
                found[i] = picture
        return found

    def _sorted_out(self, job: Job, size: tuple[int, int]) -> Any:
        """(width, height) of what is DALI's; else Pillow's picture, or why there is none."""
        try:
            return plain_jpeg(job[0]) or self.pil.decode(job[0], size, job[1])
        except BadSample as error:
            return error

    def _decoded(self, jobs: Sequence[Job], boxes: list[tuple[float, ...]], size: tuple[int, int]) -> list[Any]:
        """By DALI; halved where that fails, as one bad file fails them all, and the pipeline: so what becomes of a file
        does not depend on its neighbours. Of one alone Pillow says why, or decodes it."""
        try:
            return self._run([data for data, _ in jobs], boxes, size)
        except RuntimeError as error:
            self.pipe = None
            if len(jobs) > 1:
                half = len(jobs) // 2
                return self._decoded(jobs[:half], boxes[:half], size) + self._decoded(jobs[half:], boxes[half:], size)
            picture = self._by_pil(jobs[0], size)
            if not isinstance(picture, BadSample) and not self.said:
                self.said = True
                print(f"data: what DALI cannot decode, Pillow does ({str(error).strip().splitlines()[0]})", flush=True)
            return [picture]

    def _by_pil(self, job: Job, size: tuple[int, int]) -> np.ndarray | BadSample:
        try:
            return self.pil.decode(job[0], size, job[1])
        except BadSample as error:
            return error

    def _run(self, files: list[bytes], boxes: list[tuple[float, ...]], size: tuple[int, int]) -> list[Any]:
        if self.pipe is None or len(files) > self.capacity:
            self.capacity = max(len(files), self.capacity)
            self.pipe = self._build(self.capacity)
        pipe = self.pipe
        pipe.feed_input("files", [np.frombuffer(f, np.uint8) for f in files])
        pipe.feed_input("start", [np.array([top, left], np.float32) for left, top, _, _ in boxes])
        pipe.feed_input("end", [np.array([bottom, right], np.float32) for _, _, right, bottom in boxes])
        pipe.feed_input("size", [np.array(size, np.float32)] * len(boxes))
        (out,) = pipe.run()
        if self.device_id is None:
            return [np.array(out.at(i)) for i in range(len(files))]  # copied: the pipeline writes there again
        pictures = [torch.from_dlpack(out[i]).clone() for i in range(len(files))]
        torch.cuda.current_stream(self.device_id).synchronize()  # this thread waits, not the loop's
        return pictures


def make_decoder(kind: str, threads: int, device: torch.device) -> Any:
    """data.decoder's choice; auto says once which one runs and why. Raises UserError."""
    on_gpu = device.type == "cuda"
    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    if kind == "dali":
        return DaliDecoder(threads, index)
    if kind == "auto" and on_gpu:
        reason = why_not()
        if not reason:
            print("data: pictures are decoded by DALI on the GPU", flush=True)
            return DaliDecoder(threads or os.cpu_count() or 1, index)
        print(f"data: pictures are decoded by Pillow: {reason}", flush=True)
    return PilDecoder()
