"""Joint attention with backward over whichever library is the fastest that really works: softmax(q k^T scale + mask) v.

| name        | what runs                                            | masks | torch.compile(fullgraph=True)      |
|-------------|------------------------------------------------------|-------|------------------------------------|
| `fa3`       | FlashAttention-3: flash_attn_interface, or the       | no    | builds that register an op for it  |
|             | forward-only fa3_fwd_interface                       |       |                                    |
| `cudnn`     | torch's SDPA on cuDNN                                | yes   | yes                                |
| `flash`     | torch's SDPA on FlashAttention-2, or its CPU form    | CPU   | yes                                |
| `fa2`       | FlashAttention-2: flash_attn                         | no    | versions that register an op       |
| `xformers`  | xformers.ops.memory_efficient_attention              | no    | no                                 |
| `efficient` | torch's SDPA, memory-efficient                       | yes   | yes                                |
| `math`      | torch's SDPA, the formula itself                     | yes   | yes                                |
| `torch`     | torch's SDPA as torch chooses; what a CPU runs       | yes   | yes                                |

A backend is taken only after it has run forward and, where gradients are needed, backward on tiny tensors of the same
kind with values that agree with fp64 (_attention_probe.py). That happens once per `Key`, and costs a host sync then.
Nothing but torch is imported before it is needed.
"""

from __future__ import annotations

import logging
import operator
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from senseflow_kernels import _attention_probe as probe
from senseflow_kernels._attention_probe import PACKAGES, Key, Reason, package
from senseflow_kernels._launch import Unavailable, log

BACKENDS = ("fa3", "cudnn", "flash", "fa2", "xformers", "efficient", "math", "torch")
# First that works, by major compute capability. Published rates on an H100 at 4k tokens, bf16, TFLOP/s forward and
# backward: head size 128: FA3 632 and 542, cuDNN 631 and 499, FA2 329 and 310; head size 64: FA3 476 and 422, cuDNN
# 408 and 395, FA2 321 and 264. `pytest bench/test_attention.py` measures them; its order is to replace this one.
HOPPER = ("fa3", "cudnn", "flash", "fa2", "xformers", "efficient", "math")
BLACKWELL = ("cudnn", "flash", "fa2", "xformers", "efficient", "math")  # FA3 has no kernels for it
OTHERS = ("flash", "fa2", "cudnn", "xformers", "efficient", "math")
NOT_CUDA = ("torch", "math")

_forced = os.environ.get("SENSEFLOW_ATTENTION", "auto")
# Of the `with attention_backend` in force, the last entered at the end. Of the process, not of a thread: a backward,
# which runs a checkpointed forward again, has a thread of its own.
_inside: list[list[str]] = []
_choices: dict[tuple[str, tuple], str] = {}
_verdicts: dict[tuple[str, Key], Reason | None] = {}
_lock = threading.RLock()


# -- the choice ----------------------------------------------------------------------------------------------------


def order_of(key: Key) -> tuple[str, ...]:
    """Names by preference."""
    if key.device.type != "cuda":
        return NOT_CUDA
    major = key.capability[0]
    return HOPPER if major == 9 else BLACKWELL if major >= 10 else OTHERS


def _verdict(name: str, key: Key) -> Reason | None:
    """Why the backend cannot be used for the key; None where it can. Looked up, or found out and kept."""
    if (name, key) not in _verdicts:
        reason = probe.reason_against(name, key)
        if reason is None and name in PACKAGES:
            _functions[name] = getattr(package(name), PACKAGES[name].function)
        _verdicts[name, key] = reason or probe.run(_run, name, key)
    return _verdicts[name, key]


def _choose(forced: str, *kind: Any) -> str:
    """The backend's name for Key(*kind). Raises Unavailable where what is forced cannot run."""
    found = _choices.get((forced, kind))
    if found is None:
        key = Key(*kind)
        if key.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"attention for {key} must have run once before a CUDA graph captures it")
        with _lock:
            found = _search(forced, key)
            if (forced, kind) not in _choices:
                _choices[forced, kind] = found
    return found


# Traced code reads the answer: nothing of the search enters the graph. It is what
# torch.compiler.assume_constant_result sets, whose call would import torch._dynamo, as long an import as torch's.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _search(forced: str, key: Key) -> str:
    against: dict[str, Reason] = {}
    for name in order_of(key) if forced == "auto" else (forced,):
        reason = _verdict(name, key)
        if reason is None:
            # A warning where something is broken that the user may believe in use.
            level = logging.WARNING if any(r.fault for r in against.values()) else logging.INFO
            skipped = "".join(f"; not {other}: {why.text}" for other, why in against.items())
            log.log(level, "attention runs on %s for %s%s", name, key, skipped)
            return name
        against[name] = reason
    if forced == "auto":
        raise Unavailable(f"no attention backend runs for {key}: {_listed(against)}")
    can = [name for name in BACKENDS if name != forced and _verdict(name, key) is None]
    raise Unavailable(
        f"attention backend {forced!r} cannot run for {key}: {against[forced].text}; can: {', '.join(can)}"
    )


