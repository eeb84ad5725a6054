"""IDA's line, phi <- lam phi + (1 - lam) theta, over many tensors in one launch (paper.md 1.3).

fp32 arithmetic in torch.lerp's form: with w = 1 - lam, fma(w, theta - phi, phi), or fma(w - 1, theta - phi, theta)
from |w| = 1/2 on. Rounded to nearest, a bf16 phi whose gap to theta is below ~20 % never moves at lam = 0.99; hence
two more ways to keep one: `split`, the exact fp32 as bf16 (the weight in use) and int16 (the rest), and `stochastic`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from senseflow_kernels import _ext
from senseflow_kernels._bf16 import (
    ROUNDS,
    join_fp32,
    load_joined,
    noise,
    random_bits,
    round_stochastic,
    rounded_at_random,
    split_fp32,
    store_split,
)
from senseflow_kernels._launch import INTERPRET, fused, is_available, jit, launch, rounded, tl
from senseflow_kernels._table import (
    FIELDS,
    Group,
    Table,
    cached_tables,
    check,
    groups_of,
    lists_of,
    local,
    numbered,
    paired,
    refuse_twice,
    tables_of,
)
from senseflow_kernels.buckets import Buckets, is_dense

MODES = ("fp32", "split", "stochastic", "nearest")


# -- torch reference -----------------------------------------------------------------------------------------------


def _move(value: Tensor, theta: Tensor, weight: float | Tensor) -> None:
    """torch.lerp in place in value's precision; at weight 0 nothing, whatever theta is."""
    theta = theta.to(value.dtype)
    if isinstance(weight, Tensor):
        weight = weight.to(value.dtype)
        value.copy_(torch.where(weight == 0, value, torch.lerp(value, theta, weight)))
    elif weight:
        value.lerp_(theta, weight)


def lerp_reference(group: Group, weight: float | Tensor, ema_weight: float, step: Tensor | None) -> None:
    """One step in plain torch, tensor by tensor. weight: 1 - lam; fp32 arithmetic, fp64 for an fp64 phi."""
    for i, (phi, theta) in enumerate(zip(group.phi, group.theta, strict=True)):
        if group.theta_low:
            theta = join_fp32(theta, group.theta_low[i])
        if group.ema:
            _move(group.ema[i], theta, ema_weight)
        if isinstance(weight, float) and weight == 0:
            continue
        value = join_fp32(phi, group.low[i]) if group.low else phi if phi.dtype == torch.float64 else phi.float()
        _move(value, theta, weight)
        if group.low:
            high, low = split_fp32(value)
            phi.copy_(high)
            group.low[i].copy_(low)
        elif group.random:
            assert step is not None
            bits = random_bits(len(phi), group.starts[i], group.ids[i], group.seed, step)
            phi.copy_(round_stochastic(value, bits))
        elif value is not phi:
            phi.copy_(value)


# -- kernel --------------------------------------------------------------------------------------------------------

BLOCK = 4096 if INTERPRET else 2048  # elements at a time; an interpreted tile costs much the same for any number
CHUNK = 4096 if INTERPRET else 8192  # elements a program


