"""The numbers and links of README and docs/, held to the committed files: `python -m bench.docs` (`make docs`).

Numbers stand between `<!-- numbers NAME -->` and `<!-- /numbers -->` and come from the function NAME below, which reads
result files alone. Without a flag a difference, a dead link or a name that is no longer in the code fails; --write
rewrites the numbers.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- numbers ([\w.-]+) -->\n)(.*?)(<!-- /numbers -->)", re.S)
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
NAME = re.compile(r"`((?:[\w./-]+/)?[\w-]+\.py)(?:::|: )(\w+)`")
FENCE = re.compile(r"^```.*?^```", re.S | re.M)


def pages() -> list[Path]:
    """Every Markdown file that a user reads."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
    return [*named, *sorted((ROOT / "docs").rglob("*.md"))]


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text())


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(columns)]
                     + ["| " + " | ".join(row) + " |" for row in lines[2:]]) + "\n"  # fmt: skip


def short(value: float, digits: int) -> str:
    """.868 for 0.868, -10 for -10.2."""
    text = f"{value:.{digits}f}"
    return re.sub(r"^(-?)0\.", r"\1.", text)


def evaluations(run: str) -> list[dict[str, float]]:
    lines = (ROOT / f"docs/tiny/{run}-metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "eval/kid" in row]


SCORES = (("eval/kid_raw", 0), ("eval/kid", 0), ("eval/fd", 1), ("eval/r1", 3), ("eval/cosine", 3))
SCORE_HEADS = ["KID x1000", "KID, dithered", "FD, dithered", "text R@1", "cosine"]


def tiny_table() -> str:
    """README's table: seed 0, its results.json beside its evaluations."""
    results = read("docs/tiny/seed0-results.json")
    columns = ["network calls", "KID x1000", "dithered: KID x1000", "FD", "text R@1", "text cosine"]

    def line(name: str, row: dict[str, str]) -> list[str]:
        return [name, *(re.sub(r"^(-?)0\.", r"\1.", row[c]) for c in columns)]

    def find(start: str, end: str = "") -> dict[str, str]:
        return next(r for r in results if r["generator"].startswith(start) and r["generator"].endswith(end))

    few = [r for r in results if r["generator"].startswith("teacher, 4 Euler steps")]
    unguided = min((r for r in few if "w = 1," in r["generator"]), key=lambda r: float(r["KID x1000"]))
    seen = evaluations("seed0")
    rows = [
        line("teacher, 50 guided steps, another seed: the floor", find("teacher, 50 Euler steps")),
        line("teacher, 4 Euler steps, its best guidance and shift", find("teacher, 4 Euler", "its best")),
        line("teacher, 4 Euler steps, no guidance", unguided),
        *([f"student at iteration {row['iteration']:.0f}", "4", *scores(row)] for row in seen[:-1]),
        line(f"student at the end ({seen[-1]['iteration']:.0f})", find("student, 4 steps, renoise")),
    ]
    return table(["against the teacher's 50 guided steps", "calls", *SCORE_HEADS], rows)


def scores(row: dict[str, float]) -> list[str]:
    return [short(row[name], digits) for name, digits in SCORES]


def tiny_seeds() -> str:
    """The last evaluation of every committed seed, beside the teacher's rows."""
    rows = [[f"teacher, {name}", *(short(row[k.removeprefix("eval/")], d) for k, d in SCORES)]
            for name, row in teacher_rows().items()]  # fmt: skip
    for seed in range(3):
        last = evaluations(f"seed{seed}")[-1]
        rows.append([f"student, seed {seed}, iteration {last['iteration']:.0f}", *scores(last)])
    return table(["generator", *SCORE_HEADS], rows)


def teacher_rows() -> dict[str, dict[str, float]]:
    reference = read("senseflow/assets/reference/reference.json")
    best = min(reference["few"], key=lambda row: row["kid_raw"])
    return {"50 guided steps, another seed": reference["many"], "4 steps, its best guidance": best}


def tiny_long() -> str:
    """Every evaluation of the longer run."""
    return table(["iteration", *SCORE_HEADS], [[f"{r['iteration']:.0f}", *scores(r)] for r in evaluations("long")])


def precision_table() -> str:
    rows = read("bench/results/precision.json")["rows"]
    names = ["theta share", "theta cosine", "phi share", "phi cosine"]
    return table(["form", *names], [[row["form"], *(f"{row[n]:.4f}" for n in names)] for row in rows])


def memory_table() -> str:
    """From the bytes of the dtypes: weight, gradient, moments, other half; 11.9e9 weights, student and fake."""
    forms: list[tuple[str, tuple[int, int, int, int | None], str]] = [
        ("fp32", (4, 4, 8, None), ""), ("split", (2, 2, 8, 2), ""), ("split, 8-bit moments", (2, 2, 2, 2), ""),
        ("split, 8-bit moments, in_backward", (2, 0, 2, 2), ""),
        ("stochastic, 8-bit moments, in_backward", (2, 0, 2, 0), ""),
        ("split, host", (2, 2, 0, 0), ", and 12 + 2 bytes a weight on the host"),
    ]  # fmt: skip
    rows = []
    for name, parts, more in forms:
        total = sum(p or 0 for p in parts)
        cells = ["" if p is None else str(p) for p in parts]
        rows.append([name, *cells, str(total), f"{2 * total * 11.9:.0f} GB{more}"])
    heads = ["weight", "gradient", "moments", "other half", "sum", "FLUX.1, 11.9e9: student + fake"]
    return table(["", *heads], rows)


def moments_table() -> str:
    rows = read("bench/results/moments.json")["rows"]
    cells = [
        [r["score"].removeprefix("eval/"), f"{r['fp32']:.4g}", f"{r['eight']:.4g}", f"{r['spread']:.2g}"] for r in rows
    ]
    return table(["mean of 3 seeds", "fp32", "8-bit", "spread of fp32"], cells)


def step_rows(file: str, columns: list[str], wanted: tuple[str, ...] = ()) -> str:
    """Rows of a raw file of bench.step, some by name, and under them what ran; a line where none is recorded."""
    path = f"bench/results/{file}.json"
    if not (ROOT / path).exists():
        return "Not timed yet.\n"
    record = read(path)
    rows = [r for r in record["rows"] if not wanted or r["form"] in wanted]

    def cell(row: dict[str, Any], column: str) -> str:
        low, high = row["quartiles_over_ours"]
        networks = ("student", "teacher", "fake", "backbone")
        return {
            "form": row["form"], "critic ms": f"{row['critic_ms']:.0f}", "generator ms": f"{row['generator_ms']:.0f}",
            "iteration ms": f"{row['iteration_ms']:.0f}", "time / ours": f"{row['over_ours']:.2f}",
            "quartiles": f"{low:.2f} to {high:.2f}", **{n: f"{row['pictures'].get(n, 0):.2f}" for n in networks},
        }[column]  # fmt: skip

    where, names = record["environment"], [r["form"] for r in record["rows"]]
    # Older files have the names of forms without the shell's quotes.
    command = where["command"].replace("--only " + " ".join(names), "--only " + shlex.join(names))
    said = (
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}: medians of "
        f"{rows[0]['iterations']} iterations, batch {record['batch']}; `{command}`"
    )
    return table(columns, [[cell(row, c) for c in columns] for row in rows]) + f"\n{said}.\n"


