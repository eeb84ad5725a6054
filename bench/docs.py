"""The numbers and links of README and docs/, held to the committed files: `python -m bench.docs` (`make docs`).

Numbers stand between `<!-- numbers NAME -->` and `<!-- /numbers -->` and come from NUMBERS[NAME] of bench/tables.py,
which reads result files alone. Without a flag a difference, a dead link or a name that is no longer in the code fails;
--write rewrites the numbers.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

from bench.tables import NUMBERS, ROOT

BLOCK = re.compile(r"(<!-- numbers ([\w.-]+) -->\n)(.*?)(<!-- /numbers -->)", re.S)
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
NAME = re.compile(r"`((?:[\w./-]+/)?[\w-]+\.py)(?:::|: )(\w+)`")
FENCE = re.compile(r"^```.*?^```", re.S | re.M)


def pages() -> list[Path]:
    """Every Markdown file that a user reads."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", ROOT / "csrc" / "README.md"]
    return [*named, *sorted((ROOT / "docs").rglob("*.md"))]


def same_table(a: str, b: str) -> bool:
    """Whether two blocks say the same: cells compared, whatever pads them; code to the letter."""
    if "```" in b:
        return a.strip() == b.strip()

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


def check_report() -> list[str]:
    """Tables of docs/ablation/report.html that are not those of its records."""
    from senseflow.ablation import report

    file = ROOT / "docs" / "ablation" / "report.html"
    text, records = file.read_text() if file.is_file() else "", report.read_records(file.parent)
    tables = {group: report.table(group, records) for group in report.with_records(records)}
    if report.parts_table(records)[1]:
        tables["parts"] = report.parts_table(records)
    return [f"{file.relative_to(ROOT)}: {name} differs from its records: python -m senseflow.ablate --report-only"
            for name, rows in tables.items() if report.html_table(*rows) not in text]  # fmt: skip


def problems(write: bool = False) -> list[str]:
    """Everything that README, CONTRIBUTING, kernels/README and docs/ say and the tree does not."""
    found = check_report()
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