@jit
def _kernel(
    table_ptr, map_ptr, lam_ptr, weight, ema_weight, step_ptr,
    PHI: tl.constexpr, THETA: tl.constexpr, SPLIT: tl.constexpr, SPLIT_THETA: tl.constexpr, RANDOM: tl.constexpr,
    EMA: tl.constexpr, WIDE: tl.constexpr, FIELDS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Program i does chunk map[i, 1] of the tensor in row map[i, 0] of the table.

    WIDE: addresses are multiples of 16 bytes and starts multiples of 8. Then a full chunk is done without a mask: one
    by a length known at run time alone would cut every load down to one element.
    """
    weight, ema_weight = tl.cast(weight, tl.float32), tl.cast(ema_weight, tl.float32)  # fp64 in the interpreter
    if lam_ptr is not None:
        weight = (1.0 - tl.load(lam_ptr)).to(tl.float32)
    if not EMA:  # noqa: SIM102  known at compile time, and so not part of the branch
        if weight == 0.0:
            return
    block = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(map_ptr + 2 * block).to(tl.int64) * FIELDS
    first = tl.load(map_ptr + 2 * block + 1).to(tl.int64) * CHUNK
    n = tl.load(row + 5)
    end = n
    if RANDOM and not WIDE:
        end += tl.load(row + 6) % 8  # tiles begin at a multiple of 8 in the parameter, so before the tensor
    end = tl.minimum(first + CHUNK, end)
    while first < end:  # no range: Triton 3.6 interprets none of tensors beside NumPy 2.4
        at = tl.multiple_of(first, BLOCK)
        if WIDE:
            if at + BLOCK <= n:
                _tile(row, at, n, weight, ema_weight, step_ptr, PHI, THETA, SPLIT, SPLIT_THETA, RANDOM, EMA, WIDE,
                      BLOCK, ROUNDS, EMULATE, False)  # fmt: skip
            else:
                _tile(row, at, n, weight, ema_weight, step_ptr, PHI, THETA, SPLIT, SPLIT_THETA, RANDOM, EMA, WIDE,
                      BLOCK, ROUNDS, EMULATE, True)  # fmt: skip
        else:
            _tile(row, at, n, weight, ema_weight, step_ptr, PHI, THETA, SPLIT, SPLIT_THETA, RANDOM, EMA, WIDE,
                  BLOCK, ROUNDS, EMULATE, True)  # fmt: skip
        first += BLOCK


@jit
def _tile(
    row, first, n, weight, ema_weight, step_ptr,
    PHI: tl.constexpr, THETA: tl.constexpr, SPLIT: tl.constexpr, SPLIT_THETA: tl.constexpr, RANDOM: tl.constexpr,
    EMA: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr, EMULATE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Elements first ... first + BLOCK - 1 of one tensor."""
    if RANDOM:
        start = tl.load(row + 6)
        if not WIDE:
            first -= start % 8  # so that eight elements of one Philox counter stay together
    # int64 on scalars alone: a tile's own offsets and bounds fit int32, and then nothing spills (Triton 3.6).
    offset = tl.arange(0, BLOCK)
    after, before = tl.minimum(n - first, BLOCK).to(tl.int32), tl.minimum(first, 0).to(tl.int32)
    mask = (offset + before >= 0) & (offset < after) if MASKED else None
    phi_ptr, low_ptr = _pointer(row, PHI, WIDE) + first, _pointer(row + 1, tl.int16, WIDE) + first
    theta_ptr, theta_low_ptr = _pointer(row + 2, THETA, WIDE) + first, _pointer(row + 3, tl.int16, WIDE) + first
    theta = load_joined(theta_ptr + offset, theta_low_ptr + offset, mask, SPLIT_THETA)
    if EMA:
        ema_ptr = _pointer(row + 4, tl.float32, WIDE) + first + offset
        if ema_weight != 0.0:
            tl.store(ema_ptr, _lerp(tl.load(ema_ptr, mask), theta, ema_weight, EMULATE), mask)
    if weight != 0.0:
        value = _lerp(load_joined(phi_ptr + offset, low_ptr + offset, mask, SPLIT), theta, weight, EMULATE)
        if SPLIT:
            store_split(phi_ptr + offset, low_ptr + offset, value, mask)
        elif RANDOM:
            bits = noise(start + first, tl.load(row + 7), tl.load(row + 8), tl.load(step_ptr), BLOCK, ROUNDS)
            tl.store(phi_ptr + offset, rounded_at_random(value, bits), mask)
        else:
            tl.store(phi_ptr + offset, rounded(value, PHI, EMULATE), mask)


@jit
def _pointer(field, dtype: tl.constexpr, WIDE: tl.constexpr):
    ptr = tl.load(field).to(tl.pointer_type(dtype))  # type: ignore[arg-type]
    if WIDE:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@jit
def _lerp(value, end, weight, EMULATE: tl.constexpr):
    small = tl.abs(weight) < 0.5
    return _fma(tl.where(small, weight, weight - 1.0), end - value, tl.where(small, value, end), EMULATE)


@jit
def _fma(a, b, c, EMULATE: tl.constexpr):
    """a b + c, rounded once. The interpreter's fma rounds twice, hence EMULATE: fp64 rounded to odd, then to fp32."""
    if EMULATE:
        product, c = a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64)  # the product is exact
        total = product + c
        part = total - product
        error = (product - (total - part)) + (c - part)  # exact too; NaN where total is not finite
        bits = total.to(tl.int64, bitcast=True)
        nudge = tl.where((error > 0) == (total > 0), 1, -1)
        inexact = ((error > 0) | (error < 0)) & (bits % 2 == 0)
        return tl.where(inexact, bits + nudge, bits).to(tl.float64, bitcast=True).to(tl.float32)
    return tl.fma(a, b, c)