STEP = ["form", "critic ms", "generator ms", "iteration ms", "time / ours", "quartiles"]
SHORT = ("ours", "ours, compile", "released", "released, compiled")
FORWARDS = ["student", "teacher", "fake", "backbone"]


def forwards(preset: str) -> Callable[[], str]:
    """A preset's table of forward-equivalents."""

    def made() -> str:
        from bench.forwards import table_of

        found = read("bench/results/forwards.json")["presets"].get(preset)
        return "Not counted yet.\n" if found is None else table_of(found)

    return made


def ablation(group: str) -> Callable[[], str]:
    """A group's table from docs/ablation/runs; a line that says so where nothing is recorded yet."""

    def made() -> str:
        from senseflow.ablation import report

        records = report.read_records(ROOT / "docs" / "ablation")
        columns, rows = report.table(group, records)
        if all(row[1] == "0" for row in rows):
            return f"Not run yet: `python -m senseflow.ablate {group}`.\n"
        return table(columns, rows)

    return made


COUNTED = ("tiny", "sd35-medium", "sd35-large", "flux-dev", "sdxl", "flux2-klein")
GROUPS = ("core", "ttur", "lambda", "variants", "midpoint", "steps", "unstable")
NUMBERS: dict[str, Callable[[], str]] = {
    "tiny-table": tiny_table,
    "tiny-seeds": tiny_seeds,
    "tiny-long": tiny_long,
    "moments-table": moments_table,
    "precision-table": precision_table,
    "memory-table": memory_table,
    "step-short": lambda: step_rows(
        "step-tiny",
        ["form", "iteration ms", "time / ours"],
        ("ours", "ours, compile", "released", "released, compiled"),
    ),
    "step-tiny": lambda: step_rows("step-tiny", [*STEP, *FORWARDS]),
    "step-savings": lambda: step_rows("step-savings", [*STEP, *FORWARDS]),
    "step-modelopt": lambda: step_rows("step-modelopt", [*STEP, *FORWARDS[:3]]),
    "step-fastgen": lambda: step_rows("step-fastgen", [*STEP, *FORWARDS[:3]]),
    **{f"forwards-{preset}": forwards(preset) for preset in COUNTED},
    **{f"ablation-{group}": ablation(group) for group in GROUPS},
}


