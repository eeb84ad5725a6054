"""What `--profile` measures a step against, and its page: rates of this device, launches of a trace, profile.html."""

from __future__ import annotations

import html
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PALETTE = ("#3b6fb5", "#d98b2b", "#4f9d69", "#b5484f", "#7d62a8", "#8c6d4f", "#c774a8", "#6b6b6b", "#b3a53a", "#3aa3ad")


@dataclass(frozen=True)
class Rates:
    """Of this device, measured: FLOP/s of a large matrix product, bytes/s of a large copy (read and written)."""

    flops: float
    bytes: float

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which that many FLOPs and bytes cannot be: the longer of the two alone."""
        return max(flops / self.flops, moved / self.bytes)


def _best(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of some calls, complete on the device, after one to warm up."""
    cuda, best = torch.cuda.is_available(), float("inf")
    for i in range(rounds + 1):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if i else best
    return best


def measure_rates(dtype: torch.dtype, side: int | None = None, rounds: int = 5) -> Rates:
    """side: of the square matrices; default 8192 on a GPU, 1024 on a CPU, each some ms. The copy is of 256 MB there and
    64 MB here, beyond the caches."""
    cuda = torch.cuda.is_available()
    device, side = "cuda" if cuda else "cpu", side or (8192 if cuda else 1024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _best(lambda: torch.mm(a, b, out=out), rounds)
    source = torch.zeros((256 if cuda else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), rounds)
    return Rates(2 * side**3 / product, 2 * source.numel() / copy)


def launches_by_phase(events: Iterable[Any], phases: Iterable[str]) -> Counter[str]:
    """Kernels that each phase put on the GPU, by the time of their launch, backward's thread included; on a CPU
    operators, those that call no other. events: torch.profiler's."""
    cuda, names = torch.cuda.is_available(), set(phases)
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.name in names)
    starts, found = [s[0] for s in spans], Counter()
    for e in events:
        count = len(e.kernels) if cuda else int(not e.cpu_children and e.name.startswith("aten::"))
        at = bisect_right(starts, e.time_range.start) - 1
        if count and at >= 0 and e.time_range.start <= spans[at][1]:
            found[spans[at][2]] += count
    return found


def _bars(lanes: Sequence[Sequence[tuple[str, float, float]]], colour: dict[str, str], width: int = 1100) -> str:
    """One SVG: a lane for each iteration, a bar for each phase, to one scale. lanes: (name, start, seconds)."""
    longest = max((start + took for lane in lanes for _, start, took in lane), default=0.0) or 1.0
    left, height, parts = 90, 30, []
    scale = (width - left - 10) / longest
    for i, lane in enumerate(lanes):
        y = 8 + i * (height + 8)
        parts.append(f'<text x="4" y="{y + 20}">iteration {i + 1}</text>')
        for name, start, took in lane:
            tip = html.escape(f"{name}: {1e3 * took:.2f} ms")
            parts.append(
                f'<rect x="{left + start * scale:.2f}" y="{y}" width="{max(took * scale, 0.5):.2f}" height="{height}" '
                f'fill="{colour[name]}"><title>{tip}</title></rect>'
            )
    bottom = 8 + len(lanes) * (height + 8)
    for k in range(6):
        x = left + k * longest / 5 * scale
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{1e3 * k * longest / 5:.4g} ms</text>')
    return f'<svg viewBox="0 0 {width} {bottom + 24}" role="img">{"".join(parts)}</svg>'


def _gaps(rows: Sequence[tuple[str, float, float]], colour: dict[str, str], width: int = 1100) -> str:
    """One SVG: seconds of each phase in the cycle, its floor inside as the dark part. rows: (name, seconds, floor)."""
    longest, left, parts = max((s for _, s, _ in rows), default=0.0) or 1.0, 260, []
    for i, (name, seconds, floor) in enumerate(rows):
        y, scale = 6 + i * 26, (width - left - 160) / longest
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{html.escape(name)}</text>')
        for took, opacity in ((seconds, 0.35), (min(floor, seconds), 1.0)):
            parts.append(
                f'<rect x="{left}" y="{y}" width="{took * scale:.2f}" height="18" fill="{colour[name]}" '
                f'fill-opacity="{opacity}"/>'
            )
        times = f"{seconds / floor:.1f}x its floor" if floor > 0 else "no floor counted"
        parts.append(f'<text x="{left + seconds * scale + 6:.1f}" y="{y + 14}">{1e3 * seconds:.2f} ms, {times}</text>')
    return f'<svg viewBox="0 0 {width} {12 + 26 * len(rows)}" role="img">{"".join(parts)}</svg>'


def write_page(
    path: Path, lanes: Sequence[Sequence[tuple[str, float, float]]], gaps: Sequence[tuple[str, float, float]],
    columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str],
) -> None:  # fmt: skip
    """profile.html: pictures and table in one file that needs no other and no network.

    lanes: of each iteration of the timed cycle its phases (name, start, seconds); gaps: (name, seconds in the cycle,
    floor of these); columns, rows: the printed table; notes: lines of text.
    """
    names = list(dict.fromkeys([name for name, _, _ in gaps] + [name for lane in lanes for name, _, _ in lane]))
    colour = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    text = "".join(f"<p>{html.escape(line)}</p>" for line in notes)
    path.write_text(f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>One cycle</title>
<style>body{{font:14px sans-serif;max-width:1120px;margin:2em auto;color:#222;background:#fff}}
svg{{width:100%;font-size:12px}} table{{border-collapse:collapse}} td,th{{padding:2px 9px;text-align:right}}
td:first-child,th:first-child{{text-align:left}} tr:nth-child(even){{background:#f3f3f3}}</style>
<h1>One cycle, phase by phase</h1>{text}
<h2>Iterations</h2>{_bars(lanes, colour)}
<h2>Time of the cycle; dark: what this device's measured rates allow at best</h2>{_gaps(gaps, colour)}
<h2>Table</h2><table><tr>{head}</tr>{body}</table></html>
""")