# -- launches ------------------------------------------------------------------------------------------------------


def _triton(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _run(
    group: Group, tables: list[Table] | None, lam: Tensor | None, weight: float, ema_weight: float, step: Tensor | None
) -> None:
    """One step of a group. lam: 0-d tensor, or None and weight = 1 - lam. tables: the plan's, else from the cache."""
    phi, theta = group.phi[0], group.theta[0]
    lam, step = (t if t is None else t.to(phi.device) for t in (lam, step))  # groups may lie on several devices
    if _ext.takes(phi, theta):
        _csrc(group, _csrc_tables(group) if tables is None else tables, lam, weight, ema_weight, step)
        return
    if not fused("lerp", phi, theta):
        refuse_twice(t.data_ptr() for t in group.phi if t.numel())
        if lam is not None:
            weight = (1 - lam).float() if phi.is_cuda else (1 - lam).float().item()  # type: ignore[assignment]
        lerp_reference(group, weight, ema_weight, step)
        return
    for table in cached_tables(group, CHUNK) if tables is None else tables:
        launch(
            "lerp", _kernel, (len(table.map),), table.rows, table.map, lam, weight, ema_weight, step,
            PHI=_triton(phi.dtype), THETA=_triton(theta.dtype), SPLIT=bool(group.low),
            SPLIT_THETA=bool(group.theta_low), RANDOM=group.random, EMA=bool(group.ema), WIDE=table.wide,
            FIELDS=FIELDS, CHUNK=CHUNK, BLOCK=BLOCK, ROUNDS=ROUNDS, EMULATE=INTERPRET, num_warps=8,
        )  # fmt: skip
    # The kernel writes behind autograd's back: a backward through the old values must still be refused.
    torch.autograd.graph.increment_version([*group.phi, *group.low, *group.ema])


def _csrc_tables(group: Group) -> list[Table]:
    lists = dict(phi=group.phi, phi_low=group.low, theta=group.theta, theta_low=group.theta_low, ema=group.ema)
    rows, device = _ext.rows_of(lists, ("phi",) * group.random, group.ids, group.starts), group.phi[0].device
    return [Table(rows.to(device), rows if device.type == "cpu" else _ext.map_of(rows).to(device), True)]


def _csrc(
    group: Group, tables: list[Table], lam: Tensor | None, weight: float, ema_weight: float, step: Tensor | None
) -> None:
    rows, programs, _ = tables[0]
    if rows.is_cuda:
        _ext.update_cuda(
            rows, programs, op="lerp", scalars=dict(lam=None if lam is None else lam.double(), step=step),
            phi_weight=weight, ema_weight=ema_weight, seed=group.seed,
        )  # fmt: skip
    else:
        weight = weight if lam is None else (1 - lam).float().item()
        _ext.update_cpu(
            rows, op="lerp", phi_weight=weight, ema_weight=ema_weight, step=0 if step is None else int(step),
            seed=group.seed,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*group.phi, *group.low, *group.ema])


