"""`--profile`: time, memory and FLOPs per phase of an iteration, and a trace for Perfetto.

Counting FLOPs and tracing both slow a step, so each has a cycle of its own and the timed one has
neither. The last three cycles are used: FLOPs, times, trace; what comes before is warm-up.
"""

from __future__ import annotations

import gzip
import resource
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from senseflow.logs import print_table

TRACE_LIMIT = 20 * 2**20  # bytes; Perfetto opens .gz as well, and uploads are slow
_NOTHING = nullcontext()


class _Span:
    """Seconds between two moments: host clock on the CPU, CUDA events on a GPU."""

    def __init__(self) -> None:
        self.marks = [self._mark()]

    @staticmethod
    def _mark() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> _Span:
        self.marks.append(self._mark())
        return self

    def seconds(self) -> float:
        """Waits for the device: for the report alone."""
        start, end = self.marks
        if isinstance(start, float):
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # where this fails, _peak_mb is the peak of the process so far
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again at VmRSS


def _peak_mb() -> float:
    """MB (2^20 bytes) since _reset_peak: allocated on the GPU; resident on the CPU, where the heap
    keeps freed blocks and so levels the phases out."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Profiler:
    """Does nothing unless enabled.

    iterations: length of the run; cycle: iterations after which the kinds of iteration repeat
    (the TTUR f), iterations // 3 when not given. Either `with prof.iteration():` around each
    iteration, or `prof.step()` at the end of each.
    """

    def __init__(self, enabled: bool, out: Path, iterations: int = 3, cycle: int | None = None):
        self.enabled, self.out = enabled, out
        self.cycle = max(cycle or iterations // 3, 1)
        self.iterations = iterations
        self.index = 0
        self.mode = "idle"  # between iterations; else warm-up, flops, time or trace
        self.inside: str | None = None
        self.spans: dict[str, list[_Span]] = defaultdict(list)
        self.peak: dict[str, float] = defaultdict(float)
        self.flops: dict[str, list[int]] = defaultdict(list)
        self.steps: list[_Span] = []
        self.trace: Any = None

    def _begin(self) -> None:
        left = self.iterations - self.index  # counted from the end: warm-up takes the rest
        modes = ("trace", "time", "flops", "warm-up")
        self.mode = modes[min(max(left - 1, 0) // self.cycle, 3)]
        if self.mode == "time":
            self.steps.append(_Span())
        if self.mode == "trace" and self.trace is None:
            self.trace = torch.profiler.profile()
            self.trace.start()

    def step(self) -> None:
        """The end of an iteration."""
        if not self.enabled:
            return
        if self.mode == "time":
            self.steps[-1].stop()
        self.index += 1
        self.mode = "idle"

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Around one iteration."""
        if self.enabled:
            self._begin()
        yield
        self.step()

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Around one phase of an iteration. Raises RuntimeError where phases nest: shares would
        count twice."""
        return self._phase(name) if self.enabled else _NOTHING

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.inside:
            raise RuntimeError(f"phase {name!r} begins inside {self.inside!r}: phases do not nest")
        if self.mode == "idle":
            self._begin()
        self.inside = name
        try:
            if self.mode == "flops":
                with FlopCounterMode(display=False) as counter:
                    yield
                self.flops[name].append(counter.get_total_flops())
            elif self.mode == "time":
                _reset_peak()
                span = _Span()
                yield
                self.spans[name].append(span.stop())
                self.peak[name] = max(self.peak[name], _peak_mb())
            else:
                with torch.profiler.record_function(name):
                    yield
        finally:
            self.inside = None

    def _write_trace(self) -> Path | None:
        """profile/trace.json, or trace.json.gz above TRACE_LIMIT."""
        if self.trace is None:
            return None
        self.trace.stop()
        path = self.out / "profile" / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.trace.export_chrome_trace(str(path))
        self.trace = None
        if path.stat().st_size <= TRACE_LIMIT:
            return path
        packed = path.with_suffix(".json.gz")
        with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        path.unlink()
        return packed

    def _row(self, name: str, times: list[float], total: float) -> list[str]:
        counts = self.flops[name]
        flops = sum(counts) / len(counts) if counts else 0.0
        # Mean FLOPs over mean seconds: rollout lengths are drawn, so single calls do not compare.
        rate = flops / (sum(times) / len(times)) / 1e9
        median = f"{1e3 * statistics.median(times):.1f}"
        share = f"{100 * sum(times) / total:.1f}"
        peak = f"{self.peak[name]:.0f}"
        return [name, str(len(times)), median, share, peak, f"{flops / 1e9:.1f}", f"{rate:.1f}"]

    def report(self) -> list[list[str]]:
        """Writes the trace, prints the table of one cycle and returns its rows: phase, times,
        median ms, share %, peak MB, model GFLOP per call, achieved GFLOP/s. Shares and GFLOP are
        over the whole cycle; the last row is the cycle. Empty when the run ended before it."""
        trace = self._write_trace()
        steps = [s.seconds() for s in self.steps if len(s.marks) == 2]
        if not self.enabled or not steps:
            return []
        total = sum(steps)
        seconds = {name: [s.seconds() for s in spans] for name, spans in self.spans.items()}
        order = sorted(seconds, key=lambda name: -sum(seconds[name]))
        rows = [self._row(name, seconds[name], total) for name in order]
        rest = total - sum(map(sum, seconds.values()))
        rows.append(["(rest)", "", "", f"{100 * rest / total:.1f}", "", "", ""])
        flops = sum(map(sum, self.flops.values()))
        rows.append([
            "whole cycle", str(len(steps)), f"{1e3 * total:.1f}", "100.0",
            f"{max(self.peak.values(), default=0):.0f}", f"{flops / 1e9:.1f}",
            f"{flops / total / 1e9:.1f}",
        ])  # fmt: skip
        columns = ["phase", "times", "ms (median)", "share %", "peak MB", "GFLOP", "GFLOP/s"]
        print_table(f"one cycle of {len(steps)} iterations", columns, rows)
        if trace:
            print(f"trace for https://ui.perfetto.dev: {trace}")
        return rows
