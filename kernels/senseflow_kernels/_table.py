"""Many tensors for one launch: their local parts, the groups that one kernel takes, and the pointer tables.

A table and its map of programs are built once and live on the device, so a launch copies nothing to it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from senseflow_kernels._launch import blocks_of
from senseflow_kernels.buckets import Buckets, is_dense, is_dtensor

FIELDS = 9  # of a table row: addresses of phi, low, theta, theta_low, ema; elements, start, parameter, seed


class Group(NamedTuple):
    """Tensors of one kind, flat: low, theta_low and ema have one each or are empty.

    ids, starts: of stochastic rounding, which parameter and which of its elements comes first here.
    """

    phi: Sequence[Tensor]
    theta: Sequence[Tensor]
    low: Sequence[Tensor]
    theta_low: Sequence[Tensor]
    ema: Sequence[Tensor]
    random: bool
    seed: int
    ids: Sequence[int]
    starts: Sequence[int]


class Table(NamedTuple):
    """What a launch needs beside scalars, on the device: rows of FIELDS int64, and (row, chunk) int32 per program."""

    rows: Tensor
    map: Tensor
    wide: bool


def refuse_twice(addresses: Iterable[int]) -> None:
    """Raises ValueError where an address is to be written twice: by programs that race, or moved twice in torch."""
    addresses = [*addresses]
    if len({*addresses}) < len(addresses):
        raise ValueError("a tensor stands in phi twice (tied weights?): give it once")


def tables_of(group: Group, block: int) -> list[Table]:
    """One launch of all tensors that 128-bit loads fit, one of the rest; none of either where there are none."""
    lists = (group.phi, group.low, group.theta, group.theta_low, group.ema)
    rows: dict[bool, list[list[int]]] = {True: [], False: []}
    for i, phi in enumerate(group.phi):
        if not phi.numel():
            continue
        start = group.starts[i] if group.random else 0
        pointers = [tensors[i].data_ptr() if tensors else 0 for tensors in lists]
        wide = start % 8 == 0 and all(p % 16 == 0 for p in pointers)
        rows[wide].append([*pointers, phi.numel(), start, group.ids[i], group.seed])
    refuse_twice(row[0] for row in (*rows[True], *rows[False]))
    tables = []
    for wide, some in rows.items():
        if some:
            # A chunk begins at a multiple of 8 in the parameter, hence start % 8 more elements.
            chunks = torch.tensor([blocks_of(row[5] + row[6] % 8, block) for row in some])
            row = torch.repeat_interleave(torch.arange(len(some)), chunks)
            chunk = torch.arange(len(row)) - (chunks.cumsum(0) - chunks)[row]
            device = group.phi[0].device
            programs = torch.stack((row, chunk), 1).int()
            tables.append(Table(torch.tensor(some).to(device), programs.to(device), wide))
    return tables


_cache: OrderedDict[tuple, list[Table]] = OrderedDict()
_captured: list[list[Table]] = []  # a captured graph reads its tables at every replay, so they stay


def cached_tables(group: Group, block: int) -> list[Table]:
    """tables_of by addresses, for callers without a plan: the last 64 sets are kept."""
    lists = (group.phi, group.low, group.theta, group.theta_low, group.ema)
    addresses = tuple(tuple(t.data_ptr() for t in tensors) for tensors in lists)
    sizes = tuple(t.numel() for t in group.phi)
    key = (group.phi[0].device, addresses, sizes, group.random, group.seed, *group.ids, *group.starts, block)
    if key not in _cache:
        _cache[key] = tables_of(group, block)
        if len(_cache) > 64:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    if group.phi[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(_cache[key])
    return _cache[key]


def groups_of(
    phi: Sequence[Tensor], theta: Sequence[Tensor], low: Sequence[Tensor | None], theta_low: Sequence[Tensor | None],
    ema: Sequence[Tensor | None], random: bool, seed: int, ids: Sequence[int], starts: Sequence[int],
) -> list[Group]:  # fmt: skip
    """The tensors, flattened, by what one launch can take together."""
    kinds: dict[tuple, list[int]] = {}
    for i, (p, t) in enumerate(zip(phi, theta, strict=True)):
        kind = (p.dtype, t.dtype, p.device, low[i] is not None, theta_low[i] is not None, ema[i] is not None)
        kinds.setdefault(kind, []).append(i)

    def some(tensors: Sequence[Any], at: list[int]) -> list[Tensor]:
        return [_flat(tensors[i]) for i in at] if tensors[at[0]] is not None else []

    return [
        Group(
            some(phi, at), some(theta, at), some(low, at), some(theta_low, at), some(ema, at),
            random and kind[0] == torch.bfloat16, seed, [ids[i] for i in at], [starts[i] for i in at],
        )
        for kind, at in kinds.items()
    ]  # fmt: skip


def _flat(t: Tensor) -> Tensor:
    """A dense t as the run of memory it is."""
    t = t.detach()
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def local(t: Any) -> Any:
    return t.to_local() if is_dtensor(t) else t


def start_of(t: Any) -> int | None:
    """Offset of a DTensor's local part in the full parameter; None where that is not one known run of it."""
    start, sharded = 0, False
    for axis, placement in enumerate(t.placements if is_dtensor(t) else ()):
        if placement.is_replicate():
            continue
        if sharded or type(placement).__name__ != "Shard" or placement.dim != 0:
            return None
        rows, sharded = blocks_of(t.shape[0], t.device_mesh.size(axis)), True
        start = min(t.device_mesh.get_coordinate()[axis] * rows, t.shape[0]) * t.shape[1:].numel()
    return start


