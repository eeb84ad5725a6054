"""Every table of README and docs/, made from committed result files; `python -m bench.docs` puts and checks them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


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


def plans_table() -> str:
    """README's memory table: of each plan in docs/memory.md its sum and the switches that made it fit."""
    text = (ROOT / "docs" / "memory.md").read_text()
    rows = []
    for plan in text[text.index("<!-- plans:") : text.index("<!-- plans end")].split("### ")[1:]:
        title, words = plan.partition("\n")[0], next(line for line in plan.splitlines() if line.startswith("python"))
        given = ("data.batch", "memory.device_gb", "memory.ranks", "model.variant", "dry-run")
        flags = [f"--{flag}" for flag in words.strip().split(" --")[1:] if flag.split()[0] not in given]
        cells = next(line for line in plan.splitlines() if line.startswith("│ sum")).strip("│ ").split("│")
        device, host = (*(c.strip() for c in cells[2:]), "")[:2]
        shown = "does not fit" if "It does not fit" in plan else f"{float(device):.1f}"
        rows.append([title, shown, f"{float(host):.0f}" if host else "", f"`{' '.join(flags)}`" if flags else ""])
    return table(["run", "GB planned", "on the host", "switches"], rows)


def moments_table() -> str:
    rows = read("bench/results/moments.json")["rows"]
    cells = [
        [r["score"].removeprefix("eval/"), f"{r['fp32']:.4g}", f"{r['eight']:.4g}", f"{r['spread']:.2g}"] for r in rows
    ]
    return table(["mean of 3 seeds", "fp32", "8-bit", "spread of fp32"], cells)


def data_table() -> str:
    from bench.data import table as lines

    return lines(read("bench/results/data-cpu-intel-r-xeon-r-processor-2-80ghz.json")) + "\n"


def mixture_table() -> str:
    from bench.mixture import lines

    return table(*lines(read("bench/results/mixture.json")))


def csrc_table() -> str:
    """Median of torch's forms over the median of ours, of the newest run of bench/test_csrc.py."""
    found = [json.loads(f.read_text()) for f in sorted((ROOT / "bench" / "results").glob("cpu-*/*.json"))]
    runs = [run for run in found if any(r["op"].startswith("csrc") for r in run["rows"])]
    rows = [r for r in max(runs, key=lambda run: run["environment"]["time"])["rows"] if r["op"].startswith("csrc")]
    cases, names = list(dict.fromkeys(r["case"] for r in rows)), {"csrc adamw": "AdamW + IDA + EMA, fp32"}
    cells = []
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [[r for r in rows if (r["op"], r["case"]) == (op, case)] for case in cases]
        pairs = [sorted(both, key=lambda r: r["kind"] != "ours") for both in mine]
        ratios = [f"{other['median_s'] / ours['median_s']:.2f}" for ours, other in pairs]
        cells.append([names.get(op, op.removeprefix("csrc ")), pairs[0][1]["form"], *ratios])
    return table(["", "beside", *cases], cells)


def fp8_table() -> str:
    """Relative errors at each sigma; of random teachers the score's alone: their guidance points nowhere."""
    record, rows = read("bench/results/fp8.json"), []
    for one in record["teachers"]:
        kinds = {"score": "score", "guided": "guided score", "dmd_gradient": "DMD gradient at the start"}
        for key, words in kinds.items() if not rows else [("score", "score")]:
            name = f"{one['teacher']} ({one['weights']:.1f} M weights): {words}"
            rows.append([name, *(f"{100 * row[key]:.2f} %" for row in one["rows"])])
    return table(["sigma", *(f"{row['sigma']:g}" for row in record["teachers"][0]["rows"])], rows)


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
    """A group's table and curves from docs/ablation; a line that says so where nothing is recorded yet."""

    def made() -> str:
        from senseflow.ablation import report

        records = report.read_records(ROOT / "docs" / "ablation")
        if group not in report.with_records(records):
            more = " --updates 96" if group == "unstable" else ""  # a fifth of the iterations an update
            return f"Not run yet: `python -m senseflow.ablate {group}{more}`.\n"
        curves = f"ablation/{group}.png"
        picture = f"\n![curves of the group {group}]({curves})\n" if (ROOT / "docs" / curves).is_file() else ""
        return table(*report.table(group, records)) + picture

    return made


def ablation_parts() -> str:
    """What each part of the method changes, over the seeds that both rows have."""
    from senseflow.ablation import report

    columns, rows = report.parts_table(report.read_records(ROOT / "docs" / "ablation"))
    return table(columns, rows) if rows else "Not run yet: `python -m senseflow.ablate`.\n"


def source(path: str, first: str, last: str) -> Callable[[], str]:
    """The lines of a file from the one that begins with `first` up to the one before `last`, as a block of code."""

    def made() -> str:
        text = (ROOT / path).read_text()
        lines = text[text.index(f"\n{first}") : text.index(f"\n{last}")].strip("\n").splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        return "```python\n" + "\n".join(line[indent:].rstrip() for line in lines).rstrip() + "\n```\n"

    return made


DROPIN = "examples/dmd2_dropin.py"
GROUPS = ("core", "removed", "ttur", "lambda", "variants", "midpoint", "steps", "thrift", "unstable")


COUNTED = ("tiny", "sd35-medium", "sd35-large", "flux-dev", "sdxl", "flux2-klein")
NUMBERS: dict[str, Callable[[], str]] = {
    "tiny-table": tiny_table,
    "tiny-seeds": tiny_seeds,
    "tiny-long": tiny_long,
    "moments-table": moments_table,
    "precision-table": precision_table,
    "memory-table": memory_table,
    "plans-short": plans_table,
    "data-table": data_table,
    "csrc-table": csrc_table,
    "mixture-table": mixture_table,
    "dropin-before": source(DROPIN, "def dmd_before", "# -- after"),
    "dropin-after": source(DROPIN, "def dmd_after", "# -- the loop"),
    "dropin-loop": source(DROPIN, "        # the student: one step", "    return run"),
    "fp8-table": fp8_table,
    "step-short": lambda: step_rows(
        "step-tiny",
        ["form", "iteration ms", "time / ours"],
        ("ours", "ours, compile", "released", "released, compiled"),
    ),
    "step-tiny": lambda: step_rows("step-tiny", [*STEP, *FORWARDS]),
    "step-tiny-intel": lambda: step_rows("step-tiny-intel", [*STEP, *FORWARDS]),
    "step-savings": lambda: step_rows("step-savings", [*STEP, *FORWARDS]),
    "step-modelopt": lambda: step_rows("step-modelopt", [*STEP, *FORWARDS[:3]]),
    "step-fastgen": lambda: step_rows("step-fastgen", [*STEP, *FORWARDS[:3]]),
    **{f"forwards-{preset}": forwards(preset) for preset in COUNTED},
    "ablation-parts": ablation_parts,
    **{f"ablation-{group}": ablation(group) for group in GROUPS},
}