# -- registration --------------------------------------------------------------------------------------------------


@torch.library.custom_op("senseflow::lerp_", mutates_args=("phi", "low", "ema"))
def _op(
    phi: Sequence[Tensor], theta: Sequence[Tensor], low: Sequence[Tensor], theta_low: Sequence[Tensor],
    ema: Sequence[Tensor], random: bool, seed: int, ids: Sequence[int], starts: Sequence[int],
    lam: Tensor | None, weight: float, ema_weight: float, step: Tensor | None,
) -> None:  # fmt: skip
    # no tables: the compiler may pass copies, of other addresses
    _run(Group(phi, theta, low, theta_low, ema, random, seed, ids, starts), None, lam, weight, ema_weight, step)


@_op.register_fake
def _(phi, theta, low, theta_low, ema, random, seed, ids, starts, lam, weight, ema_weight, step):
    return None


def _step(
    group: Group, tables: list[Table] | None, lam: Tensor | None, weight: float, ema_weight: float, step: Tensor | None
) -> None:
    """_run; through the op where a compiler must see what is written."""
    if torch.compiler.is_compiling():
        _op(*group, lam, weight, ema_weight, step)
    else:
        _run(group, tables, lam, weight, ema_weight, step)


# -- public --------------------------------------------------------------------------------------------------------


