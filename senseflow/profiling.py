"""`--profile`: time, memory, FLOPs and launches per phase of an iteration beside the device's own rates, a trace for
Perfetto, on a GPU a snapshot of the memory, and profile.html to look at.

Counting FLOPs and tracing both slow a step, so each has a cycle of its own and the timed one has
neither. The last three cycles are used: FLOPs, times, trace; what comes before is warm-up.
"""

from __future__ import annotations

import gzip
import resource
import shutil
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from senseflow.logs import print_table
from senseflow.profile_page import Rates, launches_by_phase, measure_rates, write_page

COLUMNS = ["phase", "times", "ms (median)", "share %", "peak MB", "GFLOP", "GFLOP/s", "MFU %", "GB", "GB/s", "launches",
           "floor ms"]  # fmt: skip
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
        return self._between(*self.marks)

    def after(self, other: _Span) -> float:
        """Seconds from the start of another one to this one's."""
        return self._between(other.marks[0], self.marks[0])

    @staticmethod
    def _between(start: Any, end: Any) -> float:
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

    def __init__(
        self, enabled: bool, out: Path, iterations: int = 3, cycle: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.enabled, self.out, self.dtype = enabled, out, dtype
        self.cycle = max(cycle or iterations // 3, 1)
        self.iterations = iterations
        self.index = 0
        self.mode = "idle"  # between iterations; else warm-up, flops, time or trace
        self.inside: str | None = None
        self.spans: dict[str, list[_Span]] = defaultdict(list)
        self.peak: dict[str, float] = defaultdict(float)
        self.flops: dict[str, list[int]] = defaultdict(list)
        self.moved: dict[str, list[float]] = defaultdict(list)  # bytes of each call, told by `moves`
        self.launches: Counter[str] = Counter()
        self.calls: dict[str, list[int]] = defaultdict(list)  # network calls of each span: a rollout has several
        self.traced: Counter[str] = Counter()  # calls in the traced cycle
        self.told = 0  # calls of the phase that runs
        self.steps: list[_Span] = []
        self.order: list[list[tuple[str, _Span]]] = []  # of each timed iteration its phases
        self.trace: Any = None
        self.rates = measure_rates(dtype) if enabled else Rates(1.0, 1.0)

    def _begin(self) -> None:
        left = self.iterations - self.index  # counted from the end: warm-up takes the rest
        modes = ("trace", "time", "flops", "warm-up")
        self.mode = modes[min(max(left - 1, 0) // self.cycle, 3)]
        if self.mode == "time":
            self.steps.append(_Span())
            self.order.append([])
        if self.mode == "trace" and self.trace is None:
            if torch.cuda.is_available():  # who holds what, with stacks; https://pytorch.org/memory_viz reads it
                torch.cuda.memory._record_memory_history(max_entries=200_000)
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

    def call(self) -> None:
        """One network call within the phase that runs. Rollout lengths are drawn, so cycles differ: by the call, FLOPs
        counted in one cycle and times of another belong together."""
        self.told += 1

    def moves(self, name: str, count: Callable[[], float]) -> None:
        """Of the phase `name`, now: that it reads and writes count() bytes at the least."""
        if self.enabled and self.mode == "time":
            self.moved[name].append(count())

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.inside:
            raise RuntimeError(f"phase {name!r} begins inside {self.inside!r}: phases do not nest")
        if self.mode == "idle":
            self._begin()
        self.inside, self.told = name, 0
        try:
            if self.mode == "flops":
                with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                    yield  # compiled code would hide its operators
                calls = max(self.told, 1)
                self.flops[name] += [counter.get_total_flops() // calls] * calls
            elif self.mode == "time":
                _reset_peak()
                span = _Span()
                yield
                self.spans[name].append(span.stop())
                self.calls[name].append(max(self.told, 1))
                self.order[-1].append((name, span))
                self.peak[name] = max(self.peak[name], _peak_mb())
            else:
                with torch.profiler.record_function(name):
                    yield
                self.traced[name] += max(self.told, 1)
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
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(path.parent / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if path.stat().st_size <= TRACE_LIMIT:
            return path
        packed = path.with_suffix(".json.gz")
        with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        path.unlink()
        return packed

    def _row(self, name: str, times: list[float], total: float) -> list[str]:
        counts, moved = self.flops[name], self.moved[name]
        flops = sum(counts) / len(counts) if counts else 0.0
        through = sum(moved) / len(moved) if moved else 0.0
        mean = sum(times) / len(times)
        # Mean FLOPs over mean seconds: calls of one phase can be of several kinds, as the backward's are.
        rate = flops / mean
        return [
            name, str(len(times)), f"{1e3 * statistics.median(times):.1f}", f"{100 * sum(times) / total:.1f}",
            f"{self.peak[name]:.0f}", f"{flops / 1e9:.1f}", f"{rate / 1e9:.1f}", f"{100 * rate / self.rates.flops:.1f}",
            f"{through / 1e9:.3f}" if moved else "", f"{through / mean / 1e9:.1f}" if moved else "",
            f"{self.launches[name] / max(self.traced[name], 1):.0f}", f"{1e3 * self.rates.floor(flops, through):.2f}",
        ]  # fmt: skip

    def _seconds(self, name: str) -> list[float]:
        """Of each call of a phase in the timed cycle; several within one span share its time."""
        pairs = zip(self.spans[name], self.calls[name], strict=True)
        return [span.seconds() / calls for span, calls in pairs for _ in range(calls)]

    def _floor(self, name: str, times: int) -> float:
        """Seconds that this phase's calls of the cycle take at best."""
        flops, moved = self.flops[name], self.moved[name]
        mean = [sum(v) / len(v) if v else 0.0 for v in (flops, moved)]
        return times * self.rates.floor(*mean)

    def report(self) -> list[list[str]]:
        """Writes the trace and profile.html, prints the table of one cycle and returns its rows: phase, times, median
        ms, share %, peak MB, model GFLOP per call, achieved GFLOP/s, this over the measured rate of a matrix product
        %, GB moved per call and GB/s where the phase is bound by memory, launches per call (operators on a CPU), and
        the ms below which a call cannot be at the measured rates. Shares and GFLOP are over the whole cycle; the last
        row is the cycle. Empty when the run ended before it."""
        traced, trace = self.trace, self._write_trace()
        steps = [s.seconds() for s in self.steps if len(s.marks) == 2]
        if not self.enabled or not steps:
            return []
        total = sum(steps)
        seconds = {name: self._seconds(name) for name in self.spans}
        self.launches = launches_by_phase(traced.events(), seconds) if traced is not None else Counter()
        order = sorted(seconds, key=lambda name: -sum(seconds[name]))
        rows = [self._row(name, seconds[name], total) for name in order]
        rest = total - sum(map(sum, seconds.values()))
        rows.append(["(rest)", "", "", f"{100 * rest / total:.1f}", *[""] * 8])
        flops = sum(statistics.mean(self.flops[name]) * len(seconds[name]) for name in order if self.flops[name])
        gaps = [(name, sum(seconds[name]), self._floor(name, len(seconds[name]))) for name in order]
        ideal = sum(floor for *_, floor in gaps)
        rows.append([
            "whole cycle", str(len(steps)), f"{1e3 * total:.1f}", "100.0",
            f"{max(self.peak.values(), default=0):.0f}", f"{flops / 1e9:.1f}", f"{flops / total / 1e9:.1f}",
            f"{100 * flops / total / self.rates.flops:.1f}", "", "", f"{sum(self.launches.values())}",
            f"{1e3 * ideal:.2f}",
        ])  # fmt: skip
        notes = self._notes(total, gaps)
        print_table(f"one cycle of {len(steps)} iterations", COLUMNS, rows)
        print("\n".join(notes))
        page = self.out / "profile" / "profile.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, self._lanes(), gaps, COLUMNS, rows, notes)
        if trace:
            print(f"trace for https://ui.perfetto.dev: {trace}; picture: {page}")
        return rows

    def _notes(self, total: float, gaps: list[tuple[str, float, float]]) -> list[str]:
        ideal, waited = sum(floor for *_, floor in gaps), sum(s for name, s, _ in gaps if name == "data")
        largest = sorted(gaps, key=lambda gap: gap[2] - gap[1])[:3]
        lost = ", ".join(f"{name} {1e3 * (took - floor):.1f} ms" for name, took, floor in largest)
        uncounted = [name for name, *_ in gaps if not self.flops[name]]
        return [
            f"measured at start: matrix product {self.rates.flops / 1e9:.0f} GFLOP/s in {self.dtype}, copy "
            f"{self.rates.bytes / 1e9:.1f} GB/s",
            f"waiting for data: {1e3 * waited:.1f} ms, {100 * waited / total:.1f} % of the cycle",
            f"ideal cycle at these rates: {1e3 * ideal:.1f} ms; this one took {1e3 * total:.1f} ms, "
            f"{total / ideal:.1f} times that" if ideal > 0 else "ideal cycle: no FLOP and no byte was counted",
            f"furthest from their floors: {lost}",
            *([f"without FLOPs, as the cycle that counts them had none: {', '.join(uncounted)}"] if uncounted else []),
        ]  # fmt: skip

    def _lanes(self) -> list[list[tuple[str, float, float]]]:
        """Of each timed iteration its phases: (name, start, seconds), from the iteration's start on."""
        whole = [s for s in self.steps if len(s.marks) == 2]
        return [
            [(name, span.after(step), span.seconds()) for name, span in lane]
            for step, lane in zip(whole, self.order, strict=False)
        ]