def _listed(against: dict[str, Reason]) -> str:
    return "; ".join(f"{name}: {reason.text}" for name, reason in against.items())


def known(name: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"attention backend {name!r} is unknown: allowed is auto, {', '.join(BACKENDS)}")
    return name


known(_forced)


# -- the backends --------------------------------------------------------------------------------------------------

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


_functions: dict[str, Callable[..., Any]] = {}  # of the packages; filled by _verdict, so before traced code looks


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """out [B, N, H, D] of one backend."""
    if name == "torch":
        return _sdpa(q, k, v, mask, scale)
    if name in _SDPA:
        with sdpa_kernel(_SDPA[name]):
            return _sdpa(q, k, v, mask, scale)
    if name == "xformers":
        return _functions[name](q, k, v, scale=scale)
    out = _functions[name](q, k, v, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out  # older builds of FA3 return (out, logsumexp)


# -- public --------------------------------------------------------------------------------------------------------


def set_attention_backend(name: str) -> None:
    """From now on every call of this process runs on it, but for those inside a `with attention_backend`; "auto"
    chooses again. Also SENSEFLOW_ATTENTION.

    Raises ValueError for an unknown name, Unavailable where its package is not installed.
    """
    global _forced
    _installed(name)
    _forced = name


def _installed(name: str) -> None:
    missing = {other: found for other in PACKAGES if isinstance(found := package(other), Reason)}
    if known(name) in missing:
        here = ", ".join(["auto", *(other for other in BACKENDS if other not in missing)])
        raise Unavailable(f"attention backend {name!r} cannot run: {missing[name].text}; allowed: {here}")


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Inside every call of this process runs on it, those of other threads too; the last one entered holds. Errors as
    of `set_attention_backend`. With activation checkpointing the backward belongs inside.
    """
    _installed(name)
    entry = [name]  # found again by identity, for two threads may leave in either order
    with _lock:
        _inside.append(entry)
    try:
        yield
    finally:
        with _lock:
            _inside[:] = [other for other in _inside if other is not entry]


def available_backends(
    device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, *,
    heads: int = 24, tokens: int = 4608, mask: bool = False, grad: bool = True,
) -> dict[str, str | None]:  # fmt: skip
    """Every backend and why it cannot run for such tensors, None where it can; those of the automatic choice first.

    Probes what was not yet probed, so it takes a moment.
    """
    device = torch.empty(0, device=device).device  # "cuda" with its index
    key = Key(device, dtype, *_shape_class(tokens, tokens, heads, head_dim), mask, grad, False)
    names = dict.fromkeys((*order_of(key), *BACKENDS))
    with _lock:
        return {name: reason and reason.text for name in names for reason in [_verdict(name, key)]}


def _shape_class(rows: int, columns: int, heads: int, head_dim: int) -> tuple[int, bool, bool, bool, str]:
    """Key's fields from head_dim to remainder; `if` and index() make constants of what torch.compile has as symbols."""
    rest = columns % 128
    remainder = "0" if rest == 0 else "64" if rest == 64 else "other"
    few_heads, one_row, long = [True if fact else False for fact in (heads < 8, rows == 1, columns > 1024)]  # noqa: SIM210
    return operator.index(head_dim), few_heads, one_row, long, remainder


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be [B, N, H, D], k and v [B, M, H, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, heads or head size")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None and mask.requires_grad:
        raise ValueError("mask must not require grad: most backends would lose its gradient")


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T scale + mask) v, [B, N, H, D] and contiguous, so that `.flatten(2)` is a view.

    q: [B, N, H, D]; k, v: [B, M, H, D], one dtype, any strides (the last dim is copied where it is not contiguous).
    mask: bool (True takes part) or additive, broadcastable to [B, H, N, M], without gradient; a row that sees nothing
    is the backend's own affair. scale: D^-0.5 unless told. backend: a name for this call alone, above
    `attention_backend` and SENSEFLOW_ATTENTION. Under autocast the inputs are cast as torch's SDPA would. The first
    call of a kind probes (see the module). Raises ValueError for other shapes, dtypes or names, Unavailable where the
    named backend cannot run, with the reason and those that can.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        lower = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(lower), k.to(lower), v.to(lower)
    _check(q, k, v, mask)
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if mask is not None and mask.dtype != torch.bool:
        # cuDNN reads a mask of another dtype as if it were q's: pytorch#191612
        mask = mask.to(q.dtype)
    if q.is_meta:  # shapes alone, of any backend
        return _sdpa(q, k, v, mask, scale).contiguous()
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    forced = _inside[-1][0] if _inside else _forced
    name = _choose(
        forced if backend is None else known(backend), q.device, q.dtype,
        *_shape_class(q.shape[1], k.shape[1], q.shape[2], q.shape[3]), mask is not None, grad,
        torch.compiler.is_compiling(),
    )  # fmt: skip
    return _run(name, q, k, v, mask, scale).contiguous()