def numbered(
    phi: Sequence[Any], ids: Sequence[int] | None, starts: Sequence[int] | None, random: bool
) -> tuple[Sequence[int], Sequence[int]]:
    """(ids, starts), one of each for every tensor; what was not given by position and placement."""
    ids = range(len(phi)) if ids is None else ids
    found = [start_of(p) if random else 0 for p in phi] if starts is None else starts
    if not len(phi) == len(ids) == len(found):
        raise ValueError(f"phi has {len(phi)} tensors, ids {len(ids)}, starts {len(found)}")
    for i, start in enumerate(found):
        if start is None:
            raise ValueError(f"tensor {i}: stochastic rounding needs one dim-0 Shard, not {phi[i].placements}")
        if start < 0:
            raise ValueError(f"tensor {i}: its start must not be negative, got {start}")
    return ids, found  # type: ignore[return-value]


def paired(name: str, tensors: Sequence[Any], phi: Sequence[Any]) -> list[Any]:
    """Local parts of tensors, one for each of phi, alike in device, shape and placement."""
    if len(tensors) != len(phi):
        raise ValueError(f"phi has {len(phi)} tensors, {name} {len(tensors)}")
    for i, (p, t) in enumerate(zip(phi, tensors, strict=True)):
        for whose, found in (("phi", p), (name, t)):
            if not isinstance(found, Tensor) and found is not None:
                raise ValueError(f"tensor {i}: {whose} must be a list of tensors, here is a {type(found).__name__}")
        if not p.is_floating_point():
            raise ValueError(f"tensor {i}: phi must be of a floating dtype, got {p.dtype}")
        if t is None:
            continue
        if t.device != p.device:  # a kernel would follow the address of one on the other
            raise ValueError(f"tensor {i}: phi is on {p.device}, {name} on {t.device}")
        if is_dtensor(p) and is_dtensor(t) and p.placements != t.placements:
            raise ValueError(f"tensor {i}: phi is placed {p.placements}, {name} {t.placements}")
        if local(p).shape != local(t).shape:
            raise ValueError(f"tensor {i}: phi {tuple(local(p).shape)} against {name} {tuple(local(t).shape)}")
    return [local(t) for t in tensors]


def lists_of(args: list[Any], random: bool) -> list[list]:
    """Buckets as their flats, or (random) parameter by parameter, numbered in memory order; None as Nones."""
    given = [a for a in args if a is not None]
    if any(isinstance(a, Buckets) for a in given):
        if not all(isinstance(a, Buckets) and a.same_layout(args[0]) for a in given):
            raise ValueError("Buckets go together with Buckets of the same layout alone (Buckets.like)")
        args = [a if a is None else list(a.runs()) if random else a.flats for a in args]
    lists = [None if a is None else list(a) for a in args]
    return [[None] * len(lists[0]) if a is None else a for a in lists]  # type: ignore[arg-type]


def check(
    i: int, mode: str, phi: Tensor, theta: Tensor, low: Tensor | None, theta_low: Tensor | None, ema: Tensor | None
) -> None:
    kept, others = phi.dtype, [t for t in (theta, low, theta_low, ema) if t is not None]
    if kept != torch.float32 and mode == "fp32":
        raise ValueError(f"tensor {i}: mode 'fp32' keeps phi in fp32, this one is {kept}")
    if kept not in (torch.float32, torch.bfloat16) and mode != "nearest":
        raise ValueError(f"tensor {i}: mode {mode!r} keeps phi in bf16 (or fp32), this one is {kept}")
    if kept == torch.bfloat16 and (mode == "split") != (low is not None):
        raise ValueError(f"tensor {i}: a bf16 phi has a low half in mode 'split', and there alone")
    if theta_low is not None and theta.dtype != torch.bfloat16:
        raise ValueError(f"tensor {i}: theta_low stands beside a bf16 theta, this one is {theta.dtype}")
    if any(t is not None and t.dtype != torch.int16 for t in (low, theta_low)):
        raise ValueError(f"tensor {i}: low halves are int16")
    if ema is not None and ema.dtype != torch.float32:
        raise ValueError(f"tensor {i}: ema must be fp32, got {ema.dtype}")
    if not is_dense(phi) or any(t.stride() != phi.stride() for t in others):
        raise ValueError(f"tensor {i}: phi must be dense and the others laid out like it, got stride {phi.stride()}")
    if mode == "stochastic" and kept == torch.bfloat16 and not phi.is_contiguous():
        raise ValueError(f"tensor {i}: stochastic rounding counts elements in order, so phi must be contiguous")
