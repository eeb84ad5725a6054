"""Batches made ahead by threads: read, decode, replace what cannot be used, copy to the device on a side stream.

What a batch holds depends on its number alone, never on how many threads there are or who is first. A fault in a
thread is raised where the batch is asked for, and a batch that does not come stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from senseflow.config import UserError
from senseflow.data.order import Order
from senseflow.data.samples import BadSample, Skip
from senseflow.data.threads import Threads, result

MAX_ATTEMPTS = 100  # replacements of one sample: at 5 % unusable, never reached


class Numbers(Protocol):
    """What is used of `draws.Draws`."""

    def uniform(self, iteration: int, samples: Tensor, stream: str, shape: tuple[int, ...] = ()) -> Tensor: ...


@dataclass(frozen=True)
class Task:
    """One sample to load: pixels (height, width), place of the crop in [0, 1]^2, caption: which one, in [0, 1)."""

    item: int
    size: tuple[int, int]
    place: tuple[float, float]
    caption: float


Loaded = dict[str, Any]  # name -> Tensor, or a str


class Reader(Protocol):
    """Makes samples of items; called from several threads."""

    batched: bool

    def load(self, task: Task) -> Loaded:
        """Raises BadSample."""
        ...

    def finish(self, loaded: Sequence[Loaded | BadSample], tasks: Sequence[Task]) -> list[Loaded | BadSample]:
        """With `batched`: what is done for many at once, after `load`."""
        ...

    def key(self, item: int) -> str: ...


@dataclass
class Share:
    """One rank's share of a batch. tensors: name -> [b, ...]; texts: name -> b strings; samples, items int64 [b];
    skips: what was replaced; event: of the side stream, after the copy to a GPU."""

    tensors: dict[str, Tensor]
    texts: dict[str, list[str]]
    samples: Tensor
    items: Tensor
    size: tuple[int, int]
    skips: list[Skip]
    event: Any = None


class Loader:
    """Batch after batch of `order`, this rank's share of each."""

    def __init__(
        self, reader: Reader, order: Order, draws: Numbers, device: torch.device, workers: int = 0, prefetch: int = 2,
        random_crop: bool = False, rank: int = 0, world: int = 1, timeout: float = 600.0,
    ):  # fmt: skip
        self.reader, self.order, self.draws, self.device = reader, order, draws, device
        self.random_crop, self.rank, self.world, self.timeout = random_crop, rank, world, timeout
        self.pool = Threads(workers, "senseflow-data") if workers else None
        self.makers = Threads(prefetch, "senseflow-batch") if workers else None
        self.prefetch = prefetch
        self.last: int | None = None  # no batch from this number on is made ahead
        self.ahead: dict[tuple[int, int], Future[Share]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batch(self, iteration: int, size: int) -> Share:
        """The share of an iteration's batch of `size` samples over all ranks: rows rank * size // world and on.

        Raises UserError when nothing came for `timeout` seconds, and what a thread raised.
        """
        if self.makers is None:
            return self.made(iteration, size)
        for key in [k for k in self.ahead if not (k[1] == size and iteration <= k[0] <= iteration + self.prefetch)]:
            self.ahead.pop(key).cancel()
        for number in range(iteration, iteration + self.prefetch + 1):
            wanted = number == iteration or self.last is None or number < self.last
            if wanted and (number, size) not in self.ahead:
                self.ahead[number, size] = self.makers.submit(self.made, number, size)
        out: Share = result(self.ahead.pop((iteration, size)), self.timeout, "batch")
        if out.event is not None:
            torch.cuda.current_stream(self.device).wait_event(out.event)
            for tensor in (*out.tensors.values(), out.samples):
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return out

    def close(self) -> None:
        """Ends the threads; batches not yet begun are dropped."""
        for pool in (self.pool, self.makers):  # what a batch waits for is cancelled first
            if pool is not None:
                pool.close()

    def tasks(self, iteration: int, size: int) -> tuple[Tensor, list[Task]]:
        """(samples int64 [b], their tasks): this rank's rows of the batch. Raises UserError where it has none."""
        if size < self.world:
            raise UserError(f"data.batch = {size}: allowed is at least one sample a rank, and there are {self.world}")
        plan = self.order.plan(iteration, size)
        rows = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        samples = torch.arange(iteration * size, (iteration + 1) * size)[rows]
        captions = self.draws.uniform(iteration, samples, "data.caption").tolist()
        if self.random_crop:
            places = self.draws.uniform(iteration, samples, "data.crop", (2,)).tolist()
        else:
            places = [(0.5, 0.5)] * len(samples)
        found = zip(plan.items[rows].tolist(), places, captions, strict=True)
        return samples, [Task(item, plan.size, (x, y), caption) for item, (x, y), caption in found]

    def made(self, iteration: int, size: int) -> Share:
        """The share, loaded, unusable samples replaced, on the device."""
        samples, tasks = self.tasks(iteration, size)
        done: list[Any] = [None] * len(tasks)
        skips, left, attempt = [], list(range(len(tasks))), 0
        while left:
            loaded = list(self._map(self._load, [tasks[j] for j in left]))
            if self.reader.batched:
                loaded = self.reader.finish(loaded, [tasks[j] for j in left])
            attempt += 1
            for j, value in zip(left, loaded, strict=True):
                done[j] = value
                if isinstance(value, BadSample):
                    skips.append(Skip(self.reader.key(tasks[j].item), value.reason, value.detail))
                    other = self.order.alternative(tasks[j].item, int(samples[j]), attempt)
                    tasks[j] = Task(other, tasks[j].size, tasks[j].place, tasks[j].caption)
            left = [j for j in left if isinstance(done[j], BadSample)]
            if attempt > MAX_ATTEMPTS:
                raise UserError(f"{MAX_ATTEMPTS} samples in a row cannot be used, the last one: {done[left[0]]}")
        return self._together(done, samples, tasks, skips)

    def _load(self, task: Task) -> Loaded | BadSample:
        try:
            return self.reader.load(task)
        except BadSample as error:
            return error

    def _map(self, function: Callable[[Task], Any], tasks: Sequence[Task]) -> Iterable[Any]:
        return map(function, tasks) if self.pool is None else self.pool.map(function, tasks)

    def _together(self, done: list[Loaded], samples: Tensor, tasks: list[Task], skips: list[Skip]) -> Share:
        items = torch.tensor([t.item for t in tasks])
        out = Share({}, {}, samples, items, tasks[0].size, skips)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for name, first in done[0].items():
                if isinstance(first, str):
                    out.texts[name] = [row[name] for row in done]
                else:
                    rows = [row[name] for row in done]
                    for row in rows if self.stream else ():
                        if (
                            row.is_cuda
                        ):  # decoded there, on another stream: its memory is not free before this one has it
                            row.record_stream(self.stream)
                    out.tensors[name] = self._to_device(torch.stack(rows))
            out.samples = self._to_device(samples)
            out.event = self.stream.record_event() if self.stream else None
        return out

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.stream is None or tensor.is_cuda:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def as_tensor(picture: np.ndarray | Tensor) -> Tensor:
    """A decoder's picture as a tensor, without a copy where its memory may be written."""
    if isinstance(picture, Tensor):
        return picture
    return torch.from_numpy(picture if picture.flags.writeable else picture.copy())
