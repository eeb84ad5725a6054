"""What a benchmark needs: a clock, CUDA-graph replay, launches, the copy bandwidth of the run, the result file.

A call on a GPU returns once its kernels are enqueued, so a timer around it would measure the enqueue alone. Here a
round times itself, by CUDA events on a GPU, and moves `clock`, the timer that pytest-benchmark is given.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

import senseflow_kernels

ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("SENSEFLOW_BENCH_RESULTS", ROOT / "bench" / "results"))
FORMAT = 1  # of the result file
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# call: as Python makes it, launch gaps included. graph: replayed, L2 hot. flushed: replayed, L2 cold.
MODES = ("call", "graph", "flushed") if CUDA else ("call",)
ROUNDS = 50 if CUDA else 12
SECONDS_A_ROUND = 2e-3 if CUDA else 4e-3  # far above the resolution of events and of the clock
UNROLLED = 20  # calls in a graph: one replay's own cost is about that of a small op
FLUSH_BYTES = 256 << 20  # larger than any L2


class _Clock:
    """Seconds, moved by the rounds themselves: per call, whatever the number of calls in a round."""

    def __init__(self) -> None:
        self.now = 0.0


_clock = _Clock()


def clock() -> float:
    """The timer of pytest-benchmark here; stands still but for what a round adds."""
    return _clock.now


def _synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


@contextmanager
def kernels() -> Iterator[None]:
    """With a GPU the fused kernels or an error; without one csrc or torch, never Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with senseflow_kernels.strict() if CUDA else senseflow_kernels.torch_path() if interpreted else nullcontext():
        yield


def seconds_of(fn: Callable[[], Any]) -> float:
    """Of one call, roughly: the second one, complete on the device."""
    fn()
    _synchronize()
    start = time.perf_counter()
    fn()
    _synchronize()
    return time.perf_counter() - start


def capture(fn: Callable[[], Any], calls: int) -> Any:
    """A CUDA graph of that many calls, one after another. Raises what the capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            fn()
    return graph


def for_backward(forward: Callable[[], Any]) -> Any:
    """What forward gives, such that its backward alone can be timed, captured too.

    Autograd runs a backward on its forward's stream: only from the capture's own can a graph take it alone.
    """
    if not CUDA:
        return forward()
    stream = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream
    assert stream is not None
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = forward()
    torch.cuda.current_stream().wait_stream(stream)
    return out


def a_round(fn: Callable[[], Any], mode: str) -> tuple[Callable[[], None], int]:
    """(one timed round, calls in it). Compilation, autotuning and capture happen here, outside of every round."""
    once = seconds_of(fn)
    calls = max(1, min(200, math.ceil(SECONDS_A_ROUND / max(once, 1e-9))))
    if not CUDA:

        def on_cpu() -> None:
            start = time.perf_counter()
            for _ in range(calls):
                fn()
            _clock.now += (time.perf_counter() - start) / calls

        return on_cpu, calls
    scratch, graph = None, None
    if mode != "call":
        calls = 1 if mode == "flushed" or once > 1e-3 else UNROLLED
        graph = capture(fn, calls)
    if mode == "flushed":
        scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)

    def on_cuda() -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if scratch is not None:
            scratch.zero_()  # while it runs, the host is ahead: what follows starts without a gap
        start.record()
        if graph is not None:
            graph.replay()
        else:
            for _ in range(calls):
                fn()
        end.record()
        end.synchronize()
        _clock.now += start.elapsed_time(end) / 1e3 / calls

    return on_cuda, calls


class Turn:
    """A form timed between another's rounds: dict(form=, kind=, fn=, error=)."""

    def __init__(self, other: dict[str, Any], mode: str) -> None:
        self.other, self.times = other, list[float]()
        self.round, self.calls = a_round(other["fn"], mode)

    def run(self) -> None:
        """One round of it."""
        start = _clock.now
        self.round()
        self.times.append(_clock.now - start)

    def row(self, beside: dict[str, Any], rounds: int) -> dict[str, Any]:
        """Its row of the result file: what it shares with the form beside it, its own times of the last rounds."""
        times = self.times[-rounds:]
        low, middle, high = quantiles(times, n=4)
        launches, fused = count_launches(self.other["fn"])
        own = dict(form=self.other["form"], kind=self.other["kind"], error=self.other["error"], median_s=middle,
                   iqr_s=high - low, rounds=len(times), calls_a_round=self.calls, launches=launches,
                   fused_launches=fused)  # fmt: skip
        return beside | own


