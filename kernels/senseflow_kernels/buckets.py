"""Flat buckets: all parameters of one dtype in one padded tensor, the module's parameters being views of it.

For one GPU and DDP; sharded (DTensor) parameters stay where they are and go through a pointer table (lerp.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGN = 64  # elements: whole 128-byte lines in bf16, 128-bit loads in every dtype down to int8


class Slot(NamedTuple):
    """Where a parameter lies: flats[bucket][offset : offset + numel], in memory order of shape and stride."""

    name: str
    bucket: int
    offset: int
    numel: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_dtensor(t: Any) -> bool:
    """Told by what it has: importing DTensor costs a second that no single-GPU user should pay."""
    return hasattr(t, "to_local") and hasattr(t, "placements")


def is_dense(t: Tensor) -> bool:
    """Whether t fills a run of numel elements, each once: contiguous, channels_last and other permutations."""
    if t.layout != torch.strided:
        return False
    if t.numel() == 0 or t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def padded(n: int, to: int = ALIGN) -> int:
    return -(-n // to) * to


class Buckets:
    """Moves the parameters into one flat tensor per dtype and makes each parameter's data a view of it.

    named_params: (name, tensor) pairs on one device, as Module.named_parameters() gives them; names, values, strides
    and the parameter objects stay. Every parameter starts at a multiple of ALIGN elements, a flat's length is a
    multiple of pad (itself a multiple of ALIGN: world * ALIGN makes it divisible among ranks), the gaps are zero.

    flats: the flat tensors, in order of each dtype's first parameter; slots: one per parameter, in the order given.
    load_state_dict keeps the views; module.to() and load_state_dict(assign=True) do not: `check` tells.

    Raises ValueError, naming the parameter, for DTensors, tensors that overlap (tied weights given twice), tensors
    that are not dense or on meta, several devices, a name given twice or another pad.
    """

    slots: tuple[Slot, ...]
    flats: list[Tensor]

    def __init__(self, named_params: Iterable[tuple[str, Tensor]], pad: int = ALIGN):
        named = list(named_params)
        if pad <= 0 or pad % ALIGN:
            raise ValueError(f"pad must be a positive multiple of {ALIGN}, got {pad}")
        _check(named)
        dtypes = list(dict.fromkeys(t.dtype for _, t in named))
        ends, slots = [0] * len(dtypes), []
        for name, t in named:
            bucket = dtypes.index(t.dtype)
            slots.append(Slot(name, bucket, ends[bucket], t.numel(), tuple(t.shape), tuple(t.stride())))
            ends[bucket] += padded(t.numel())
        self.slots = tuple(slots)
        device = named[0][1].device if named else None
        self.flats = [
            torch.zeros(padded(end, pad), dtype=dtype, device=device) for dtype, end in zip(dtypes, ends, strict=True)
        ]
        with torch.no_grad():
            for slot, (_, param) in zip(self.slots, named, strict=True):
                view = self._view(slot)
                view.copy_(param)
                param.data = view

    def _view(self, slot: Slot) -> Tensor:
        return self.flats[slot.bucket].as_strided(slot.shape, slot.stride, slot.offset)

    def like(self, dtype: torch.dtype | None = None) -> Buckets:
        """A twin of the same layout, all zero and tied to no module: moments, an EMA, low halves (int16)."""
        twin = object.__new__(Buckets)
        twin.slots = self.slots
        twin.flats = [torch.zeros_like(flat, dtype=dtype or flat.dtype) for flat in self.flats]
        return twin

    def views(self) -> dict[str, Tensor]:
        """The parameters by name, as views of the flats."""
        return {slot.name: self._view(slot) for slot in self.slots}

    def runs(self) -> Iterator[Tensor]:
        """One flat piece per slot, its padding included, so that its length is a multiple of ALIGN."""
        for slot in self.slots:
            yield self.flats[slot.bucket][slot.offset : slot.offset + padded(slot.numel)]

    def same_layout(self, other: Buckets) -> bool:
        """Whether every parameter lies at the same place in both; dtypes may differ."""
        return self.slots == other.slots and [len(f) for f in self.flats] == [len(f) for f in other.flats]

    def check(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        """Raises RuntimeError, naming it, where one of the module's parameters is not the view it was made."""
        named = dict(named_params)
        for slot in self.slots:
            param, view = named.get(slot.name), self._view(slot)
            if param is None:
                raise RuntimeError(f"{slot.name} is in the buckets and not in the module: build Buckets anew")
            if (param.data_ptr(), param.dtype, param.stride()) != (view.data_ptr(), view.dtype, view.stride()):
                raise RuntimeError(f"{slot.name} left its bucket (module.to() or assign=True?): build Buckets anew")


def _check(named: list[tuple[str, Tensor]]) -> None:
    for pair in named:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            raise ValueError(
                f"expected (name, tensor) pairs, as of Module.named_parameters(), got {type(pair).__name__}"
            )
    for name, t in named:
        if t.is_meta:
            raise ValueError(f"{name} is on meta: give it memory first, Module.to_empty()")
        if is_dtensor(t):
            raise ValueError(
                f"{name} is a DTensor: buckets are for unsharded parameters, Lerp takes DTensors as they are"
            )
        if not is_dense(t):
            raise ValueError(f"{name} is not dense: shape {tuple(t.shape)}, layout {t.layout}")
        if t.device != named[0][1].device:
            raise ValueError(f"{name} is on {t.device}, {named[0][0]} on {named[0][1].device}")
    names = {name for name, _ in named}
    if len(names) != len(named):
        raise ValueError(f"names given twice: {sorted(n for n in names if sum(n == m for m, _ in named) > 1)}")
    placed = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name) for name, t in named if t.numel())
    for (_, end, name), (start, _, other) in pairwise(placed):
        if start < end:
            raise ValueError(f"{name} and {other} share memory (tied weights?): give one of them")
