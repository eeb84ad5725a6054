"""csrc/'s libraries: AdamW, IDA and EMA of many tensors in one pass, in C++ on CPU tensors and in CUDA.

Plain C behind ctypes: what crosses is a table of addresses (`rows_of`), so one binary serves every torch, and a plan
keeps its table from step to step. The results are those of the torch forms bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow_kernels import _launch
from senseflow_kernels._launch import INTERPRET, launches, log

ABI = 3
# senseflow_field
FIELDS = ("phi", "phi_low", "theta", "theta_low", "ema", "grad", "m", "v", "m_exponent", "v_exponent")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # senseflow_dtype
EIGHT = {"m": 3, "v": 3}  # SENSEFLOW_EIGHT, of a uint8 moment
MODES = ("fp32", "nearest", "split", "stochastic")
CHUNK = 8192  # SENSEFLOW_CUDA_CHUNK
# Random bits of one parameter: phi's are random_bits' own, the others' those of another key.
STREAMS = {"phi": 0, "theta": 1, "m": 2, "v": 3}


class _Scalars(ctypes.Structure):
    """senseflow_scalars"""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale")),
        ("step", ctypes.c_int64), ("seed", ctypes.c_int64), ("phi_weight", ctypes.c_float),
        ("ema_weight", ctypes.c_float),
    ]  # fmt: skip


class _DeviceScalars(ctypes.Structure):
    """senseflow_device_scalars"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("lr", "lam", "ema_decay", "grad_scale", "found_inf", "step")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps", "weight_decay")),
        ("seed", ctypes.c_int64), ("phi_weight", ctypes.c_float), ("ema_weight", ctypes.c_float),
    ]  # fmt: skip


# -- the libraries -------------------------------------------------------------------------------------------------


@functools.cache
def _load(name: str) -> tuple[Any, str | None]:
    """(library, None) or (None, why not)."""
    path = Path(__file__).with_name(f"lib{name}.so")
    if not path.exists():
        return None, f"{path.name} was not built when the package was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    return library, None


def _other_version(library: Any, function: str, name: str) -> str | None:
    """Why a library must not be called: a build of another version, whose tables would be read wrongly."""
    abi = getattr(library, function)() if hasattr(library, function) else "none"
    if abi == ABI:
        return None
    return f"{name} is of another version of this package (ABI {abi}, not {ABI}): install again"


@functools.cache
def _cpu() -> tuple[Any, str | None]:
    library, reason = _load("senseflow_csrc")
    if library is None:
        return None, reason
    if reason := _other_version(library, "senseflow_abi", "libsenseflow_csrc.so"):
        return None, reason
    library.senseflow_cpu_isa.restype = ctypes.c_char_p
    pointer = ctypes.c_void_p
    library.senseflow_update_cpu.argtypes = [pointer, ctypes.c_int64, pointer, pointer, ctypes.c_char_p]
    log.info("csrc runs on CPU tensors with %s code and torch's threads", library.senseflow_cpu_isa().decode())
    return library, None


@functools.cache
def _cuda() -> tuple[Any, str | None]:
    library, reason = _load("senseflow_csrc_cuda")
    if library is not None:
        if reason := _other_version(library, "senseflow_cuda_abi", "libsenseflow_csrc_cuda.so"):
            return None, reason
        pointer = ctypes.c_void_p
        library.senseflow_update_cuda.argtypes = [pointer, pointer, ctypes.c_int64, pointer, pointer]
        log.info("csrc runs on CUDA tensors")
    return library, reason


@functools.cache
def _threads() -> ctypes.c_void_p:
    """torch_parallel_for of torch's stable C ABI: torch's own threads, as many as torch.set_num_threads says."""
    for suffix in ("so", "dylib"):
        path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
        if path.exists():
            return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p)
    log.warning("csrc runs on one thread: no libtorch_cpu in %s", Path(torch.__file__).parent / "lib")
    return ctypes.c_void_p()


def reason_against(device: torch.device | str = "cpu", alone: bool = False) -> str | None:
    """Why csrc does not run on tensors of the device, in words; None where it does. Loads the library. alone: for what
    has no other kernel, so that CUDA tensors need no SENSEFLOW_KERNELS=csrc."""
    kind = torch.device(device).type
    if _launch._torch_only:
        return "the torch path was asked for"
    if kind == "cpu":
        return "Triton's interpreter runs" if INTERPRET else _cpu()[1]
    if kind == "cuda":
        return _cuda()[1] if alone or _launch.PREFER_CSRC else "SENSEFLOW_KERNELS=csrc was not asked for"
    return f"csrc has nothing for {kind} tensors"


