"""The table of an evaluation in the paper's layout, the published rows beside it, and the versions it came from."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import senseflow
from senseflow.logs import print_table
from senseflow.scores.published import COCO, COMPBENCH, COMPBENCH_TABLES, GENEVAL, TABLES
from senseflow.scores.registry import METRICS

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "clean-fid",
            "torch_fidelity", "lpips", "Pillow", "numpy")  # fmt: skip


def versions() -> dict[str, str]:
    """Installed version of every package that a score can depend on, and of Python."""
    found = {"python": platform.python_version(), "senseflow": senseflow.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def who(record: dict[str, Any], name: str = "student") -> str:
    """The words of one of our own rows."""
    return name if name == "teacher" else f"this student{': ' * bool(record['of'])}{record['of']}"


def cell(name: str, value: float | None) -> str:
    digits = METRICS[name].digits if name in METRICS else 4
    return "-" if value is None else f"{value:.{digits}f}"


def rows_of(record: dict[str, Any], columns: list[str]) -> list[list[str]]:
    """Our own rows: the teacher's where it has scores, the student's."""
    rows = []
    for name in ("teacher", "student"):
        scores = record["scores"].get(name, {})
        if name == "student" or scores:
            values = [cell(c, scores[c]["value"]) if c in scores else "-" for c in columns]
            about = record["generation"].get(name, {})
            rows.append([who(record, name), str(about.get("calls", "")), *values])
    return rows


def published_rows(table: list[tuple[str, str, list[float | None]]], columns: list[str]) -> list[list[str]]:
    return [
        [f"{who} (published)", nfe, *(cell(c, v) for c, v in zip(columns, values, strict=True))]
        for who, nfe, values in table
    ]


def tables(record: dict[str, Any], published: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows): the paper's COCO table, our further metrics, and the benchmarks that were read."""
    found = []
    if record["pictures"]:
        titles = [METRICS[c].title for c in COCO]
        rows = published_rows(TABLES.get(published, []), COCO) + rows_of(record, COCO)
        title = "published rows: COCO-5K, 1024 px; they compare with the same prompts and weights alone"
        found.append((title if published in TABLES else "metrics", ["generator", "NFE", *titles], rows))
        more = [c for c in record["scores"]["student"] if c not in COCO]
        if more:
            titles = [METRICS[c].title if c in METRICS else c for c in more]
            found.append(("further metrics", ["generator", "NFE", *titles], rows_of(record, more)))
    for name, values in record["benchmarks"].items():
        columns, known = list(values), []
        if name == "t2i-compbench":
            columns, known = COMPBENCH, published_rows(COMPBENCH_TABLES.get(published, []), COMPBENCH)
        if name == "geneval":
            known = [
                row + ["-"] * (len(columns) - 1) for row in published_rows(GENEVAL.get(published, []), columns[:1])
            ]
        own = [who(record), "", *(cell(c, values.get(c)) for c in columns)]
        found.append((name, ["generator", "NFE", *columns], [*known, own]))
    return found


def left_out(missing: dict[str, str]) -> list[str]:
    """A line a reason, with the metrics that it leaves out."""
    reasons = dict.fromkeys(missing.values())
    return [f"left out: {', '.join(n for n, r in missing.items() if r == reason)}: {reason}" for reason in reasons]


def print_report(record: dict[str, Any], published: str, out: Path) -> None:
    """Prints the tables and writes them as OUT/table.md."""
    text = []
    for title, columns, rows in tables(record, published):
        print_table(title, columns, rows)
        text += [f"{title}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        text += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    text += [f"- {line}" for line in left_out(record["missing"])]
    (out / "table.md").write_text("\n".join(text) + "\n")
    print(f"results: {out / 'results.json'}, {out / 'table.md'}", flush=True)
