"""AdamW with IDA's phi and the EMA in the same pass: theta, its gradient and moments, phi and EMA are touched once.

The law is torch.optim.AdamW's in fp32, then phi <- lam phi + (1 - lam) theta (paper.md 1.3) and the same for the EMA,
both towards theta as it is kept. CPU tensors run csrc's C++ where it was built, CUDA tensors csrc's one launch where
SENSEFLOW_KERNELS=csrc asks for it, everything else the same roundings in torch, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from senseflow_kernels import _ext
from senseflow_kernels._bf16 import join_fp32, random_bits, round_stochastic, split_fp32
from senseflow_kernels._launch import fused
from senseflow_kernels._table import Group, local, paired, start_of
from senseflow_kernels.buckets import is_dense
from senseflow_kernels.lerp import MODES, lerp_reference

NO_KERNEL = "it has no Triton kernel (SENSEFLOW_KERNELS=csrc runs csrc's CUDA)"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What torch.optim.AdamW keeps in a param group beside its numbers, so that state dicts go both ways.
TORCH_GROUP = dict(
    amsgrad=False, foreach=None, maximize=False, capturable=False, differentiable=False, fused=True,
    decoupled_weight_decay=True,
)  # fmt: skip


class Part(NamedTuple):
    """Tensors that one launch takes: flat, of one device and step, all lists as long as theta's or empty."""

    lists: dict[str, list[Tensor]]  # by the names of _ext.FIELDS, and theta_low
    ids: list[int]
    starts: list[int]
    step: Tensor


class Scalars(NamedTuple):
    """0-d, of one update. weights: 1 - lam and 1 - decay. grad_scale multiplies the gradients."""

    lr: float | Tensor
    lam: float | Tensor
    ema_decay: float | Tensor
    grad_scale: float | Tensor
    found_inf: Tensor | None


# -- torch reference -----------------------------------------------------------------------------------------------


