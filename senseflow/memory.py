"""Where memory goes: a ledger of the tensors that a piece of code makes, and the table of a plan.

The ledger works on any tensors that stay on the calling thread's device: of the CPU, and of the meta device, which have
shapes and no numbers. So the prediction of a run comes from the run's own code (planning.py), not from formulas.
GB are 1e9 bytes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GB = 1e9
CUDA_ROUNDING = 512  # bytes: the grain of torch's CUDA allocator, which max_memory_allocated counts by


def nbytes(tensors: Iterable[Tensor], ranks: int = 1, rounding: int = 1) -> int:
    """Bytes of these tensors' storages, each once; on the fullest of `ranks` that split every tensor along dim 0."""
    total, seen = 0, set()
    for t in list(tensors):  # all alive: an address may be used again
        key = t.untyped_storage()._cdata
        if key in seen:
            continue
        seen.add(key)
        size = t.untyped_storage().nbytes()
        if ranks > 1 and t.dim() and t.shape[0]:
            size = -(-t.shape[0] // ranks) * (t.numel() // t.shape[0]) * t.element_size()
        total += -(-size // rounding) * rounding
    return total


# -- operations on shapes ------------------------------------------------------------------------------------------

_results: dict[Any, tuple[type, list[Any]]] = {}  # of operations on meta tensors met before: (type, its elements)


class _NoKey(Exception):
    """An argument that is no key, or a tensor with numbers."""


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _NoKey
        return tuple(value.shape), value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout)):
        return type(value), value
    raise _NoKey


def _on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs). On meta tensors what comes out is known from the arguments' shapes and dtypes, so one that
    was met before is not run again: most of a plan's time went there. Not for operations that write or give views."""
    schema = func._schema
    if any(a.alias_info for a in schema.arguments) or not any(isinstance(a, (Tensor, list, tuple)) for a in args):
        return func(*args, **kwargs)
    try:
        key = (func, _key(args), _key(kwargs))
    except _NoKey:
        return func(*args, **kwargs)
    if key not in _results:
        out = func(*args, **kwargs)
        whole = out if isinstance(out, (list, tuple)) else [out]
        if all(_fills(t) if isinstance(t, Tensor) else t is None or type(t) is int for t in whole):
            layout = [(tuple(t.shape), t.stride(), t.dtype) if isinstance(t, Tensor) else t for t in whole]
            _results[key] = type(out), layout
        return out
    kind, layout = _results[key]
    made = [torch.empty_strided(t[0], t[1], dtype=t[2], device="meta") if type(t) is tuple else t for t in layout]
    return kind(made) if kind in (list, tuple) else made[0]


def _fills(t: Tensor) -> bool:
    """Whether a tensor is the whole of its storage, as `empty_strided` would make it."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return bool(t.is_meta and t.storage_offset() == 0 and t.untyped_storage().nbytes() == t.element_size() * extent)


# -- the ledger ----------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """The moment of most memory. parts: bytes by the phase that made them; gradients: of the weights, held."""

    total: float = 0.0
    gradients: float = 0.0
    parts: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Inside: counts the storages made and not yet freed, by phase, and remembers the fullest moments.

    What existed before is not counted. rounding: bytes that a storage's size is rounded up to. One thread.
    """

    def __init__(self, rounding: int = 1):
        super().__init__()
        self.rounding = rounding
        self.live: Counter[str] = Counter()  # bytes by phase, without `gradients`
        self.total, self.gradients, self.top = 0, 0, 0
        self.inside = False  # as profiling.Profiler: whether a phase is open
        self._phase = "other"
        self._known: dict[int, tuple[Any, int, str]] = {}  # storage -> its weak reference, bytes, phase
        self._front: dict[int, tuple[int, dict[str, int]]] = {}  # bytes of gradients -> most of the rest, and whose

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made inside belongs to `name`; an inner phase wins."""
        before, self._phase, self.inside = (self._phase, self.inside), name, True
        try:
            yield
        finally:
            self._phase, self.inside = before

    def moves(self, name: str, count: float) -> None:
        """What a profiler is told of traffic is nothing to a ledger."""

    def call(self) -> None:
        """Nor is a network call within a phase."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _on_meta(func, args, kwargs or {})
        self._count(out)
        return out

    def _count(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self._add(out)
        elif isinstance(out, (list, tuple)):
            for item in out:
                self._count(item)

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.rounding) * self.rounding
        if not size:
            return
        self._known[key] = weakref.ref(storage, lambda _, key=key: self._freed(key)), size, self._phase
        self.live[self._phase] += size
        self.total += size
        self._mark()

    def _mark(self) -> None:
        self.top = max(self.top, self.total + self.gradients)
        most = self._front.get(self.gradients)
        if most is None or self.total > most[0]:
            self._front[self.gradients] = self.total, dict(self.live)

    def _freed(self, key: int) -> None:
        _, size, phase = self._known.pop(key)
        if phase == "gradients":
            self.gradients -= size
        else:
            self.live[phase] -= size
            self.total -= size

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Leaves the storages of tensors that existed before out, though an operation gives them back."""
        for t in tensors:
            storage = t.untyped_storage()
            key = storage._cdata
            self._known[key] = weakref.ref(storage, lambda _, key=key: self._known.pop(key)), 0, ""

    def as_gradient(self, t: Tensor) -> None:
        """From now on this tensor is a weight's gradient, held until the optimizer's step."""
        key = t.untyped_storage()._cdata
        entry = self._known.get(key)
        if entry is None or entry[2] in ("gradients", ""):
            return
        ref, size, phase = entry
        self._known[key] = ref, size, "gradients"
        self.live[phase] -= size
        self.total -= size
        self.gradients += size
        self._mark()

    def peak(self, share: float = 1.0) -> Peak:
        """The fullest moment if a share of the gradients' bytes were held: 0 where each is stepped on as it appears,
        1/N on N ranks that split them. Its total counts that share."""
        found = Peak()
        for gradients, (rest, parts) in self._front.items():
            if (total := rest + share * gradients) > found.total:
                found = Peak(total, share * gradients, {k: v for k, v in parts.items() if v})
        return found


# -- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A part of the plan: bytes on one device, and in host memory. at: what it is part of the sum of."""

    part: str
    what: str
    device: float
    host: float = 0.0


def gb(size: float) -> str:
    """In 1e9 bytes, to the megabyte, below 10 MB to the kilobyte."""
    return f"{size / GB:.3f}" if size >= 1e7 or not size else f"{size / GB:.6f}"


def cells(rows: Sequence[Row], total: float, room: float, reserve: float) -> list[list[str]]:
    """The table's cells: rows of any size, the reserve, the sum, what the device has."""
    shown = [[r.part, r.what, gb(r.device), gb(r.host) if r.host else ""] for r in rows if r.device or r.host]
    if reserve:
        shown.append(["kept free", "context, libraries, fragmentation", gb(reserve), ""])
    host = sum(r.host for r in rows)
    shown.append(["sum", "", gb(total), gb(host) if host else ""])
    left = room - total
    shown.append(["device", f"{gb(abs(left))} GB {'left' if left >= 0 else 'too few'}", gb(room), ""])
    return shown


def device_bytes() -> tuple[str, float]:
    """(type, bytes) of what a run here would use: the GPU, or the CPU and the machine's memory."""
    if torch.cuda.is_available():
        return "cuda", float(torch.cuda.get_device_properties(0).total_memory)
    import os

    return "cpu", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
