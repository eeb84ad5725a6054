"""Whether an attention backend may be trusted with a kind of tensor: what is known against it, then a trial.

The trial is run in a thread of its own: grad mode, autocast, saved-tensor hooks (activation checkpointing counts what
is saved), dispatch modes and the current stream belong to a thread, so none of the caller's touch it.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Package(NamedTuple):
    """modules: the first that can be imported; op: (namespace, name) that it registers where torch.compile can trace
    its function."""

    modules: tuple[str, ...]
    function: str
    op: tuple[str, str] | None


PACKAGES = {
    # the second is the PyPI package fa3-fwd: FA3's forward alone, enough where no gradient is needed
    "fa3": Package(
        ("flash_attn_interface", "fa3_fwd_interface"), "flash_attn_func", ("flash_attn_3", "_flash_attn_forward")
    ),
    "fa2": Package(("flash_attn",), "flash_attn_func", ("flash_attn", "_flash_attn_forward")),
    "xformers": Package(("xformers.ops",), "memory_efficient_attention", None),
}
HALF = (torch.bfloat16, torch.float16)
# Of the 2-norm of each result. 16 bits: probabilities and dS are rounded to 2^-9 (2^-12 in fp16) of themselves, and
# dS = P (dP - delta) is a difference of larger numbers, up to 4 times here. fp32: room for TF32's 2^-11. What is
# wrong is wrong by about 1.
TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-7, torch.float32: 2**-7, torch.float64: 1e-10}


class Key(NamedTuple):
    """What a choice depends on: the tensors' kind, and the classes of shape that known faults depend on.

    long, remainder: of the number of keys, above 1024 and modulo 128; compiled: inside torch.compile.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    few_heads: bool
    one_row: bool
    long: bool
    remainder: str
    masked: bool
    grad: bool
    compiled: bool

    @property
    def capability(self) -> tuple[int, int]:
        return _capability(self.device)

    def __str__(self) -> str:
        kind = f"{self.device} {str(self.dtype).removeprefix('torch.')}, head size {self.head_dim}"
        length = f"{'more' if self.long else 'no more'} than 1024 keys, {self.remainder} modulo 128"
        marks = [word for word, on in self._marks() if on]
        return ", ".join([kind, length, *marks])

    def _marks(self) -> list[tuple[str, bool]]:
        return [
            ("one query", self.one_row), ("fewer than 8 heads", self.few_heads), ("masked", self.masked),
            ("forward and backward" if self.grad else "forward", True), ("compiled", self.compiled),
        ]  # fmt: skip


class Reason(NamedTuple):
    """fault: something present is broken, rather than absent or not meant for it."""

    text: str
    fault: bool = False


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def package(name: str) -> Any:
    """The first of the backend's modules that can be imported, or the Reason why none can."""
    errors: list[Exception] = []
    for module in PACKAGES[name].modules:
        try:
            return importlib.import_module(module)
        except Exception as why:  # a wheel built for another torch fails in many ways
            errors.append(why)
    broken = [e for e in errors if not isinstance(e, ModuleNotFoundError)]
    if broken:
        return Reason(f"{PACKAGES[name].modules[0]} does not import: {_line(broken[0])}", fault=True)
    return Reason(f"{PACKAGES[name].modules[0]} is not installed")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# -- what is known -------------------------------------------------------------------------------------------------


def reason_against(name: str, key: Key) -> Reason | None:
    """What speaks against it before anything has run."""
    if name in ("math", "torch") or (name == "flash" and key.device.type == "cpu"):
        return None
    if key.device.type != "cuda":
        return Reason(f"runs on CUDA alone, not on {key.device.type}")
    if name != "efficient" and name != "xformers" and key.dtype not in HALF:
        return Reason("takes bf16 and fp16 alone")
    if key.masked and name not in ("cudnn", "efficient"):
        return Reason("takes no mask here")
    if name == "fa3" and key.capability[0] not in (8, 9):
        return Reason("has no kernels for compute capability {}.{}".format(*key.capability))
    if name == "cudnn":
        return _cudnn_fault(key, torch.backends.cudnn.version() or 0)
    return _package_reason(name, key) if name in PACKAGES else None


def _package_reason(name: str, key: Key) -> Reason | None:
    found = package(name)
    if isinstance(found, Reason):
        return found
    op = PACKAGES[name].op
    if key.compiled and not (op and hasattr(getattr(torch.ops, op[0]), op[1])):
        return Reason("its calls would break torch.compile's graph: this version registers no op")
    return None


