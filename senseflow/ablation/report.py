"""The ablation's report from its records alone: report.html, a PNG and a Markdown table a group."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from pathlib import Path
from typing import Any

from senseflow.ablation.rows import BASES, GROUPS, PARTS, UNSTABLE_PARTS
from senseflow.ablation.stats import Difference, holm, mean_and_half_width, paired
from senseflow.config import UserError
from senseflow.logs import FATAL

SCORES = [
    ("eval/kid_raw", "KID x1000", 1),
    ("eval/kid", "dithered KID x1000", 1),
    ("eval/fd", "FD", 1),
    ("eval/r1", "text R@1", 3),
    ("eval/cosine", "cosine", 3),
]
PANELS = [
    ("eval/kid", "dithered KID x1000"),
    ("fake_real_gap", "fake-real gap"),
    ("ida_drift", "|phi - theta| / |theta|"),
]
TESTED = "eval/kid"
NOTE = (
    "Mean over seeds, with the 95 % confidence interval of the mean (Student's t). Difference: row minus base over "
    "common seeds, which share data order and noises; two-sided paired t-test, p after Holm's correction over the "
    "group's rows. Diverging: runs of which a monitor said what `health.on_divergence stop` stops at. A row that "
    "diverged counts with its last score. "
    "The embedded teacher is small and memorises its few hundred pictures: this shows how the terms act on one small "
    "problem, not that they do so at the paper's scale."
)
HEAD = """<!doctype html><meta charset='utf-8'><title>senseflow: ablation</title>
<style>body{font:14px sans-serif;margin:2em} td,th{padding:2px 8px;text-align:right} img{max-width:100%}
td:first-child,th:first-child{text-align:left} table{border-collapse:collapse} tr{border-top:1px solid #ddd}</style>
<h1>Ablation on the embedded teacher</h1>"""
Records = dict[str, dict[int, dict[str, Any]]]  # row -> seed -> record


def read_records(folder: Path) -> Records:
    """All records under folder/runs. Raises UserError for a file that is none."""
    found: Records = {}
    for file in sorted((folder / "runs").glob("*.json")):
        try:
            record = json.loads(file.read_text())
            found.setdefault(record["row"], {})[record["seed"]] = record
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is no record of a run: remove it") from None
    return found


def shown(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def interval(values: list[float], digits: int) -> str:
    mean, half = mean_and_half_width(values)
    return shown(mean, digits) + (f" +- {shown(half, digits)}" if math.isfinite(half) else "")


def differences(group: str, records: Records, score: str = TESTED) -> dict[str, Difference | None]:
    """Row -> its difference to the group's base in one score at the end, Holm-corrected."""

    def finals(row: str) -> dict[int, float]:
        return {s: r["final"][score] for s, r in records.get(row, {}).items() if score in r["final"]}

    base = BASES[group]
    return holm({row.name: paired(finals(row.name), finals(base)) for row in GROUPS[group] if row.name != base})


def table(group: str, records: Records) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a group; rows without a record yet have no cells."""
    title = dict((name, text) for name, text, _ in SCORES)[TESTED]
    columns = ["row", "seeds", "diverging", *(text for _, text, _ in SCORES), f"best {title}", "fake-real gap", "drift",
               f"{title} minus {BASES[group]}", "p (Holm)"]  # fmt: skip
    apart, rows = differences(group, records), []
    for row in GROUPS[group]:
        runs = list(records.get(row.name, {}).values())
        if not runs:
            rows.append([row.title, "0", *["-"] * (len(columns) - 2)])
            continue
        ends = [([r["final"][k] for r in runs if k in r["final"]], digits) for k, _, digits in SCORES]
        cells = [interval(values, digits) if values else "-" for values, digits in ends]
        best = [r["best"][TESTED] for r in runs if TESTED in r["best"]]  # none: all ended before they were scored
        cells.append(interval(best, 1) if best else "-")
        for name in ("fake_real_gap", "ida_drift"):
            values = [late(r["curves"][name]) for r in runs if name in r["curves"]]
            cells.append(interval(values, 3) if values else "-")
        d = apart.get(row.name)
        gap = "-" if d is None else shown(d.mean, 1) + (f" +- {shown(d.half, 1)}" if math.isfinite(d.half) else "")
        p = "-" if d is None or d.adjusted is None else f"{d.adjusted:.2g}" + (" *" if d.significant else "")
        diverged = sum(r["status"] != "done" for r in runs)
        seeds = str(len(runs)) + (f", {diverged} diverged" if diverged else "")
        rows.append([row.title, seeds, str(sum(map(diverging, runs))), *cells, gap, p])
    return columns, rows


def at_end(record: dict[str, Any], name: str) -> float | None:
    """A score at the end, its mean over the evaluations after the start ("mean eval/..."), or the mean of a monitor's
    last quarter."""
    if name.startswith("mean "):
        values = [value for updates, value in record["curves"].get(name.removeprefix("mean "), []) if updates > 0]
        return math.fsum(values) / len(values) if values else None
    if name.startswith("eval/"):
        return record["final"].get(name)
    return late(record["curves"][name]) if name in record["curves"] else None


MEASURES = [
    ("eval/kid", "dithered KID x1000", 2),
    ("mean eval/kid", "the same, mean over the run", 2),
    ("eval/fd", "FD", 2),
    ("eval/r1", "text R@1", 4),
    ("fake_real_gap", "fake-real gap", 3),
    ("ida_drift", "drift", 4),
]


def parts_table(records: Records) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): what each part changes, with it minus without over common seeds, p of each score after Holm's
    correction over the parts of a family, tiny's rates or the unstable regime; of parts whose two rows have records."""
    families = [[p for p in family if p[1] in records and p[2] in records] for family in (PARTS, UNSTABLE_PARTS)]
    rows = [[words] for family in families for words, _, _ in family]
    for name, _, digits in MEASURES:

        def ends(row: str, name: str = name) -> dict[int, float]:
            values = {seed: at_end(record, name) for seed, record in records[row].items()}
            return {seed: value for seed, value in values.items() if value is not None}

        found: dict[str, Difference | None] = {}
        for family in families:
            found |= holm({words: paired(ends(row), ends(base)) for words, row, base in family})
        for line in rows:
            d = found[line[0]]
            cell = "-" if d is None else shown(d.mean, digits)
            if d is not None and d.adjusted is not None:
                cell += f" +- {shown(d.half, digits)}, p {d.adjusted:.2g}" + (" *" if d.significant else "")
            line.append(cell)
    return ["with it minus without", *(text for _, text, _ in MEASURES)], rows


def late(points: list[list[float]]) -> float:
    """Mean of a curve's last quarter: single iterations of a small batch say little."""
    tail = points[-max(len(points) // 4, 1) :]
    return math.fsum(v for _, v in tail) / len(tail)


def band(runs: list[dict[str, Any]], name: str) -> tuple[list[float], list[float], list[float]]:
    """(student updates, mean, half width) over seeds, at the points that all runs have."""
    curves = [dict(map(tuple, r["curves"].get(name, []))) for r in runs]
    common = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
    pairs = [mean_and_half_width([c[x] for c in curves]) for x in common]
    return common, [m for m, _ in pairs], [h if math.isfinite(h) else 0.0 for _, h in pairs]


def draw(group: str, records: Records, file: Path) -> None:
    """The curves of a group: score, fake-real gap, drift over student updates, bands over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for k, (name, label) in enumerate(PANELS):
        axes = figure.add_subplot(1, len(PANELS), k + 1, xlabel="student updates", ylabel=label, title=group)
        for row in GROUPS[group]:
            runs = list(records.get(row.name, {}).values())
            x, mean, half = band(runs, name)
            if x:
                low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
                (line,) = axes.plot(x, mean, label=row.title, linewidth=1.5)
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        if k == 0 and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(file, dpi=100)


def diverging(record: dict[str, Any]) -> bool:
    """Whether a run ended by itself, or a monitor said of it what a run does not come back from."""
    fatal = (*FATAL, "not finite")
    return record["status"] != "done" or any(text in line for line in record.get("warnings", []) for text in fatal)


def said(group: str, records: Records) -> list[str]:
    """What a group's monitors warned of, and how runs ended that did not end well."""
    lines = []
    for row in GROUPS[group]:
        for seed, record in sorted(records.get(row.name, {}).items()):
            texts = [*record.get("warnings", []), *([record["status"]] if record["status"] != "done" else [])]
            lines += [f"{row.name}, seed {seed}: {text}" for text in texts]
    return lines


def replaced(file: Path, text: str) -> None:
    """Writes a file at once, as another process may be writing it too."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)


def with_records(records: Records) -> list[str]:
    """Groups that have a row of their own recorded: the base of one may belong to others too."""
    return [group for group, rows in GROUPS.items() if any(r.name in records for r in rows if r.name != BASES[group])]


def html_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [("th", columns), *(("td", row) for row in rows)]
    cells = (f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in row)}</tr>" for tag, row in lines)
    return f"<table>{''.join(cells)}</table>"


def write_report(folder: Path, groups: list[str]) -> Path:
    """FOLDER/report.html with GROUP.png and GROUP.md of each of these groups and of those that have records. Returns
    the HTML file."""
    records = read_records(folder)
    parts = [HEAD, f"<p>{html.escape(NOTE)}</p>"]
    folder.mkdir(parents=True, exist_ok=True)
    for group in [g for g in GROUPS if g in {*groups, *with_records(records)}]:
        columns, rows = table(group, records)
        png = folder / f".{group}.{os.getpid()}.png"
        draw(group, records, png)
        image = base64.b64encode(png.read_bytes()).decode()
        os.replace(png, folder / f"{group}.png")
        lines = ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows)]
        replaced(folder / f"{group}.md", "\n".join(lines) + "\n")
        parts += [f"<h2>{group}, compared with {BASES[group]}</h2>", html_table(columns, rows),
                  f"<img alt='{group}: curves' src='data:image/png;base64,{image}'>",
                  *(f"<br>{html.escape(line)}" for line in said(group, records))]  # fmt: skip
    columns, rows = parts_table(records)
    if rows:
        parts += ["<h2>What each part changes</h2>", html_table(columns, rows)]
    file = folder / "report.html"
    replaced(file, "\n".join(parts) + "\n")
    return file
