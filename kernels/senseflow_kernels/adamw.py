"""AdamW with IDA's phi and the EMA in the same pass: theta, its gradient and moments, phi and EMA are touched once.

The law is torch.optim.AdamW's in fp32, then phi <- lam phi + (1 - lam) theta (paper.md 1.3) and the same for the EMA,
both towards theta as it is kept. CPU and CUDA tensors run csrc's C++ and its one launch where these were built,
everything else the same roundings in torch, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from senseflow_kernels import _eight, _ext
from senseflow_kernels._adamw import Part, Plan, Scalars, adamw_reference, check_fractions, launch, on_device
from senseflow_kernels._in_backward import InBackward
from senseflow_kernels._launch import fused
from senseflow_kernels._table import Group, local, paired, start_of
from senseflow_kernels.buckets import is_dense, is_dtensor
from senseflow_kernels.lerp import MODES, lerp_reference

NO_KERNEL = "it has no Triton kernel, and csrc's CUDA was not built (install with nvcc)"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = (torch.float32, torch.bfloat16, "8bit")
# Of a state: what torch.optim.AdamW calls them, and what a launch does.
NAMES = {"exp_avg": "m", "exp_avg_sq": "v"}
# What torch.optim.AdamW keeps in a param group beside its numbers, so that state dicts go both ways.
TORCH_GROUP = dict(
    amsgrad=False, foreach=None, maximize=False, capturable=False, differentiable=False, fused=True,
    decoupled_weight_decay=True,
)  # fmt: skip


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW on theta, IDA on phi and an EMA, in one pass over the parameters.

    params: tensors of fp32, bf16 or fp16, dense, or param groups of them; DTensors by their local part. precision says
    how bf16 parameters are kept; an fp32 one is exact in every mode:

        fp32        every parameter (and phi) is fp32
        nearest     rounded: steps below half a last place are lost
        stochastic  rounded at random, moments too: the mean is exact, and no bit depends on how tensors are sharded
        split       bf16 and an int16 `low` in the state: the fp32 run bit for bit (phi_low: phi's, as its own
                    optimizer's `lows()`)

    moments: dtype of exp_avg and exp_avg_sq, fp32 or bf16, or "8bit": 8-bit floats that share an exponent in blocks of
    64 to 256, rounded at random (_eight.py says how, and which small parameters keep fp32); a block lies within an
    index of dim 0, so no bit depends on how tensors are sharded. phi, ema: tensors matched with the parameters by
    position, ema in fp32. seed: of the random roundings.

    The state dict is torch.optim.AdamW's (with `low` beside it where there is one): a checkpoint of either loads into
    the other; 8-bit moments as they are, or in fp32 by `torch_state_dict`. `found_inf` and `grad_scale` are
    torch.amp.GradScaler's protocol; a step with found_inf leaves everything bit for bit, the count too. Raises
    ValueError for what it cannot keep exactly.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, precision: str = "nearest",
        moments: torch.dtype | str = torch.float32, phi: Sequence[Tensor] | None = None,
        phi_low: Sequence[Tensor | None] | None = None, ema: Sequence[Tensor] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if precision not in MODES:
            raise ValueError(f"precision must be one of {MODES}, got {precision!r}")
        if moments not in MOMENTS:
            raise ValueError(f"moments are kept in fp32 or bf16, or in '8bit', not {moments}")
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
        for name in ("phi", "ema"):
            some = [t for t in self._others[name] if t.numel() and not t.is_meta]  # meta tensors have no address
            if len({t.data_ptr() for t in some}) < len(some):
                raise ValueError(f"a tensor stands in {name} twice (tied weights?): give it once")
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
        what = "stochastic rounding" if self.precision == "stochastic" else ""
        what = what or ("8-bit moments" if self.moments == "8bit" and _eight.block_of(p.shape) else "")
        if what and (not t.is_contiguous() or start_of(p) is None):
            raise ValueError(f"parameter {i}: {what}: needs a contiguous one, sharded on dim 0 alone")

    def _create(self, p: Tensor, steps: dict[torch.device, Tensor]) -> None:
        """The whole state at once: what does not fit fails before the first step."""
        if p.device not in steps:
            steps[p.device] = torch.zeros((), device=local(p).device)  # shared until gradients are missing
        state = dict(step=steps[p.device])
        block = _eight.block_of(p.shape) if self.moments == "8bit" else 0
        dtype = torch.uint8 if block else torch.float32 if isinstance(self.moments, str) else self.moments
        for name in NAMES:
            state[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            if block:
                state[f"{name}_exponent"] = _exponents(p, block)
        if self.precision == "split" and p.dtype == torch.bfloat16:
            state["low"] = torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
        self.state[p] = state

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle; tables of addresses are made again."""
        mine = dict(precision=self.precision, moments=self.moments, seed=self.seed, _others=self._others)
        return super().__getstate__() | mine

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_others"):
            raise ValueError("the parameters of this optimizer are given once, when it is built")
        super().add_param_group(param_group)

    def lows(self) -> list[Tensor | None]:
        """The int16 halves of all parameters in their order, None of an exact one: phi_low of an optimizer whose phi
        these are."""
        return [self.state[p].get("low") for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, lam: float | Tensor = 1.0, ema_decay: float | Tensor = 1.0,
        coefficient: float | Tensor = 1.0,
    ) -> Any:  # fmt: skip
        """One update. lam, ema_decay: phi and EMA stay where they are 1. coefficient: gradients are multiplied by it
        (clipping) without being written. All numbers or 0-d tensors, which are read on the device. Raises ValueError
        for a number lam or ema_decay outside [0, 1].

        A parameter without a gradient keeps its value, moments and count; its phi and EMA move all the same.
        """
        check_fractions(lam=lam, ema_decay=ema_decay)
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

    def in_backward(
        self, *, lam: float | Tensor = 1.0, ema_decay: float | Tensor = 1.0, clip: float = 0.0,
        found_inf: Tensor | None = None,
    ) -> InBackward:  # fmt: skip
        """A context around one backward that updates each parameter as its gradient appears, and frees the gradient:
        they never exist together. lam, ema_decay: as step's. See InBackward for clip and found_inf."""
        check_fractions(lam=lam, ema_decay=ema_decay)
        if not clip >= 0:
            raise ValueError(f"clip must be at least 0 (none), got {clip}")
        return InBackward(self, lam, ema_decay, clip, found_inf)

    def _alone(self, i: int, p: Tensor, group: dict[str, Any], s: Scalars) -> None:
        """The update of one parameter that has its gradient, with a count of its own."""
        step = self.state[p]["step"].clone()
        self.state[p]["step"] = step.add_((s.found_inf == 0).to(step.device, step.dtype).reshape(()))
        for key, part in self._parts([(i, p)]).items():
            self._update(key, part, group, s)

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
                mine["grad"] = grad
                for name, short in NAMES.items():
                    mine[short] = local(state[name])
                    mine[f"{short}_exponent"] = local(state.get(f"{name}_exponent"))
            kinds = tuple((name, t.dtype) for name, t in mine.items() if t is not None)
            block = _eight.block_of(p.shape) if mine.get("m_exponent") is not None else 0
            key = (id(state["step"]), theta.device, kinds)
            if key not in parts:
                parts[key] = Part({name: [] for name in _ext.FIELDS}, [], [], [], state["step"])
            part = parts[key]
            for name, t in mine.items():
                if t is not None:
                    part.lists[name].append(t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,)))
            part.ids.append(i)
            part.blocks.append(block)
            part.starts.append((start_of(p) or 0) if block or self.precision == "stochastic" else 0)
        return parts

    def _update(self, key: tuple, part: Part, group: dict[str, Any], s: Scalars) -> None:
        x, random = part.lists, self.precision == "stochastic"
        if not x["grad"]:
            self._follow(part, group["updates"], s)
            return
        if _ext.takes(*(x[name][0] for name in ("theta", "grad", "phi") if x[name]), alone=True):
            plan = self._plans.setdefault((*key[1:], *part.ids), Plan()).at(part, random)
            launch(plan, part, group, self.seed, s)
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
                weight = (1 - on_device(keep, device, torch.float64)).float()
                weight = weight.masked_fill(on_device(still, device, torch.bool).reshape(()), 0)
                group = Group(
                    x[name], x["theta"], low, x["theta_low"], [], random and x[name][0].dtype == torch.bfloat16,
                    self.seed, part.ids, part.starts,
                )  # fmt: skip
                lerp_reference(group, weight, 0.0, on_device(update, device, torch.int64))

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's layout, live tensors; a count of its own for each parameter, for torch adds to each.
        8-bit moments have other names, exp_avg_code, or torch would take the codes for the values."""
        whole = super().state_dict()
        whole["state"] = {i: {**state, "step": state["step"].clone()} for i, state in whole["state"].items()}
        for state in whole["state"].values():
            for name in NAMES:
                if f"{name}_exponent" in state:
                    state[f"{name}_code"] = state.pop(name)
        return whole

    @torch.no_grad()
    def torch_state_dict(self) -> dict[str, Any]:
        """state_dict with 8-bit moments as the fp32 that they mean, which torch.optim.AdamW loads; copies."""
        whole = self.state_dict()
        for state in whole["state"].values():
            for name in NAMES:
                if (exponent := state.pop(f"{name}_exponent", None)) is not None:
                    state[name] = _decoded(state.pop(f"{name}_code"), exponent, NAMES[name])
        return whole

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of torch.optim.AdamW. Keeps the dtypes of this optimizer (torch's own loading would cast
        fp32 moments to a bf16 parameter's), rounding to the nearest 8-bit code where only this one has such; `low` is 0
        where the saved state has none. Raises ValueError where parameters differ in number or shape."""
        saved = [
            {key.removesuffix("_code"): t for key, t in state_dict["state"].get(i, {}).items()}
            for group in state_dict["param_groups"]
            for i in group["params"]
        ]
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
            for name in NAMES:
                _load_moment(name, kept[p], state)
            if "low" in kept[p]:
                kept[p]["low"].copy_(state["low"]) if "low" in state else kept[p]["low"].zero_()
            count = float(state.get("step", 0))
            step = torch.tensor(count, device=kept[p]["step"].device)
            kept[p]["step"] = shared.setdefault((which[p], step.device, count), step)