def adam_scalars(group: dict[str, Any], lr: float | Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(decay of theta, step size, correction of the root), fp32: in fp64 first, as torch.optim.AdamW has them."""
    (beta1, beta2), step = group["betas"], step.double()
    lr = torch.as_tensor(lr, dtype=torch.float64, device=step.device)
    decay, size = 1 - lr * group["weight_decay"], -(lr / (1 - beta1**step))
    return decay.float(), size.float(), (1 - beta2**step).sqrt().float()


def adamw_reference(part: Part, group: dict[str, Any], mode: str, seed: int, s: Scalars) -> None:
    """One update in torch. part.step is this update's number, from 1 on; nothing changes where found_inf is not 0."""
    x, (beta1, beta2) = part.lists, group["betas"]
    decay, size, correction = adam_scalars(group, s.lr, part.step)
    device = part.step.device

    def number(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=device)

    weights = dict(phi=(1 - number(s.lam)).float(), ema=(1 - number(s.ema_decay)).float())
    scale = number(s.grad_scale).float()
    for i in range(len(x["theta"])):

        def read(name: str, i: int = i) -> Tensor:
            low = x.get(f"{name}_low")
            return join_fp32(x[name][i], low[i]) if low else x[name][i].float()

        def keep(name: str, value: Tensor, i: int = i) -> None:
            kept, low = x[name][i], x.get(f"{name}_low")
            if s.found_inf is not None:
                value = torch.where(s.found_inf != 0, read(name), value)
            if low:
                high, rest = split_fp32(value)
                kept.copy_(high)
                low[i].copy_(rest)
            elif mode == "stochastic" and kept.dtype == torch.bfloat16:
                stream = (seed ^ _ext.STREAMS[name] << 62) % 2**64
                bits = random_bits(len(kept), part.starts[i], part.ids[i], stream, part.step.long())
                kept.copy_(round_stochastic(value, bits))
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
    """csrc's table of one part; made again where an address other than a gradient's has changed."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[int]] = {}
        self.rows: Any = None
        self.programs: Any = None

    def at(self, part: Part, random: bool) -> Plan:
        addresses = {name: [t.data_ptr() for t in tensors] for name, tensors in part.lists.items()}
        if addresses != self.addresses:
            rows = _ext.rows_of(part.lists, tuple(_ext.STREAMS) if random else (), part.ids, part.starts)
            device = part.lists["theta"][0].device
            self.programs = _ext.map_of(rows).to(device) if device.type != "cpu" else None
            self.rows, self.addresses = rows.to(device), addresses
        return self


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else float(value)


def _csrc(plan: Plan, part: Part, group: dict[str, Any], seed: int, s: Scalars) -> None:
    (beta1, beta2), step = group["betas"], part.step
    same: dict[str, Any] = dict(
        op="adamw", beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"], seed=seed
    )
    if plan.rows.is_cuda:
        scalars = dict(lr=s.lr, lam=s.lam, ema_decay=s.ema_decay, grad_scale=s.grad_scale, found_inf=s.found_inf)
        tensors: dict[str, Tensor | None] = {
            name: None if value is None else torch.as_tensor(value, dtype=torch.float32, device=step.device)
            for name, value in scalars.items()
        }
        _ext.update_cuda(plan.rows, plan.programs, scalars=tensors | dict(step=step.long()), **same)
    elif s.found_inf is None or not s.found_inf.item():
        weights = dict(phi_weight=1 - _number(s.lam), ema_weight=1 - _number(s.ema_decay))
        _ext.update_cpu(
            plan.rows, lr=_number(s.lr), grad_scale=_number(s.grad_scale), step=int(step), **weights, **same
        )


# -- public --------------------------------------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW on theta, IDA on phi and an EMA, in one pass over the parameters.

    params: tensors of fp32, bf16 or fp16, dense, or param groups of them; DTensors by their local part. precision says
    how bf16 parameters are kept; an fp32 one is exact in every mode:

        fp32        every parameter (and phi) is fp32
        nearest     rounded: steps below half a last place are lost
        stochastic  rounded at random, moments too: the mean is exact, and no bit depends on how tensors are sharded
        split       bf16 and an int16 `low` in the state: the fp32 run bit for bit (phi_low: phi's, as its own
                    optimizer's `lows()`)

    moments: dtype of exp_avg and exp_avg_sq, fp32 or bf16. phi, ema: tensors matched with the parameters by position,
    ema in fp32. seed: of the random roundings.

    The state dict is torch.optim.AdamW's (with `low` beside it where there is one): a checkpoint of either loads into
    the other. `found_inf` and `grad_scale` are torch.amp.GradScaler's protocol; a step with found_inf leaves
    everything bit for bit, the count too. Raises ValueError for what it cannot keep exactly.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, precision: str = "nearest",
        moments: torch.dtype = torch.float32, phi: Sequence[Tensor] | None = None,
        phi_low: Sequence[Tensor] | None = None, ema: Sequence[Tensor] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if precision not in MODES:
            raise ValueError(f"precision must be one of {MODES}, got {precision!r}")
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments are kept in fp32 or bf16, not {moments}")
        for name, value, end in (("lr", lr, None), ("eps", eps, None), ("weight_decay", weight_decay, None),
                                 ("beta1", betas[0], 1), ("beta2", betas[1], 1)):  # fmt: skip
            if not isinstance(value, Tensor) and not (value >= 0 and (end is None or value < end)):
                raise ValueError(f"{name} must be at least 0{'' if end is None else f' and below {end}'}, got {value}")
        self.precision, self.moments, self.seed = precision, moments, (seed + 2**63) % 2**64 - 2**63
        self._plans: dict[tuple, Plan] = {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, updates=0, **TORCH_GROUP))
        thetas = [p for group in self.param_groups for p in group["params"]]
        self._others: dict[str, list[Any]] = {}
        for name, tensors in (("phi", phi), ("phi_low", phi_low), ("ema", ema)):
            self._others[name] = [] if tensors is None else paired(name, list(tensors), thetas)
        if len({t.data_ptr() for t in self._others["phi"]}) < len(self._others["phi"]):
            raise ValueError("a tensor stands in phi twice (tied weights?): give it once")
        for i, p in enumerate(thetas):
            self._check(i, p)
        for group in self.param_groups:
            steps: dict[torch.device, Tensor] = {}
            for p in group["params"]:
                self._create(p, steps)

    def _check(self, i: int, p: Tensor) -> None:
        others = {name: tensors[i] for name, tensors in self._others.items() if tensors}
        t = local(p)
        if t.dtype not in FLOATS or not is_dense(t):
            raise ValueError(f"parameter {i} must be dense and of fp32, bf16 or fp16, got {t.dtype}, {t.stride()}")
        for name, other in dict(theta=t, **others).items():
            if name in ("theta", "phi") and other.dtype != torch.float32 and self.precision == "fp32":
                raise ValueError(f"parameter {i}: precision 'fp32' keeps {name} in fp32, this one is {other.dtype}")
            if other.stride() != t.stride():
                raise ValueError(f"parameter {i}: {name} must be laid out like it, got {other.stride()}")
        if "ema" in others and others["ema"].dtype != torch.float32:
            raise ValueError(f"parameter {i}: ema must be fp32, got {others['ema'].dtype}")
        if "phi" in others:
            half = self.precision == "split" and others["phi"].dtype == torch.bfloat16
            if half and (others.get("phi_low") is None or others["phi_low"].dtype != torch.int16):
                raise ValueError(f"parameter {i}: a bf16 phi has an int16 phi_low in precision 'split'")
        if self.precision == "stochastic" and (not t.is_contiguous() or start_of(p) is None):
            raise ValueError(f"parameter {i}: stochastic rounding needs a contiguous one, sharded on dim 0 alone")

    def _create(self, p: Tensor, steps: dict[torch.device, Tensor]) -> None:
        """The whole state at once: what does not fit fails before the first step."""
        if p.device not in steps:
            steps[p.device] = torch.zeros((), device=local(p).device)  # shared until gradients are missing
        state = dict(step=steps[p.device])
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, dtype=self.moments, requires_grad=False)
        if self.precision == "split" and p.dtype == torch.bfloat16:
            state["low"] = torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
        self.state[p] = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_others"):
            raise ValueError("the parameters of this optimizer are given once, when it is built")
        super().add_param_group(param_group)

    def lows(self) -> list[Tensor]:
        """The int16 halves of all parameters in their order: phi_low of an optimizer whose phi these are."""
        return [self.state[p]["low"] for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, lam: float | Tensor = 1.0, ema_decay: float | Tensor = 1.0,
        coefficient: float | Tensor = 1.0,
    ) -> Any:  # fmt: skip
        """One update. lam, ema_decay: phi and EMA stay where they are 1. coefficient: gradients are multiplied by it
        (clipping) without being written. All numbers or 0-d tensors, which are read on the device.

        A parameter without a gradient keeps its value, moments and count; its phi and EMA move all the same.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found, divisor = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        scale = coefficient if divisor is None else coefficient / divisor
        number = 0
        for group in self.param_groups:
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError("amsgrad and maximize are torch.optim.AdamW's alone")
            some = list(enumerate(group["params"], number))
            number += len(some)
            s = Scalars(group["lr"], lam, ema_decay, scale, found)
            self._count(some, found)
            group["updates"] += 1
            for key, part in self._parts(some).items():
                self._update(key, part, group, s)
        return loss

    def _count(self, some: list[tuple[int, Tensor]], found: Tensor | None) -> None:
        """Advances each count once. Parameters share one as long as they get their gradients together."""
        shared: dict[int, list[Tensor]] = {}
        for _, p in some:
            shared.setdefault(id(self.state[p]["step"]), []).append(p)
        for members in shared.values():
            moving = [p for p in members if p.grad is not None]
            if not moving:
                continue
            step = self.state[moving[0]]["step"]
            if len(moving) < len(members):
                step = step.clone()
                for p in moving:
                    self.state[p]["step"] = step
            step.add_(1 if found is None else (found == 0).to(step.device, step.dtype).reshape(()))

    def _parts(self, some: list[tuple[int, Tensor]]) -> dict[tuple, Part]:
        parts: dict[tuple, Part] = {}
        for i, p in some:
            state, theta = self.state[p], local(p.detach())
            mine = dict(theta=theta, theta_low=local(state["low"]) if "low" in state else None)
            mine |= {name: tensors[i] for name, tensors in self._others.items() if tensors}
            if mine.get("phi") is not None and mine["phi"].dtype != torch.bfloat16:
                mine["phi_low"] = None  # an fp32 phi is exact as it is
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise ValueError(f"parameter {i}: sparse gradients are not taken")
                grad = local(p.grad.detach())
                if grad.stride() != theta.stride():
                    grad = torch.empty_like(theta, dtype=grad.dtype).copy_(grad)
                mine |= dict(grad=grad, m=local(state["exp_avg"]), v=local(state["exp_avg_sq"]))
            kinds = tuple((name, t.dtype) for name, t in mine.items() if t is not None)
            key = (id(state["step"]), theta.device, kinds)
            if key not in parts:
                names = (*_ext.FIELDS, "theta_low")
                parts[key] = Part({name: [] for name in dict.fromkeys(names)}, [], [], state["step"])
            part = parts[key]
            for name, t in mine.items():
                if t is not None:
                    part.lists[name].append(t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,)))
            part.ids.append(i)
            part.starts.append((start_of(p) or 0) if self.precision == "stochastic" else 0)
        return parts

    def _update(self, key: tuple, part: Part, group: dict[str, Any], s: Scalars) -> None:
        x, random = part.lists, self.precision == "stochastic"
        if not x["grad"]:
            self._follow(part, group["updates"], s)
            return
        if _ext.takes(*(x[name][0] for name in ("theta", "grad", "phi") if x[name])):
            plan = self._plans.setdefault((*key[1:], *part.ids), Plan()).at(part, random)
            _csrc(plan, part, group, self.seed, s)
        else:
            _ = fused("adamw", x["theta"][0], limit=NO_KERNEL)  # says so once, refuses under strict
            adamw_reference(part, group, self.precision, self.seed, s)
        written = [t for name, tensors in x.items() if name != "grad" for t in tensors]
        torch.autograd.graph.increment_version(written)

    def _follow(self, part: Part, update: int, s: Scalars) -> None:
        """phi and EMA of parameters that got no gradient: towards theta as it stands. Their own count stands still, so
        random bits come from the group's number of updates."""
        x, random = part.lists, self.precision == "stochastic"
        still = False if s.found_inf is None else s.found_inf != 0
        for name, low, keep in (("phi", x["phi_low"], s.lam), ("ema", [], s.ema_decay)):
            if x[name]:
                device = x[name][0].device
                weight = (1 - torch.as_tensor(keep, dtype=torch.float64, device=device)).float()
                weight = weight.masked_fill(torch.as_tensor(still, device=device).reshape(()), 0)
                group = Group(
                    x[name], x["theta"], low, x["theta_low"], [], random and x[name][0].dtype == torch.bfloat16,
                    self.seed, part.ids, part.starts,
                )  # fmt: skip
                lerp_reference(group, weight, 0.0, torch.tensor(update, device=device))

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's layout, live tensors; a count of its own for each parameter, for torch adds to each."""
        whole = super().state_dict()
        whole["state"] = {i: {**state, "step": state["step"].clone()} for i, state in whole["state"].items()}
        return whole

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of torch.optim.AdamW. Keeps the dtypes of this optimizer (torch's own loading would cast
        fp32 moments to a bf16 parameter's); `low` is 0 where the saved state has none. Raises ValueError where
        parameters differ in number or shape."""
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        if len(saved) != len(mine):
            raise ValueError(f"the saved state is of {len(saved)} parameters, this optimizer has {len(mine)}")
        for i, (p, state) in enumerate(zip(mine, saved, strict=True)):
            for name in ("exp_avg", "exp_avg_sq", "low"):
                if name in state and state[name].shape != p.shape:
                    raise ValueError(f"parameter {i}: {name} is {tuple(state[name].shape)}, not {tuple(p.shape)}")
        kept = {p: self.state[p] for p in mine}
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        which = {p: g for g, group in enumerate(self.param_groups) for p in group["params"]}
        for group in self.param_groups:
            group.setdefault("updates", 0)
        shared: dict[tuple, Tensor] = {}
        for p, state in zip(mine, saved, strict=True):
            self.state[p] = kept[p]
            for name in ("exp_avg", "exp_avg_sq", "low"):
                if name in kept[p]:
                    kept[p][name].copy_(state[name]) if name in state else kept[p][name].zero_()
            count = float(state.get("step", 0))
            step = torch.tensor(count, device=kept[p]["step"].device)
            kept[p]["step"] = shared.setdefault((which[p], step.device, count), step)
