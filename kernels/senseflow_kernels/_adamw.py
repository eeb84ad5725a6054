"""AdamW's update of many tensors with IDA's phi and the EMA: in torch, and the launch of csrc's. See adamw.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from senseflow_kernels import _eight, _ext
from senseflow_kernels._bf16 import join_fp32, random_bits, round_stochastic, split_fp32


class Part(NamedTuple):
    """Tensors that one launch takes: flat, of one device and step, all lists as long as theta's or empty."""

    lists: dict[str, list[Tensor]]  # by the names of _ext.FIELDS
    ids: list[int]
    starts: list[int]
    blocks: list[int]  # of 8-bit moments, else 0
    step: Tensor


class Scalars(NamedTuple):
    """0-d, of one update. weights: 1 - lam and 1 - decay. grad_scale multiplies the gradients."""

    lr: float | Tensor
    lam: float | Tensor
    ema_decay: float | Tensor
    grad_scale: float | Tensor
    found_inf: Tensor | None


def on_device(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0-d; a number without a copy from the host, which waits and which no graph captures."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


# -- torch reference -----------------------------------------------------------------------------------------------


def adam_scalars(group: dict[str, Any], lr: float | Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(decay of theta, step size, correction of the root), fp32: in fp64 first, as torch.optim.AdamW has them."""
    (beta1, beta2), step = group["betas"], step.double()
    lr = on_device(lr, step.device, torch.float64)
    decay, size = 1 - lr * group["weight_decay"], -(lr / (1 - beta1**step))
    return decay.float(), size.float(), (1 - beta2**step).sqrt().float()


def adamw_reference(part: Part, group: dict[str, Any], mode: str, seed: int, s: Scalars) -> None:
    """One update in torch. part.step is this update's number, from 1 on; nothing changes where found_inf is not 0."""
    x, (beta1, beta2) = part.lists, group["betas"]
    decay, size, correction = adam_scalars(group, s.lr, part.step)
    device = part.step.device

    def number(value: float | Tensor) -> Tensor:
        return on_device(value, device, torch.float64)

    weights = dict(phi=(1 - number(s.lam)).float(), ema=(1 - number(s.ema_decay)).float())
    scale = number(s.grad_scale).float()
    for i in range(len(x["theta"])):

        def bits(name: str, n: int, i: int = i) -> Tensor:
            stream = (seed ^ _ext.STREAMS[name] << 62) % 2**64
            return random_bits(n, part.starts[i], part.ids[i], stream, part.step.long())

        def read(name: str, i: int = i) -> Tensor:
            low = x.get(f"{name}_low")
            if x[name][i].dtype == torch.uint8:
                return _eight.decode(x[name][i], x[f"{name}_exponent"][i], name)
            return join_fp32(x[name][i], low[i]) if low else x[name][i].float()

        def keep(name: str, value: Tensor, i: int = i) -> None:
            kept, low = x[name][i], x.get(f"{name}_low")
            if kept.dtype == torch.uint8:
                exponents = x[f"{name}_exponent"][i]
                new = _eight.encode(value, name, part.blocks[i], bits(name, len(kept)))
                for old, t in zip((kept, exponents), new, strict=True):
                    old.copy_(t if s.found_inf is None else torch.where(s.found_inf != 0, old, t))
                return
            if s.found_inf is not None:
                value = torch.where(s.found_inf != 0, read(name), value)
            if low:
                high, rest = split_fp32(value)
                kept.copy_(high)
                low[i].copy_(rest)
            elif mode == "stochastic" and kept.dtype == torch.bfloat16:
                kept.copy_(round_stochastic(value, bits(name, len(kept))))
            else:
                kept.copy_(value)

        grad = x["grad"][i].float() * scale
        m = torch.lerp(read("m"), grad, 1 - beta1)
        v = (read("v") * beta2).addcmul_(grad, grad, value=1 - beta2)
        root = v.double().sqrt().float() / correction + group["eps"]  # torch's fp32 root may be an ulp off on a CPU
        theta = read("theta") * decay + size * m / root
        for name, value in (("m", m), ("v", v), ("theta", theta)):
            keep(name, value)
        for name, weight in weights.items():
            if x[name] and not (weight.device.type == "cpu" and weight == 0):
                value = read(name)
                keep(name, torch.where(weight == 0, value, torch.lerp(value, read("theta"), weight)))


# -- launches ------------------------------------------------------------------------------------------------------


class Plan:
    """csrc's table of one part; made again where an address has changed (an allocator repeats those of gradients)."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[int]] = {}
        self.rows: Any = None
        self.programs: Any = None

    def at(self, part: Part, random: bool) -> Plan:
        addresses = {name: [t.data_ptr() for t in tensors] for name, tensors in part.lists.items()}
        if addresses != self.addresses:
            names = tuple(_ext.STREAMS) if random else ()
            rows = _ext.rows_of(part.lists, names, part.ids, part.starts, part.blocks)
            device = part.lists["theta"][0].device
            self.programs = _ext.map_of(rows).to(device) if device.type != "cpu" else None
            self.rows, self.addresses = rows.to(device), addresses
        return self


def check_fractions(**values: float | Tensor) -> None:
    """Raises ValueError for a number outside [0, 1]; a tensor is not looked at, for that would wait for its device."""
    for name, value in values.items():
        if not isinstance(value, Tensor) and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def number_of(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else float(value)


def launch(plan: Plan, part: Part, group: dict[str, Any], seed: int, s: Scalars) -> None:
    (beta1, beta2), step = group["betas"], part.step
    same: dict[str, Any] = dict(
        op="adamw", beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"], seed=seed
    )
    if plan.rows.is_cuda:
        wide = dict(lr=s.lr, lam=s.lam, ema_decay=s.ema_decay)  # as a CPU takes them, or the two differ in a bit
        tensors: dict[str, Tensor | None] = {k: on_device(v, step.device, torch.float64) for k, v in wide.items()}
        tensors["grad_scale"] = on_device(s.grad_scale, step.device, torch.float32)
        tensors["found_inf"] = None if s.found_inf is None else s.found_inf.to(step.device, torch.float32)
        _ext.update_cuda(plan.rows, plan.programs, scalars=tensors | dict(step=step.long()), **same)
    elif s.found_inf is None or not s.found_inf.item():
        weights = dict(phi_weight=1 - number_of(s.lam), ema_weight=1 - number_of(s.ema_decay))
        _ext.update_cpu(
            plan.rows, lr=number_of(s.lr), grad_scale=number_of(s.grad_scale), step=int(step), **weights, **same
        )