def _cudnn_fault(key: Key, version: int) -> Reason | None:
    """Faults that a trial would not survive (illegal accesses), would miss (graphs), or that come with rare values.

    version as torch.backends.cudnn.version() gives it: 91500 is 9.15.0.
    """
    said = f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}"
    odd = key.remainder != "0"
    if version in (91000, 91001):
        return Reason(f"{said} has wrong results in fp16 and bf16 (disabled by TransformerEngine too)", True)
    if 91300 <= version < 91500 and key.long:
        return Reason(f"{said} reads illegal addresses in CUDA graphs beyond 1024 keys (TransformerEngine#2344)", True)
    if version <= 91500 and key.grad and odd:
        text = "backward fails where the keys are no multiple of 128 (pytorch#169849, cudnn-frontend#160)"
        return Reason(f"{said}: {text}", True)
    if version < 92600 and key.grad and key.masked and key.remainder == "64":
        return Reason(f"{said}: NaN in dq with a mask and 64 modulo 128 keys (pytorch#196678)", True)
    if key.grad and key.one_row:
        return Reason(f"{said}: NaN in dk, dv with one query (cudnn-frontend#1072)", True)
    if key.capability[0] == 10 and key.few_heads:
        return Reason(f"{said}: wrong results with fewer than 8 heads on this GPU (pytorch#193893)", True)
    return None


# -- the trial -----------------------------------------------------------------------------------------------------

Run = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


def run(backend: Run, name: str, key: Key) -> Reason | None:
    """None where the backend's values on tiny tensors of the key's kind agree with fp64."""
    if key.device.type == "meta":  # shapes alone
        return None
    with ThreadPoolExecutor(1, thread_name_prefix="attention-probe") as apart:
        text = apart.submit(_trial, backend, name, key).result()
    return None if text is None else Reason(text, fault=True)


def _trial(backend: Run, name: str, key: Key) -> str | None:
    columns = (1152 if key.long else 128) + {"0": 0, "64": 64, "other": 77}[key.remainder]
    rows = 1 if key.one_row else columns
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int) -> Tensor:
        return torch.randn(1, tokens, 2, key.head_dim, generator=generator).to(key.device, key.dtype)

    q, k, v, dout = draw(rows), draw(columns), draw(columns), draw(rows)
    mask = None
    if key.masked:
        mask = torch.arange(columns, device=key.device).view(1, 1, 1, -1) < 3 * columns // 4
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if key.device.type == "cuda":
                with torch.cuda.device(key.device):
                    return _compared(backend, name, key, q, k, v, dout, mask)
            return _compared(backend, name, key, q, k, v, dout, mask)
        except Exception as why:
            # torch says in warnings why a kernel was not taken, then raises "No available kernel"
            notes = [str(w.message).split(" (Triggered")[0] for w in said if "not" in str(w.message)]
            return "; ".join([f"its trial raised {_line(why)}", *dict.fromkeys(notes)])


def _compared(
    backend: Run, name: str, key: Key, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None
) -> str | None:
    found = _results(lambda q, k, v: backend(name, q, k, v, mask, None), key.grad, q, k, v, dout)
    truth = _results(lambda q, k, v: formula(q, k, v, mask), key.grad, *(t.double() for t in (q, k, v, dout)))
    for what, value, exact in zip(("out", "dq", "dk", "dv"), found, truth, strict=False):
        if value.shape != exact.shape or value.dtype != key.dtype:
            return f"{what} of its trial has shape {tuple(value.shape)} and dtype {value.dtype}"
        error = ((value.double() - exact).norm() / exact.norm()).item()
        if not error <= TOLERANCE.get(key.dtype, 2**-5):
            return f"{what} of its trial is {error:.1e} off"
    # All logits at -120, below the logarithm of the smallest fp32 exponential: what pytorch#196678 needs to show.
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(key.head_dim)
    found = _results(lambda q, k, v: backend(name, q, k, v, mask, None), key.grad, q, k, v, dout)
    for what, value in zip(("out", "dq", "dk", "dv"), found, strict=False):
        if not value.isfinite().all():
            return f"{what} of its trial is not finite with logits around -120"
    return None


def _results(attend: Callable[..., Tensor], grad: bool, *tensors: Tensor) -> list[Tensor]:
    """[out] or [out, dq, dk, dv]."""
    *inputs, dout = (t.detach().clone() for t in tensors)
    with torch.set_grad_enabled(grad):
        for t in inputs:
            t.requires_grad_(grad)
        out = attend(*inputs)
        return [out.detach(), *(torch.autograd.grad(out, inputs, dout) if grad else [])]


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale + mask) v in the tensors' dtype, [B, N, H, D]: what every backend is compared with."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
