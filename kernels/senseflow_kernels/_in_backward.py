"""AdamW's updates during the backward: each parameter as its gradient appears."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senseflow_kernels._adamw import Scalars, on_device
from senseflow_kernels.buckets import is_dtensor


class InBackward:
    """`with optimizer.in_backward(...) as seen: loss.backward(inputs=parameters)`, one backward.

    Gradients never exist together, so their whole norm is known too late to clip by. Each is multiplied by
    min(1, clip / max(its own norm, the whole norm of the optimizer's last such backward)) instead: the limit of a
    training whose norm changes slowly, and no tensor alone goes beyond it. clip 0: none. The last norm is kept in the
    state dict.

    found_inf: 0-d or [1], not 0 to skip everything, read on the device when each gradient appears: set it from the loss
    before the backward and from a hook on what the gradients come through (dL/dx0). Beside it a tensor whose gradient
    is not finite skips for itself. A skipped tensor keeps every bit, its count, phi and EMA too.

    After the `with`: `norm`, 0-d fp32, of the whole gradient (not finite where a tensor's was not), `skipped`, 0-d
    fp32, how many tensors were. Parameters without a gradient have their phi and EMA moved at the end. An exception
    leaves those that had none yet as they were. Raises RuntimeError for a gradient that appears twice: they cannot be
    accumulated over several backwards.
    """

    norm: Tensor
    skipped: Tensor

    def __init__(
        self, optimizer: Any, lam: float | Tensor, ema_decay: float | Tensor, clip: float, found_inf: Tensor | None
    ) -> None:
        self.optimizer, self.lam, self.ema_decay, self.clip, self.found = optimizer, lam, ema_decay, clip, found_inf
        self._hooks: list[Any] = []
        self._seen: set[int] = set()

    def __enter__(self) -> InBackward:
        groups = self.optimizer.param_groups
        device = groups[0]["params"][0].device
        self._squares, self.skipped = torch.zeros((), device=device), torch.zeros((), device=device)
        self._last = on_device(groups[0].get("last_norm", 0.0), device, torch.float32)
        number = 0
        for group in groups:
            group["updates"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    raise RuntimeError(f"parameter {number} has a gradient already: it would be stepped on twice")
                hook = self._hook(number, group)
                self._hooks.append(p.register_post_accumulate_grad_hook(hook))
                number += 1
        return self

    def _hook(self, i: int, group: dict[str, Any]) -> Any:
        @torch.no_grad()
        def update(p: Tensor) -> None:
            if i in self._seen:
                raise RuntimeError(f"the gradient of parameter {i} appeared twice in one backward")
            self._seen.add(i)
            assert p.grad is not None
            norm = torch.linalg.vector_norm(p.grad.detach(), dtype=torch.float32)
            norm = (norm.full_tensor() if is_dtensor(norm) else norm).to(self._squares.device)  # type: ignore[attr-defined]
            found = ~torch.isfinite(norm)
            if self.found is not None:
                found = found | (self.found.reshape(()).to(found.device) != 0)
            found = found.float()
            self._squares += norm * norm
            self.skipped += found
            coefficient: float | Tensor = 1.0
            if self.clip > 0:
                coefficient = (self.clip / (torch.maximum(norm, self._last) + 1e-6)).clamp(max=1.0)
            s = Scalars(group["lr"], self.lam, self.ema_decay, coefficient, found)
            self.optimizer._alone(i, p, group, s)
            p.grad = None

        return update

    def __exit__(self, kind: Any, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.norm = self._squares.sqrt()
        if kind is None:
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """phi and EMA of what got no gradient; the norm for the next backward, where it was finite."""
        optimizer, number = self.optimizer, 0
        for group in optimizer.param_groups:
            some = list(enumerate(group["params"], number))
            number += len(some)
            rest = [(i, p) for i, p in some if i not in self._seen]
            s = Scalars(group["lr"], self.lam, self.ema_decay, 1.0, self.found)
            for key, part in optimizer._parts(rest).items():
                optimizer._update(key, part, group, s)
        finite = torch.isfinite(self.norm) & (self.skipped == 0)
        optimizer.param_groups[0]["last_norm"] = torch.where(finite, self.norm, self._last)