# -- 8-bit moments in a state --------------------------------------------------------------------------------------


def _exponents(p: Any, block: int) -> Tensor:
    """int8 [rows, blocks of a row], placed as p is."""
    shape = (p.shape[0], p.numel() // p.shape[0] // block)
    if not is_dtensor(p):
        return torch.zeros(shape, dtype=torch.int8, device=p.device)
    from torch.distributed.tensor import zeros

    return zeros(shape, dtype=torch.int8, device_mesh=p.device_mesh, placements=p.placements)


def _decoded(code: Any, exponent: Any, short: str) -> Any:
    value = _eight.decode(local(code).reshape(-1), local(exponent).reshape(-1), short).view(local(code).shape)
    if not is_dtensor(code):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = code.device_mesh, code.placements
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=code.shape, stride=code.stride())


def _load_moment(name: str, kept: dict[str, Any], saved: dict[str, Any]) -> None:
    """A saved moment, of any kind, into the kept one."""
    exponent, given = f"{name}_exponent", saved.get(f"{name}_exponent")
    pair = [kept[key] for key in (name, exponent) if key in kept]
    if name not in saved:
        for t in pair:
            t.zero_()
    elif given is None and len(pair) == 1:
        kept[name].copy_(saved[name])
    elif given is not None and len(pair) == 2 and given.shape == kept[exponent].shape:
        kept[name].copy_(saved[name])
        kept[exponent].copy_(given)
    else:
        value = saved[name] if given is None else _decoded(saved[name], given, NAMES[name])
        if len(pair) == 1:
            kept[name].copy_(value)
            return
        block = _eight.block_of(kept[name].shape)
        new = _eight.encode(local(value).float().reshape(-1), NAMES[name], block, _eight.HALF)
        for t, encoded in zip(pair, new, strict=True):
            local(t).copy_(encoded.view(local(t).shape))
