"""What tensors on the meta device, which have shapes and no numbers, stand in for: those of a GPU, or of the CPU.

torch.autocast does not know the meta device, and attention there would run by matrix products that no GPU makes. These
two modes put both right, so that a forward and backward on meta tensors makes the tensors that the device would.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# CUDA's autocast by names of functions (torch's documentation, "Autocast Op Reference"), what these networks use of it.
LOWER = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "addmm", "addbmm", "baddbmm", "conv1d", "conv2d",
    "conv3d", "conv_transpose2d", "scaled_dot_product_attention",
}  # fmt: skip
FP32 = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "softplus", "mse_loss", "l1_loss", "pow",
    "__pow__", "rsqrt", "reciprocal", "exp", "log", "norm", "sum", "prod", "cumsum", "cumprod",
}  # fmt: skip
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):  # 2.14 has it there, 2.11 has not; between: not seen
    FP32.add("rms_norm")
WIDEST = {"cat", "stack", "addcmul", "addcdiv", "dot", "index_put", "scatter_add"}

_active: list[_Mode] = []


class _Mode(TorchFunctionMode):
    """One that `again` knows while it is on."""

    def __enter__(self) -> Any:
        _active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        super().__exit__(*error)


def _cast(value: Any, to: Any) -> Any:
    if isinstance(value, Tensor):
        return to(value)
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(_cast(v, to) for v in value)
    return value


def _full(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _dtypes(values: Any) -> set[torch.dtype]:
    found: set[torch.dtype] = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.dtype)
        elif isinstance(value, (list, tuple)):
            found |= _dtypes(value)
    return found


class Autocast(_Mode):
    """CUDA's autocast to `dtype` for meta tensors; like it, keeps the cast of an fp32 weight until its end."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    def __exit__(self, *error: Any) -> None:
        self._weights.clear()
        super().__exit__(*error)

    def _lower(self, t: Tensor) -> Tensor:
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16) or t.dtype == self.dtype:
            return t
        if not (t.is_leaf and t.requires_grad and t.dtype == torch.float32):
            return t.to(self.dtype)
        if id(t) not in self._weights:
            self._weights[id(t)] = (t, t.to(self.dtype))
        return self._weights[id(t)][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        to = None
        if name in LOWER:
            to = self._lower
        elif name in FP32 and kwargs.get("dtype") is None:
            to = _full
        elif name in WIDEST:
            to = _full if torch.float32 in _dtypes((*args, *kwargs.values())) else None
        if to is not None:
            args, kwargs = _cast(tuple(args), to), {k: _cast(v, to) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def exact(x: Tensor) -> AbstractContextManager[object]:
    """Inside, on x's device, no autocast; on the meta device there is none but `Autocast`."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def again() -> list[AbstractContextManager[Any]]:
    """The modes that are on, to be entered once more, outermost first: torch takes them off around a backward."""
    return [Autocast(m.dtype) if isinstance(m, Autocast) else StandsFor(m.device_type) for m in _active
            if isinstance(m, (Autocast, StandsFor))]  # fmt: skip


class Uninitialised(TorchFunctionMode):
    """Inside, filling a meta tensor does nothing, which saves most of the time that building a network takes."""

    FILLS = ("normal_", "uniform_", "trunc_normal_", "fill_", "zero_", "copy_", "mul_", "add_", "clamp_", "erfinv_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in self.FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **(kwargs or {}))


class StandsFor(_Mode):
    """Inside, attention of meta tensors makes what it makes on a device of this type: "cuda" (any of the memory-saving
    kernels: output and one fp32 a row and head) or "cpu"."""

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k, v = (given[name] for name in names[:3])
        if not q.is_meta:
            return func(*args, **kwargs)
        if self.device_type == "cpu":
            mask = given.get("attn_mask")
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
