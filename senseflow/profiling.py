"""`--profile`: time, memory and FLOPs per phase of an iteration, and a trace for Perfetto."""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from senseflow.logs import print_table


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # only ever under --profile
    return time.perf_counter()


def _peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Profiler:
    """Does nothing unless enabled. The first third of `iterations` warms up, the second counts FLOPs, the last is timed
    and traced: counting and tracing both slow a step, so FLOPs and times come from different iterations."""

    def __init__(self, enabled: bool, out: Path, iterations: int = 0):
        self.enabled, self.out = enabled, out
        self.third = max(iterations // 3, 1)
        self.index = 0
        self.mode = "off"
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.flops: dict[str, float] = defaultdict(float)
        self.peak: dict[str, float] = defaultdict(float)
        self.step_seconds: list[float] = []
        self.trace: Any = None

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Around one iteration."""
        if not self.enabled:
            yield
            return
        self.mode = ("warm-up", "flops", "time")[min(self.index // self.third, 2)]
        if self.mode == "time" and self.trace is None:
            self.trace = torch.profiler.profile()
            self.trace.__enter__()
        start = _now()
        yield
        if self.mode == "time":
            self.step_seconds.append(_now() - start)
        self.index += 1

    def phase(self, name: str) -> Any:
        """Around one phase; phases may not nest."""
        return self._phase(name) if self.enabled else nullcontext()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.mode == "flops":
            with FlopCounterMode(display=False) as counter:
                yield
            self.flops[name] += counter.get_total_flops()
            return
        start = _now()
        with torch.profiler.record_function(name):
            yield
        if self.mode == "time":
            self.seconds[name].append(_now() - start)
            self.peak[name] = max(self.peak[name], _peak_mb())

    def report(self) -> list[list[str]]:
        """Writes profile/trace.json, prints the table over one TTUR cycle, and returns its rows."""
        folder = self.out / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        self.trace.__exit__(None, None, None)
        self.trace.export_chrome_trace(str(folder / "trace.json"))
        total = sum(self.step_seconds)
        rows = []
        for name, times in sorted(self.seconds.items(), key=lambda item: -sum(item[1])):
            spent, flops = sum(times), self.flops[name]
            rows.append([
                name, str(len(times)), f"{1e3 * statistics.median(times):.1f}", f"{100 * spent / total:.1f}",
                f"{flops / 1e9:.1f}", f"{flops / spent / 1e9:.1f}", f"{self.peak[name]:.0f}",
            ])  # fmt: skip
        rest = total - sum(map(sum, self.seconds.values()))
        flops = sum(self.flops.values())
        rows.append(["(rest)", "", "", f"{100 * rest / total:.1f}", "", "", ""])
        rows.append(["cycle", str(len(self.step_seconds)), f"{1e3 * total:.1f}", "100.0", f"{flops / 1e9:.1f}",
                     f"{flops / total / 1e9:.1f}", f"{_peak_mb():.0f}"])  # fmt: skip
        columns = ["phase", "times", "ms (median)", "share %", "GFLOP", "GFLOP/s", "peak MB"]
        print_table(f"one TTUR cycle of {len(self.step_seconds)} iterations", columns, rows)
        print(f"trace for https://ui.perfetto.dev: {folder / 'trace.json'}")
        return rows
