"""The table of a benchmark run: `python -m bench.report [--all] [FILE ...]`, by default the newest result files.

One line per op, case and mode, with how many times as long every baseline takes; --all gives every row measured.
The targets follow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.targets import CPU_TARGETS, TARGETS, judge

RESULTS = Path(__file__).parent / "results"
FORMAT = 1  # harness.FORMAT, which needs torch
ROW = {
    "op": str, "case": str, "form": str, "kind": str, "mode": str, "median_s": float, "iqr_s": float, "rounds": int,
    "bytes": int, "error": float,
}  # fmt: skip
Row = dict[str, Any]


class BadResult(Exception):
    """A result file that cannot be used; the message is one line."""


def load(path: Path) -> dict[str, Any]:
    """A result file, checked. Raises BadResult with the file and the reason in one line."""
    try:
        result = json.loads(path.read_text())
    except OSError as why:
        raise BadResult(f"{path}: cannot be read: {why.strerror or why}") from why
    except ValueError as why:  # bad JSON and bad UTF-8
        raise BadResult(f"{path}: not JSON, perhaps cut off: {' '.join(str(why).split())}") from why
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise BadResult(f"{path}: not a result of format {FORMAT} of this benchmark")
    if not isinstance(result.get("environment"), dict) or not isinstance(result.get("rows"), list):
        raise BadResult(f"{path}: environment or rows are missing")
    for i, row in enumerate(result["rows"]):
        for name, kind in ROW.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, (int, float) if kind is float else kind):
                raise BadResult(f"{path}: row {i} has no {name} of type {kind.__name__}")
        if not row["median_s"] > 0:
            raise BadResult(f"{path}: row {i} has median_s = {row['median_s']}, which no run measures")
    return result


def newest(folder: Path = RESULTS) -> list[Path]:
    """The newest file of each device; whole runs before partial ones."""
    found = []
    for device in sorted(p for p in folder.glob("*") if p.is_dir()):
        results = [(load(path), path) for path in device.glob("*.json")]
        if results:
            found.append(max((not r.get("partial"), str(r["environment"].get("time")), path) for r, path in results)[2])
    return found


def copy_rate(result: dict[str, Any]) -> float | None:
    """Bytes a second of the copy that the run measured."""
    copies = [row for row in result["rows"] if row["op"] == "copy"]
    return _rate(copies[0]) if copies else None


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of single benchmarks as one: the same device, commit and versions; a row keeps its own run's copy rate.

    Raises BadResult where they differ.
    """
    first, rows = results[0], {}
    for result in results:
        for name in ("device", "commit", "torch", "triton"):
            if result["environment"].get(name) != first["environment"].get(name):
                raise BadResult(f"results of two runs that differ in {name} are not one")
        rate = copy_rate(result)
        for row in result["rows"]:
            key = tuple(row[name] for name in ("op", "case", "form", "mode"))
            rows[key] = row | ({} if row["op"] == "copy" or rate is None else {"copy_rate": rate})
    missing = set.intersection(*(set(r.get("missing", ())) for r in results))
    commands = " && ".join(str(r["environment"].get("command")) for r in results)
    return first | dict(
        partial=bool(missing) or any(r.get("stopped", r.get("partial")) for r in results), missing=sorted(missing),
        environment=first["environment"] | dict(command=commands), rows=list(rows.values()),
        skipped=[s for r in results for s in r.get("skipped", [])],
    )  # fmt: skip


def verdicts(result: dict[str, Any]) -> list[list[str]]:
    """[target, what was measured, pass | fail | not measured] of the targets for the run's kind of device."""
    gpu = result["environment"].get("device_type") == "cuda"
    judged = judge(result["rows"], TARGETS if gpu else CPU_TARGETS)
    return [[target.text, measured, verdict] for target, measured, verdict in judged]


# -- markdown ------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def _rate(row: Row) -> float:
    return row["bytes"] / row["median_s"]


def _launches(row: Row) -> str:
    if row.get("launches") is None:
        return ""
    fused = row.get("fused_launches")
    return f"{row['launches']} ({fused} fused)" if fused else str(row["launches"])