def takes(*tensors: Tensor, alone: bool = False) -> bool:
    """Whether csrc does an update of these: all on one device where it runs, in dtypes that it has."""
    return all(t.dtype in KINDS for t in tensors) and reason_against(tensors[0].device, alone) is None


def load_torch_ops() -> Any:
    """torch.ops.senseflow_csrc (torch's stable ABI), for exported programs. Raises OSError where it was not built."""
    torch.ops.load_library(str(Path(__file__).with_name("libsenseflow_csrc_torch.so")))
    return torch.ops.senseflow_csrc


# -- one update ----------------------------------------------------------------------------------------------------


def rows_of(
    tensors: Mapping[str, Sequence[Tensor]], random: Sequence[str] = (), parameter: Sequence[int] | None = None,
    start: Sequence[int] | None = None, blocks: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """The table of an update: int64 [tensors, 15] on the CPU, senseflow_row each.

    tensors: lists by name of FIELDS, each as long as theta's, or empty; all contiguous and on one device; they must
    outlive the table. random: names whose bf16 tensors are rounded at random. parameter, start: of the random numbers.
    blocks: of uint8 moments.
    Raises ValueError where a tensor is to be written twice.
    """
    theta = tensors["theta"]
    rows = []
    for i, t in enumerate(theta):
        row, kinds = [0] * len(FIELDS), 0
        for f, name in enumerate(FIELDS):
            if len(tensors.get(name, ())):
                other = tensors[name][i]
                row[f] = other.data_ptr()
                kind = EIGHT.get(name, 0) if other.dtype == torch.uint8 else KINDS.get(other.dtype, 0)
                kinds |= (kind | 8 * (name in random and other.dtype == torch.bfloat16)) << 4 * f
        rows.append(
            [
                *row,
                t.numel(),
                start[i] if start else 0,
                parameter[i] if parameter else i,
                kinds,
                blocks[i] if blocks else 0,
            ]
        )
    for name, field in (("phi", 0), ("theta", 2)) if len(tensors.get("grad", ())) else (("phi", 0),):
        written = [row[field] for row in rows if row[field] and row[len(FIELDS)]]
        if len(set(written)) < len(written):
            raise ValueError(f"a tensor stands in {name} twice (tied weights?): two threads would race for it")
    return torch.tensor(rows, dtype=torch.int64).view(-1, len(FIELDS) + 5)


def update_cpu(
    rows: Tensor, *, op: str, phi_weight: float = 0.0, ema_weight: float = 0.0, lr: float = 0.0, beta1: float = 0.0,
    beta2: float = 0.0, eps: float = 0.0, weight_decay: float = 0.0, grad_scale: float = 1.0, step: int = 0,
    seed: int = 0, isa: bytes | None = None,
) -> None:  # fmt: skip
    """One update of rows_of's tensors. weights: 1 - lam and 1 - decay. isa: another one than the best, to compare."""
    launches[op] += 1
    seed = (seed + 2**63) % 2**64 - 2**63
    scalars = _Scalars(lr, beta1, beta2, eps, weight_decay, grad_scale, step, seed, phi_weight, ema_weight)
    update = _cpu()[0].senseflow_update_cpu
    if update(rows.data_ptr(), len(rows), ctypes.addressof(scalars), _threads(), isa):
        raise ValueError(f"{op}: csrc refuses: a low half beside other than bf16, a gradient without moments, {isa}")


def map_of(rows: Tensor) -> Tensor:
    """int32 [chunks, 2]: (row, chunk) of all of a table's chunks, as a CUDA launch walks them."""
    n, start = rows[:, len(FIELDS)], rows[:, len(FIELDS) + 1]
    chunks = torch.where(n > 0, (n + start % 8 + CHUNK - 1) // CHUNK, 0)
    row = torch.repeat_interleave(torch.arange(len(rows)), chunks)
    chunk = torch.arange(len(row)) - (chunks.cumsum(0) - chunks)[row]
    return torch.stack((row, chunk), 1).int()


def update_cuda(
    rows: Tensor, programs: Tensor, *, op: str, scalars: Mapping[str, Tensor | None], phi_weight: float = 0.0,
    ema_weight: float = 0.0, beta1: float = 0.0, beta2: float = 0.0, eps: float = 0.0, weight_decay: float = 0.0,
    seed: int = 0,
) -> None:  # fmt: skip
    """As update_cpu in one launch on the current stream; rows and map_of's result on the device.

    scalars: lr, lam, ema_decay (fp64), grad_scale, found_inf (fp32) and step (int64), 0-d on the device, read there;
    None or missing: the weights given, 1, 0. Can be captured in a CUDA graph.
    """
    launches[op] += 1
    seed = (seed + 2**63) % 2**64 - 2**63
    fields = ("lr", "lam", "ema_decay", "grad_scale", "found_inf", "step")
    pointers = [None if (t := scalars.get(name)) is None else t.data_ptr() for name in fields]
    given = _DeviceScalars(*pointers, beta1, beta2, eps, weight_decay, seed, phi_weight, ema_weight)
    with torch.cuda.device(rows.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = _cuda()[0].senseflow_update_cuda(
            rows.data_ptr(), programs.data_ptr(), len(programs), ctypes.addressof(given), stream
        )
    if error:
        raise RuntimeError(f"{op}: CUDA error {error}")


# -- the operators, on CPU tensors ---------------------------------------------------------------------------------


def _check(mode: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    for name, tensors in lists.items():
        if len(tensors) not in (0, len(lists["theta"])):
            raise ValueError(f"theta has {len(lists['theta'])} tensors, {name} {len(tensors)}")
        for i, (t, other) in enumerate(zip(lists["theta"], tensors, strict=False)):
            if other.device.type != "cpu" or not other.is_contiguous() or other.numel() != t.numel():
                raise ValueError(f"{name}[{i}] must be contiguous, on the CPU and of theta's size")
            allowed = (torch.int16,) if name.endswith("_low") else tuple(KINDS)
            if other.dtype not in allowed:
                raise ValueError(f"{name}[{i}] is {other.dtype}, allowed is {allowed}")


def _written(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Behind autograd's back: a backward through the old values must still be refused."""
    torch.autograd.graph.increment_version([t for tensors in lists.values() for t in tensors])


@torch.no_grad()
def lerp_(
    phi: Sequence[Tensor], phi_low: Sequence[Tensor], theta: Sequence[Tensor], lam: Tensor, mode: str, seed: int,
    step: Tensor, parameter: Sequence[int], start: Sequence[int],
) -> None:  # fmt: skip
    """phi <- lam phi + (1 - lam) theta, in place, on CPU tensors; phi_low (int16, mode split) may be empty."""
    lists = dict(phi=phi, phi_low=phi_low, theta=theta)
    _check(mode, lists)
    rows = rows_of(lists, ("phi",) if mode == "stochastic" else (), parameter, start)
    update_cpu(rows, op="lerp", phi_weight=(1 - lam.double()).float().item(), step=int(step), seed=seed)
    _written(dict(phi=phi, phi_low=phi_low))


@torch.no_grad()
def adamw_(
    theta: Sequence[Tensor], theta_low: Sequence[Tensor], grad: Sequence[Tensor], m: Sequence[Tensor],
    v: Sequence[Tensor], phi: Sequence[Tensor], phi_low: Sequence[Tensor], ema: Sequence[Tensor], lr: Tensor,
    step: Tensor, lam: Tensor, ema_decay: Tensor, grad_scale: Tensor, found_inf: Tensor, beta1: float, beta2: float,
    eps: float, weight_decay: float, mode: str, seed: int, parameter: Sequence[int], start: Sequence[int],
) -> None:  # fmt: skip
    """torch.optim.AdamW on theta, then IDA of phi and the EMA towards it as it is kept, in one pass on CPU tensors.

    Empty lists are absent. step: of this update, from 1 on. Gradients are multiplied by grad_scale. Where found_inf is
    not 0 nothing changes. mode stochastic rounds bf16 theta, m, v and phi at random, each list from STREAMS of its own.
    """
    if found_inf.item():
        return
    lists = dict(theta=theta, theta_low=theta_low, grad=grad, m=m, v=v, phi=phi, phi_low=phi_low, ema=ema)
    _check(mode, lists)
    update_cpu(
        rows_of(lists, tuple(STREAMS) if mode == "stochastic" else (), parameter, start),
        op="adamw", seed=seed, step=int(step),
        phi_weight=(1 - lam.double()).float().item(), ema_weight=(1 - ema_decay.double()).float().item(),
        lr=lr.item(), grad_scale=grad_scale.item(), beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    _written({name: tensors for name, tensors in lists.items() if name != "grad"})