def _kernels_of(fn: Callable[[], Any]) -> int:
    """What fn puts on the GPU, copies and fills included, as the profiler sees it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        fn()
        torch.cuda.synchronize()
    # torch.compile and others put a name around their kernels, which the profiler shows on the device too
    events = [e for e in prof.events() or [] if not getattr(e, "is_user_annotation", False)]
    return sum(event.device_type == DeviceType.CUDA for event in events)


@functools.cache
def _start_profiler() -> None:
    """The first profile of a process starts late and misses kernels."""
    _kernels_of(lambda: torch.zeros(1, device=DEVICE))


def count_launches(fn: Callable[[], Any]) -> tuple[int | None, int]:
    """(everything one call puts on the GPU, None on a CPU; the fused kernels among it, by our own counter)."""
    before = senseflow_kernels.launches.total()
    fn()
    fused = senseflow_kernels.launches.total() - before
    if not CUDA:
        return None, fused
    _start_profiler()
    return _kernels_of(fn), fused


def copy_row() -> dict[str, Any]:
    """The largest plain copy the device does: read and write of a buffer far beyond the caches, bytes both ways."""
    n = min(2 << 30, torch.cuda.mem_get_info()[0] // 4) if CUDA else 256 << 20
    source = torch.ones(n // 4, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    run, calls = a_round(lambda: target.copy_(source), "call")
    times = []
    for _ in range(20):
        before = clock()
        run()
        times.append(clock() - before)
    low, middle, high = quantiles(times, n=4)
    return dict(
        op="copy", case=f"{n >> 20} MiB", form="copy_", kind="copy", mode="call", median_s=middle, iqr_s=high - low,
        rounds=len(times), calls_a_round=calls, bytes=2 * n, launches=1 if CUDA else None, fused_launches=0, error=0.0,
        tolerance=0.0,
    )  # fmt: skip


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the 2-norm, in fp64."""
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).norm() / truth.norm().clamp_min(1e-300)).item()


# -- the result file -----------------------------------------------------------------------------------------------


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> tuple[str, bool | None]:
    """(short commit, whether tracked or new files differ from it); an unpacked gpu-pack says its commit in a file."""
    packed = ROOT / "commit.txt"
    if packed.exists():  # first: it may have been unpacked inside another repository
        return packed.read_text().strip()[:10], None
    found = _output("git", "rev-parse", "--short=10", "HEAD")
    if not found:
        return "unknown", None
    changed = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return found, None if changed is None else bool(changed)


def device_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def device_slug() -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return slug if CUDA else f"cpu-{slug}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Everything a figure needs beside it to be repeated."""
    commit, dirty = _commit()
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit"
    gpu = _output("nvidia-smi", query, "--format=csv,noheader", "-i", "0") if CUDA else None
    system = " ".join([platform.system(), platform.machine(), *platform.libc_ver()])
    return dict(
        device=device_name(), device_type=DEVICE.type, cpu=platform.processor() or platform.machine(),
        cores=os.cpu_count(), threads=torch.get_num_threads(), platform=system,
        python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
        triton=_version("triton"), pytest_benchmark=_version("pytest-benchmark"),
        driver_clock_maxclock_power=gpu, capability=list(torch.cuda.get_device_capability()) if CUDA else None,
        commit=commit, dirty=dirty, command=" ".join(["python", "-m", "pytest", *sys.argv[1:]]),
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )  # fmt: skip


def save(
    rows: list[dict[str, Any]], skipped: list[dict[str, str]], stopped: bool = False, missing: Sequence[str] = (),
    folder: Path = RESULTS,
) -> Path:  # fmt: skip
    """Writes folder/<device>/<date>-<commit>.json, with -2, -3, ... where one is there.

    stopped: something failed, was deselected or interrupted; missing: families of ops that were not asked for.
    """
    env = environment()
    name = f"{env['time'][:10]}-{env['commit']}{'-dirty' if env['dirty'] else ''}"
    folder = folder / device_slug()
    folder.mkdir(parents=True, exist_ok=True)
    path, i = folder / f"{name}.json", 1
    while path.exists():
        i += 1
        path = folder / f"{name}-{i}.json"
    result = dict(
        format=FORMAT, partial=bool(stopped or missing), stopped=stopped, missing=sorted(missing), environment=env,
        rows=rows, skipped=skipped,
    )  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