def same_table(a: str, b: str) -> bool:
    """Whether two blocks say the same: cells compared, whatever pads them."""

    def plain(text: str) -> list[list[str]]:
        return [[cell.strip(" -:") if set(cell.strip()) <= set("-:") else cell.strip() for cell in line.split("|")]
                for line in text.strip().splitlines()]  # fmt: skip

    return plain(a) == plain(b)


def check_numbers(page: Path, write: bool) -> list[str]:
    """Differences of a page's blocks to their files; with `write` the page is rewritten instead."""
    text, found = page.read_text(), []

    def block(match: re.Match[str]) -> str:
        name, old = match[2], match[3]
        if name not in NUMBERS:
            found.append(f"{page.relative_to(ROOT)}: no numbers are called {name!r}")
            return match[0]
        new = NUMBERS[name]()
        if same_table(old, new) and not write:
            return match[0]
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "page", "files", lineterm="", n=0)
        if not write:
            found.append(f"{page.relative_to(ROOT)}: {name} differs from its files\n  " + "\n  ".join(lines))
        return f"{match[1]}\n{new}\n{match[4]}"  # blank lines: mkdocs sees no table right after a comment

    changed = BLOCK.sub(block, text)
    if write and changed != text:
        page.write_text(changed)
    return found


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def check_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere: no such file, or no such heading."""
    found, text = [], FENCE.sub("", page.read_text())
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            found.append(f"{page.relative_to(ROOT)}: {target} is not there")
        elif part and file.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), re.M)
            if part not in map(anchor, heads):
                found.append(f"{page.relative_to(ROOT)}: {target} has no such heading")
    return found


def check_names(page: Path) -> list[str]:
    """`file.py: name` and `file.py::test` that the code does not have any more."""
    found = []
    for path, name in NAME.findall(page.read_text()):
        places = (
            [ROOT / path, ROOT / "senseflow" / path]
            if "/" in path
            else [*ROOT.glob(f"tests/**/{path}"), *ROOT.glob(f"senseflow/**/{path}")]
        )
        texts = [place.read_text() for place in places if place.is_file()]
        if not any(re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b.*=", text, re.M) for text in texts):
            found.append(f"{page.relative_to(ROOT)}: {path} has no {name}")
    return found


def problems(write: bool = False) -> list[str]:
    """Everything that README, CONTRIBUTING, kernels/README and docs/ say and the tree does not."""
    found = []
    for page in pages():
        found += check_numbers(page, write) + check_links(page) + check_names(page)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.docs", description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the numbers from their files")
    args = parser.parse_args(argv)
    found = problems(args.write)
    for line in found:
        print(line, file=sys.stderr)
    blocks = sum(len(BLOCK.findall(page.read_text())) for page in pages())
    print(f"docs: {len(pages())} pages, {blocks} tables of numbers, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