def _cells(row: Row, copy: float | None) -> list[str]:
    copy = row.get("copy_rate", copy)
    share, rate = f"{_rate(row) / copy:.0%}" if copy else "", f"{_rate(row) / 1e9:.1f}"
    if "flops" in row:  # bound by arithmetic, so bytes say nothing
        share, rate = "", f"{row['flops'] / row['median_s'] / 1e12:.3g} TFLOP/s"
    return [duration(row["median_s"]), duration(row["iqr_s"]), rate, share, _launches(row), f"{row['error']:.1e}"]


def _all_rows(rows: list[Row], copy: float | None) -> str:
    head = ["op", "case", "mode", "form", "median", "IQR", "GB/s", "of copy", "launches", "error"]
    return table(head, [[r["op"], r["case"], r["mode"], r["form"], *_cells(r, copy)] for r in rows])


def _ratios(rows: list[Row], copy: float | None) -> str:
    """One table per op, the baselines as columns."""
    parts = []
    for op in dict.fromkeys(r["op"] for r in rows):
        here = [r for r in rows if r["op"] == op]
        others = list(dict.fromkeys(r["form"] for r in here if r["kind"] != "ours"))
        head = ["case", "mode", "form", "median", "IQR", "GB/s", "of copy", "launches", "error", *others]
        lines = []
        for ours in (r for r in here if r["kind"] == "ours"):
            beside = {r["form"]: r for r in here if (r["case"], r["mode"]) == (ours["case"], ours["mode"])}
            ratios = [f"{beside[o]['median_s'] / ours['median_s']:.2f}x" if o in beside else "" for o in others]
            lines.append([ours["case"], ours["mode"], ours["form"], *_cells(ours, copy), *ratios])
        if lines:
            parts.append(f"**{op}**\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def render(result: dict[str, Any], every_row: bool = False) -> str:
    """Markdown of one run: where, how, its rows, the targets."""
    env, gpu = result["environment"], result["environment"].get("device_type") == "cuda"
    copies = [r for r in result["rows"] if r["op"] == "copy"]
    rows = [r for r in result["rows"] if r["op"] != "copy"]
    copy = copy_rate(result)
    where = f"### {env.get('device')}{'' if gpu else ' (CPU: small sizes, csrc or torch, no GPU kernel ran)'}"
    how = f"torch {env.get('torch')}, Triton {env.get('triton')}, Python {env.get('python')}"
    how += f", commit {env.get('commit')}{' with changes' if env.get('dirty') else ''}, {str(env.get('time'))[:10]}"
    how += f", `{env.get('command')}`"
    if gpu:
        how += f", driver, clock, highest clock, power limit: {env.get('driver_clock_maxclock_power')}"
    else:
        how += f", {env.get('threads')} of {env.get('cores')} cores"
    if copy:
        how += f". Copy bandwidth of the run: {copy / 1e9:.1f} GB/s ({copies[0]['case']}, read and write)"
    partial = "\n\nA partial run: some benchmarks were left out or failed." if result.get("partial") else ""
    what = (
        "GB/s: the least bytes the op can move (every input read once, every output written once) over the median. "
        "Error: 2-norm, relative, against fp64."
    )
    if not every_row:
        what += " Last columns: how many times as long others take, same case, same mode."
    reasons = sorted({f"{s['form']}: {s['reason']}" for s in result.get("skipped", [])})
    parts = [where, how + "." + partial, what, _all_rows(rows, copy) if every_row else _ratios(rows, copy)]
    if reasons:
        parts.append("Not measured: " + "; ".join(reasons) + ".")
    judged = verdicts(result)
    if gpu or any(verdict != "not measured" for *_, verdict in judged):
        parts.append(table(["target", "measured", "verdict"], judged))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """0; 2 with one line on stderr where a file cannot be used or there is none."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="result files; default: newest per device")
    parser.add_argument("--all", action="store_true", help="every row measured instead of the ratios")
    args = parser.parse_args(arguments)
    try:
        files = args.files or newest()
        if not files:
            raise BadResult(f"no result files under {RESULTS}: run `pytest bench` first")
        print("\n\n".join(render(load(path), args.all) for path in files))
    except BadResult as why:
        print(f"bench.report: {why}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