def _weight(lam: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """(lam on the device, unused), read there at run time, or (None, 1 - lam)."""
    if not isinstance(lam, Tensor) and 0 <= lam <= 1:
        return None, 1.0 - float(lam)
    if not isinstance(lam, Tensor):
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    if lam.numel() != 1:
        raise ValueError(f"lam must be a number or a tensor of one element, got shape {tuple(lam.shape)}")
    scalar: Tensor = lam.detach().reshape(())
    if scalar.dtype not in (torch.float32, torch.float64):
        scalar = scalar.float()
    if scalar.device != device and scalar.device.type == "cpu" and not torch.compiler.is_compiling():
        return None, (1 - scalar).float().item()  # no sync, and no copy to the device
    return scalar.to(device), 0.0


@torch.no_grad()
def lerp_(phi: Iterable[Tensor], theta: Iterable[Tensor], lam: float | Tensor) -> None:
    """Moves every phi in place: fp32 arithmetic, one rounding to phi's dtype. lam: a number in [0, 1] or 0-d tensor.

    lam = 1 leaves phi bit for bit. Any strides and floating dtypes; DTensors by their local part. Gathers every address
    at each call, `Lerp` once. Raises ValueError for other lengths, shapes, devices or lam, or a tensor twice in phi.
    """
    phi = [*phi]
    local_theta, phi = paired("theta", [*theta], phi), [local(p) for p in phi]
    if not phi:
        return
    work, ends = [*phi], local_theta
    for i, (p, t) in enumerate(zip(phi, local_theta, strict=True)):
        if p.stride() != t.stride() or not is_dense(p):
            work[i], ends[i] = p.contiguous(), t.contiguous()
    lam, weight = _weight(lam, phi[0].device)  # type: ignore[assignment]
    none, zeros = [None] * len(phi), [0] * len(phi)
    for group in groups_of(work, ends, none, none, none, False, 0, zeros, zeros):
        _step(group, None, lam, weight, 0.0, None)  # type: ignore[arg-type]
    for p, w in zip(phi, work, strict=True):
        if w is not p:
            p.copy_(w)


class Lerp:
    """A plan: what moves where, gathered once. A step is one launch per kind of tensor, so one per flat bucket.

    phi, theta: lists of tensors matched by position, or two Buckets of the same layout; low, theta_low, ema likewise
    where given. mode says how a phi of fewer bits than fp32 is kept; an fp32 phi is moved exactly in every mode:

        fp32        every phi is fp32
        split       phi bf16 with low int16: exact fp32, see split_fp32
        stochastic  phi bf16, rounded at random: the mean is exact
        nearest     any dtype, rounded to nearest

    theta: any floating dtype, or with theta_low split itself. ema: fp32, ema <- ema_decay ema + (1 - ema_decay) theta
    in the same pass. DTensors are taken by their local part.

    Random numbers depend on (seed, step, parameter, element of the full parameter) alone, so not on the sharding. ids:
    the parameters' numbers, by default their positions; starts: where in the full parameter each tensor begins, by
    default 0 or what a DTensor's placements say. `count`: int64 on the device, the steps rounded at random so far; it
    advances unless a step is given, also in a replayed graph; save it to resume.

    The tensors' memory is held: build a new plan where it moves (module.to()); none can be copied or pickled. Raises
    ValueError, naming the tensor, for whatever does not fit: lengths, shapes, dtypes, devices, strides, a DTensor that
    has no single start (stochastic only), a tensor that stands in phi twice (here or in the first step).
    """

    @torch.no_grad()
    def __init__(
        self, phi: Iterable[Tensor] | Buckets, theta: Iterable[Tensor] | Buckets, mode: str = "fp32", *,
        low: Iterable[Tensor | None] | Buckets | None = None,
        theta_low: Iterable[Tensor | None] | Buckets | None = None,
        ema: Iterable[Tensor] | Buckets | None = None, ema_decay: float | None = None, seed: int = 0,
        ids: Sequence[int] | None = None, starts: Sequence[int] | None = None,
    ):  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if (ema is None) != (ema_decay is None) or not 0 <= (ema_decay or 0) <= 1:
            raise ValueError(f"ema goes with an ema_decay in [0, 1], got {ema_decay}")
        self._random = random = mode == "stochastic"
        self._ema_weight = 0.0 if ema_decay is None else 1.0 - ema_decay
        phi, theta, low, theta_low, ema = lists_of([phi, theta, low, theta_low, ema], random)
        ids, starts = numbered(phi, ids, starts, random)
        others = dict(theta=theta, low=low, theta_low=theta_low, ema=ema)
        others = {name: paired(name, tensors, phi) for name, tensors in others.items()}
        phi = [local(p) for p in phi]
        for i, p in enumerate(phi):
            check(i, mode, p, **{name: tensors[i] for name, tensors in others.items()})
        # What an exact fp32 is stored as needs no low half, though a twin bucket has one.
        low = [t if p.dtype == torch.bfloat16 else None for p, t in zip(phi, others["low"], strict=True)]
        theta, theta_low, ema = others["theta"], others["theta_low"], others["ema"]
        seed = (seed + 2**63) % 2**64 - 2**63  # the same 64 bits in what a table holds
        self._groups = groups_of(phi, theta, low, theta_low, ema, random, seed, ids, starts)
        self.count = torch.zeros((), dtype=torch.int64, device=phi[0].device if phi else None)
        self._tables: list[list[Table]] | None = None
        self._prepare()

    def _prepare(self) -> None:
        """At once, so that the first step may already be a captured one; later where the torch path was forced."""
        if self._tables is None and (is_available(self.count.device) or not _ext.reason_against(self.count.device)):
            self._tables = [
                _csrc_tables(group) if _ext.takes(group.phi[0], group.theta[0]) else tables_of(group, CHUNK)
                for group in self._groups
            ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a Lerp holds addresses of its tensors: build a new one for copies of them")

    @torch.no_grad()
    def step(self, lam: float | Tensor, step: Tensor | None = None) -> None:
        """One update. lam: number or 0-d tensor, read on the device; 1 leaves phi bit for bit as it is.

        step: 0-d int64 on the tensors' device, in place of count.
        """
        lam, weight = _weight(lam, self.count.device)  # type: ignore[assignment]
        if not torch.compiler.is_compiling():
            self._prepare()
        tables = self._tables or [None] * len(self._groups)
        for group, some in zip(self._groups, tables, strict=True):
            _step(group, some, lam, weight, self._ema_weight, self.count if step is None else step)  # type: ignore
        if step is None and self._random:
            self.count.add_(1)
