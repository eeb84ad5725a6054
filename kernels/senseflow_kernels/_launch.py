"""Which path runs an op: Triton on CUDA tensors (or in Triton's interpreter), torch elsewhere; said once, counted.

Importing this needs neither Triton nor a GPU.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit: Callable[..., Any] = triton.jit  # pyright: ignore[reportRedeclaration]
except ImportError:  # the torch path needs none of it

    def jit(fn: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return fn

    triton: Any = None
    tl: Any = None

log = logging.getLogger("senseflow_kernels")

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
launches: Counter[str] = Counter()  # kernel launches of this process by op; a captured graph counts once

_said: set[tuple[str, str]] = set()
_chosen = os.environ.get("SENSEFLOW_KERNELS", "auto")
if _chosen not in ("auto", "torch", "strict", "csrc"):
    raise ValueError(f"SENSEFLOW_KERNELS = {_chosen!r}: allowed is auto, torch, strict or csrc")
PREFER_CSRC = _chosen == "csrc"  # on CUDA tensors, where csrc has the op; on a CPU it is the default
_strict, _torch_only = _chosen == "strict", _chosen == "torch"
_planned = False


class Unavailable(RuntimeError):
    """A fused kernel was demanded (strict) and cannot run."""


def is_available(device: str | torch.device = "cuda") -> bool:
    """Whether the Triton kernels run on tensors of `device` in this process."""
    return reason_against(device) is None


def reason_against(device: str | torch.device = "cuda") -> str | None:
    """Why Triton does not run on tensors of `device`, in words; None where it does."""
    device = torch.device(device)
    reason = _reason_against(device)
    if reason is None and device.type == "cuda" and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device"
    return reason


def _reason_against(device: torch.device) -> str | None:
    """The same for the device of a tensor, so one that exists."""
    if _torch_only:
        return "the torch path was asked for"
    if triton is None and not (device.type == "meta" and _planned):
        return "Triton is not installed"
    if device.type == "meta" and _planned:
        return None
    if device.type == "cpu":
        return None if INTERPRET else "the tensors are on the CPU"
    if device.type != "cuda":
        return f"there are no kernels for {device.type} tensors"
    return None


@contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """Inside: an op that cannot run its kernel raises Unavailable. Also SENSEFLOW_KERNELS=strict."""
    global _strict
    before, _strict = _strict, on
    try:
        yield
    finally:
        _strict = before


@contextmanager
def torch_path() -> Iterator[None]:
    """Inside: every op runs its torch form, to compare or to time. Also SENSEFLOW_KERNELS=torch."""
    global _torch_only
    before, _torch_only = _torch_only, True
    try:
        yield
    finally:
        _torch_only = before


@contextmanager
def planned() -> Iterator[None]:
    """Inside: tensors on the meta device, which have shapes and no numbers, take the way of a GPU's, whatever this
    machine has: what comes out has the shapes, dtypes and saved tensors of the kernels."""
    global _planned, _torch_only
    before, _planned, _torch_only = (_planned, _torch_only), True, False
    try:
        yield
    finally:
        _planned, _torch_only = before


def traced(x: Tensor) -> bool:
    """Whether a call on x goes through the registered op: under a compiler, and for shapes alone."""
    return torch.compiler.is_compiling() or x.is_meta


def fused(op: str, *tensors: Tensor | None, limit: str | None = None) -> bool:
    """Whether `op` runs its Triton kernel on these tensors (all on one device, no fp64, no DTensors).

    limit: a reason of the op's own against it. Where it does not, says once which path runs and why; under strict
    raises Unavailable.
    """
    present = [t for t in tensors if t is not None]
    reason = _reason_against(present[0].device)
    if reason is None and any(t.dtype not in (torch.float32, torch.float16, torch.bfloat16) for t in present):
        reason = f"dtypes are {sorted({str(t.dtype) for t in present})}, the kernel takes fp32, fp16 and bf16"
    if reason is None and any(hasattr(t, "placements") for t in present):  # a kernel reads an address, torch a mesh
        reason = "the tensors are DTensors"
    reason = reason or limit
    if reason is None:
        return True
    if _strict:
        raise Unavailable(f"{op}: {reason}, and strict mode forbids another path")
    if not torch.compiler.is_compiling() and (op, reason) not in _said:
        _said.add((op, reason))
        # On a CPU torch is the path by design; anywhere else the user expected a kernel.
        level = logging.INFO if present[0].device.type in ("cpu", "meta") or _torch_only else logging.WARNING
        log.log(level, "%s runs in torch, not in Triton: %s", op, reason)
    return False


_counters: dict[tuple[int, int], Tensor] = {}


def ticket(device: torch.device) -> Tensor:
    """int32 [1] at zero, by which the last block of a launch knows itself; that block puts it back to zero.

    One per stream: launches on one stream never overlap. Under graph capture a fresh one, zeroed in the graph.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


def launch(op: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args), counted under `op`."""
    launches[op] += 1
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
    if device is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def blocks_of(n: int, block: int) -> int:
    return -(-n // block)


def power_of_2(n: int) -> int:
    """The next power of two at or above n >= 1."""
    return 1 << (n - 1).bit_length()


# -- device functions shared by the kernels ------------------------------------------------------------------------


@jit
def rounded(value, dtype: tl.constexpr, emulate: tl.constexpr):  # type: ignore[name-defined]
    """fp32 -> dtype, to nearest even. Triton's interpreter truncates to bf16, hence `emulate`, its integer form."""
    if emulate and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        near = tl.where(value == value, near, 0x7FC0)
        return near.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@jit
def total(value):
    """Sum of all elements: tl.sum, whose type a checker takes for a tuple too."""
    return tl.sum(value)


@jit
def finite(value):
    """torch.nan_to_num in fp32: NaN -> 0, infinities -> the largest finite value."""
    value = tl.where(value == value, value, 0.0)
    return tl.minimum(tl.maximum(value, -3.4028234663852886e38), 3.4028234663852886e38)


@jit
def last_block(counter_ptr, programs):
    """Whether this program is the last of `programs` to arrive here. What the others stored before is then visible.

    The last one puts the counter back, so the next launch (or graph replay) finds zero.
    """
    tl.debug_barrier()  # all threads' stores come before thread 0's release
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    last = arrived == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
