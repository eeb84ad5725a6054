"""AdamW whose moments and exact weights are in host memory: the CPU's one pass, behind the device's next work.

What stays on the device is each parameter in the dtype that it computes in. A step copies the gradients to the host,
runs `AdamW` there (csrc's C++ where it was built) and copies theta and phi back, on a thread and a stream of its own;
`wait` is what orders it with the next use. On CPU tensors the same code runs with plain memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from senseflow_kernels._adamw import check_fractions
from senseflow_kernels.adamw import AdamW
from senseflow_kernels.buckets import is_dtensor


class HostAdamW:
    """`AdamW` over host copies of params: same arguments, same numbers bit for bit, same state dict.

    params: tensors of one device. precision "split" keeps bf16 on the device and 2 bytes more a weight on the host;
    "fp32" has the same fp32 on both. phi: another HostAdamW, whose parameters follow by IDA on the host and then on the
    device. ema: fp32 host tensors. The rest as AdamW's. Gradients are freed by the caller, at once if it likes.

    `step` returns while the update runs; no two of one process run at a time. `wait` before anything reads or writes
    these parameters (and phi's), or the state, orders it with the current stream; it raises what the update raised.
    Adds to a parameter's bytes on the host, of split with fp32 moments: 12, and 2 for the gradient in bf16.
    Raises ValueError for DTensors, for parameters of several devices and for a phi that is no HostAdamW.
    """

    _worker = ThreadPoolExecutor(1, "senseflow-host-adamw")  # one: student's update writes what the fake's reads

    def __init__(
        self, params: Iterable[Tensor], *, phi: HostAdamW | None = None, ema: Sequence[Tensor] | None = None, **how: Any
    ) -> None:
        self.params = list(params)
        devices = {p.device for p in self.params}
        if len(devices) != 1 or any(is_dtensor(p) for p in self.params):
            raise ValueError(f"host states are for unsharded parameters of one device, these are on {devices}")
        if phi is not None and not isinstance(phi, HostAdamW):
            raise ValueError(f"phi must be the HostAdamW of the parameters that follow, got a {type(phi).__name__}")
        self.device = devices.pop()
        self.phi, self.ema = phi, ema
        self.masters = [torch.nn.Parameter(self._host(p.detach(), p.dtype).copy_(p.detach())) for p in self.params]
        self.inner = AdamW(
            self.masters, phi=None if phi is None else [m.detach() for m in phi.masters],
            phi_low=phi.inner.lows() if phi is not None and how.get("precision") == "split" else None, ema=ema, **how,
        )  # fmt: skip
        self._buffers: list[Tensor | None] = [None] * len(self.params)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pending: Future[Any] | None = None

    def _host(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory on the host for a tensor, laid out as it is; pinned where a GPU copies."""
        return torch.empty_like(like, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def lows(self) -> list[Tensor | None]:
        """The int16 halves, on the host."""
        return self.inner.lows()

    @torch.no_grad()
    def step(
        self, *, lam: float | Tensor = 1.0, ema_decay: float | Tensor = 1.0, coefficient: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Starts one update with the gradients as they are now; see AdamW.step. found_inf: not 0 to skip it."""
        check_fractions(lam=lam, ema_decay=ema_decay)
        self.wait()
        if self.phi is not None:
            self.phi.wait()
        numbers = dict(lam=lam, ema_decay=ema_decay, coefficient=coefficient, found_inf=found_inf)
        with self._beside():
            for i, p in enumerate(self.params):
                if p.grad is None:
                    self.masters[i].grad = None
                    continue
                buffer = self._buffers[i]
                if buffer is None or buffer.dtype != p.grad.dtype:
                    buffer = self._buffers[i] = self._host(p.detach(), p.grad.dtype)
                self._send(p.grad, buffer)
                self.masters[i].grad = buffer
            hosted = {name: self._hosted(value) for name, value in numbers.items()}
            arrived = None if self._stream is None else self._stream.record_event()
        self._pending = self._worker.submit(self._update, hosted, arrived)
        if self.phi is not None:
            self.phi._pending = self._pending

    def _beside(self) -> Any:
        """The copying stream, after what the current one has enqueued; nothing on a CPU."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _send(self, value: Tensor, buffer: Tensor) -> None:
        buffer.copy_(value, non_blocking=True)
        if self._stream is not None:
            value.record_stream(self._stream)  # its memory may be given away by the caller before it is copied

    def _hosted(self, value: float | Tensor | None) -> float | Tensor | None:
        if not isinstance(value, Tensor):
            return value
        buffer = self._host(value.detach(), value.dtype)
        self._send(value.detach(), buffer)
        return buffer

    @torch.no_grad()
    def _update(self, numbers: dict[str, Any], arrived: Any) -> Any:
        """On the worker: returns the event after which the device has the new weights, None on a CPU."""
        if arrived is not None:
            arrived.synchronize()
        self.inner.found_inf = numbers.pop("found_inf")  # type: ignore[attr-defined]
        self.inner.step(**numbers)
        with torch.cuda.stream(self._stream):
            for one in (self, self.phi) if self.phi is not None else (self,):
                for p, master in zip(one.params, one.masters, strict=True):
                    p.copy_(master, non_blocking=True)
            return None if self._stream is None else self._stream.record_event()

    def wait(self) -> None:
        """Until the last update's weights are there: the host waits for the update, the current stream for the copy."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            event = pending.result()
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)

    def state_dict(self) -> dict[str, Any]:
        self.wait()
        return self.inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamW's. The masters become what the parameters on the device are now: load those first."""
        self.wait()
        for p, master in zip(self.params, self.masters, strict=True):
            master.copy_(p)
        self.inner.load_state_dict(state_dict)
