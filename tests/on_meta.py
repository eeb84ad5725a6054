"""A run moved to torch's meta device: shapes and no numbers, so whatever the host would wait for cannot be had."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from senseflow.data.batches import Batch
from senseflow.models.adapter import Condition
from senseflow.steps import Parts

META = torch.device("meta")
# Their results, or the sizes of these, depend on numbers: the host waits for the device.
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave.Tensor",
}  # fmt: skip


class HostSync(AssertionError):
    """The host would wait for the device."""


class _Made(TorchFunctionMode):
    """Tensors that are made of the host's numbers on the device: a copy that waits. torch.full is a kernel instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device, of_tensor = torch.device(kwargs.get("device") or "cpu"), isinstance(args[0], Tensor)
            if device == META and not (of_tensor and args[0].device == META):
                raise HostSync(f"{func.__name__} of host data on the device")
        return func(*args, **kwargs)


class NoSync(TorchDispatchMode):
    """Inside: HostSync where the host would wait for the meta device, or copy to it from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.seen = _Made(), 0

    def __enter__(self) -> NoSync:
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.made.__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = [t for t in tensors if t.device == META]
        self.seen += bool(on_device)
        packet, name = func.overloadpacket.__name__, str(func).removeprefix("aten.")
        if on_device and (packet in WAITS or name in WAITS):
            raise HostSync(f"{func} of a device tensor")
        if packet.startswith("index") and any(t.dtype == torch.bool for t in on_device[1:]) and "fill" not in packet:
            indices = [t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor)]
            if any(t.dtype == torch.bool for t in indices):
                raise HostSync(f"{func} by a mask, whose size is the device's to know")
        sized = [t for t in tensors if t.dim()]
        if on_device and any(t.device != META for t in sized):
            raise HostSync(f"{func} of a device tensor and a host one {[tuple(t.shape) for t in sized]}")
        target = kwargs.get("device")
        if packet in ("_to_copy", "copy_") and tensors:
            there = torch.device(target) if target is not None else tensors[0].device
            if any((t.device == META) != (there == META) for t in tensors):
                raise HostSync(f"{func}: a copy from {tensors[-1].device} to {there}")
        return func(*args, **kwargs)


def to_meta(value: Any) -> Any:
    """The same on the meta device: modules and tensors, in dataclasses too; everything else as it is."""
    if isinstance(value, nn.Module | Tensor):
        return value.to(META)
    if isinstance(value, Condition | Batch):
        return replace(value, **{f.name: to_meta(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, list):
        return [to_meta(v) for v in value]
    return value


def parts_on_meta(parts: Parts) -> Parts:
    """parts, its adapter too, on the meta device, in place; encoded prompts stay what they were."""
    a: Any = parts.adapter
    empty = a.uncond(1)
    for name in ("student", "fake", "teacher", "disc", "vfm"):
        if getattr(parts, name) is not None:
            setattr(parts, name, to_meta(getattr(parts, name)))
    a.device = META
    if a.vae is not None:
        (a.vae.inner if hasattr(a.vae, "inner") else a.vae).to(META)
    if empty is not None and "_empty" in vars(a):
        a._empty = to_meta(empty)
    if parts.curve is not None:
        parts.curve = type(parts.curve)(to_meta(parts.curve.sigmas), to_meta(parts.curve.xi))
    return parts
