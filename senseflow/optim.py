"""Optimizers, learning-rate schedule, gradient clipping and EMA; none waits for the device, but for other packages'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from senseflow.config import Config, UserError
from senseflow.dist import local
from senseflow_kernels import AdamW, HostAdamW

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": "8bit"}


def make_adamw(
    params: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """torch's fused AdamW (decoupled weight decay), on the CPU as on the GPU.

    Fused, because its `found_inf` skips an update on the device (see apply_if_finite).
    Raises torch's RuntimeError for parameters that it has no fused kernel for.
    """
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def make_optimizer(
    cfg: Config, params: Sequence[Tensor], lr: float, *, heads: bool = False, phi: Any = None,
    ema: Sequence[Tensor] | None = None, seed: int = 0,
) -> Any:  # fmt: skip
    """The optimizer of a network by optim.name, with train's numbers. heads: of the discriminator: fp32 weights on the
    device, disc.moments.

    phi: the optimizer of the network that follows params by IDA, ema: fp32 tensors that do; of "senseflow" alone,
    whose step moves both. seed: of its random roundings. Raises UserError where a package does not run.
    """
    t, name = cfg.train, cfg.optim.name
    numbers: dict[str, Any] = dict(lr=lr, betas=(t.beta1, t.beta2), eps=t.eps, weight_decay=t.weight_decay)
    if name == "torch":
        return make_adamw(params, **numbers)
    if name == "senseflow" and heads:
        return AdamW(params, precision="fp32", moments=MOMENTS[cfg.disc.moments], **numbers)
    if name == "senseflow":
        # a LoRA's weights are fp32 whatever its base is kept in
        precision = "fp32" if all(p.dtype == torch.float32 for p in params) else t.precision
        low = phi.lows() if phi is not None and precision == "split" else None
        how: dict[str, Any] = dict(precision=precision, moments=MOMENTS[t.moments], ema=ema, seed=seed, **numbers)
        if cfg.optim.host:
            return HostAdamW(params, phi=phi, **how)
        followers = None if phi is None else [p.detach() for group in phi.param_groups for p in group["params"]]
        return AdamW(params, phi=followers, phi_low=low, **how)
    try:
        if name == "apex":
            from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

            return FusedAdam(params, adam_w_mode=True, **numbers)
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(params, **numbers)
    except (ImportError, RuntimeError) as error:
        package = "NVIDIA's apex, which is built from its repository," if name == "apex" else "torchao"
        raise UserError(f"optim.name = {name!r}: {package} does not run here ({error})") from None


def scheduled_lr(
    iteration: int, lr: float, warmup: int, total: int = 0, cooldown: float = 0.0, left: float = 0.0
) -> float:
    """lr * (iteration + 1) / warmup during the first `warmup` iterations (from 0), then lr.

    Over the last share `cooldown` of the `total` iterations it falls linearly, to the share `left` of it just after
    the last one.
    """
    lr *= min(1.0, (iteration + 1) / warmup) if warmup > 0 else 1.0
    if cooldown <= 0:
        return lr
    return lr * (left + (1 - left) * min(1.0, max(0.0, (total - iteration) / (cooldown * total))))


@torch.no_grad()
def clip_grad_norm_(
    params: Sequence[Tensor], max_norm: float, across: Callable[[Tensor], Tensor] = lambda norm: norm
) -> Tensor:
    """Scales all gradients together to an L2 norm of at most max_norm (0: leaves them).

    Returns the norm before, a 0-d fp32 tensor on the device; 0 where there are no gradients. Its
    sums are fp32 whatever the gradients' dtype. A norm that is not finite spoils the gradients:
    look at it with apply_if_finite. across: from the norm of this rank's shards to the whole one.
    """
    grads = [local(p.grad) for p in params if p.grad is not None]
    if not grads:
        return torch.zeros((), device=params[0].device if len(params) else None)
    norm = across(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32))))
    if max_norm > 0:
        torch._foreach_mul_(grads, clip_coefficient(norm, max_norm))
    return norm


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor | float:
    """What gradients of this norm are multiplied by for an L2 norm of at most max_norm; 1 where that is 0."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else 1.0


def apply_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One optimizer step, or none at all where `finite` (0-d bool, on the device) is False.

    A skipped step leaves weights, both moments and the step count bit for bit as they were. No host
    sync: the fused kernel reads found_inf on the device; but other packages' optimizers read no flag, so
    for these the host waits. Raises TypeError for torch's own without such a kernel.
    """
    if type(optimizer).__module__.partition(".")[0] in ("torchao", "apex"):
        if finite.item():
            optimizer.step()
        return
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise TypeError(f"{type(optimizer).__name__} is not fused: it cannot skip on the device")
    found: Any = optimizer
    found.grad_scale, found.found_inf = None, (~finite).float().reshape(())
    try:
        optimizer.step()
    finally:
        del found.grad_scale, found.found_inf


class Ema:
    """Exponential moving average of parameters: shadow <- decay shadow + (1 - decay) p.

    Kept in fp32 and started from the present values. Decay in [0, 1); near 1 - 2^-24 fp32 no longer
    sees the step.
    """

    def __init__(self, params: Sequence[Tensor], decay: float, device: str | torch.device | None = None):
        """device: of the average, by default each parameter's own."""
        self.decay = decay
        self.shadow = [p.detach().to(device or p.device, torch.float32, copy=True) for p in params]

    @torch.no_grad()
    def update(self, params: Sequence[Tensor]) -> None:
        """One step towards params, in the order given at the start."""
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in params], 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, params: Sequence[Tensor]) -> None:
        """Writes the average into params, rounded to their dtype."""
        for p, s in zip(params, self.shadow, strict=True):
            p.copy_(s)

    def state_dict(self) -> dict[str, Any]:
        """The live tensors, as torch's own state_dicts hold them."""
        return {"shadow": self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when number or shapes differ: copy_ alone would broadcast."""
        saved = state["shadow"]
        if [s.shape for s in saved] != [m.shape for m in self.shadow]:
            raise ValueError("the saved EMA has other shapes than this network")
        for mine, theirs in zip(self.shadow, saved, strict=True):
            mine.copy_(theirs)
