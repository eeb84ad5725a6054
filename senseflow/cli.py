"""`train [PRESET] [--profile] [--dry-run] [--resume] [--any.field VALUE]`: flags to a checked Config.

A small parser of our own, because every bad flag must give exactly one line: argparse and tyro print usage or boxes.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from senseflow.config import Config, UserError, replace, settings
from senseflow.presets import PRESETS

ALIASES = {"teacher": "model.teacher", "data": "data.path"}
SWITCHES = {
    "profile": "run one measured TTUR cycle: trace and table per phase",
    "dry-run": "print the plan and stop",
    "resume": "go on from the last checkpoint in --out",
}


@dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    config: Config
    profile: bool = False
    dry_run: bool = False
    resume: bool = False


def convert(name: str, kind: Any, text: str) -> Any:
    """text as a value of a field's type. Raises UserError naming field, value and what is allowed."""
    try:
        if get_origin(kind) is Literal:
            allowed = get_args(kind)
            return next(a for a in allowed if str(a) == text)
        if get_origin(kind) is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError, StopIteration):
        raise UserError(f"--{name} {text!r}: allowed is {describe(kind)}") from None


def describe(kind: Any) -> str:
    """What a field takes, in words."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "whole numbers with commas between"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words[kind]


def help_text(doc: str) -> str:
    """Everything: presets, switches, and each field with its unit, what it takes and the default of `tiny`."""
    first = doc.strip().splitlines()[0]
    lines = [first, "", f"PRESET: {', '.join(PRESETS)} (default tiny)", ""]
    lines += [f"  --{name:<26} {text}" for name, text in SWITCHES.items()]
    lines += [f"  --{alias:<26} same as --{name}" for alias, name in ALIASES.items()]
    section = ""
    for name, (kind, value, text) in settings(Config()).items():
        if name.partition(".")[0] != section and "." in name:
            section = name.partition(".")[0]
            lines.append("")
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"  --{name:<26} {text} [{describe(kind)}; default {shown!r}]")
    return "\n".join(lines)


def parse(argv: list[str], doc: str) -> Arguments:
    """The command line as Arguments. Raises UserError for anything unknown or out of range; --help exits 0."""
    rest = list(argv)
    if any(a in ("-h", "--help") for a in rest):
        print(help_text(doc))
        sys.exit(0)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "tiny"
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{near(name, PRESETS)}: allowed are {', '.join(PRESETS)}")
    config = PRESETS[name]()
    known = settings(config)
    flags = {switch.replace("-", "_"): False for switch in SWITCHES}
    changes: dict[str, Any] = {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected {word!r}: flags look like --train.lr 1e-5")
        field, given, value = word[2:].partition("=")
        if field in SWITCHES and not given:
            flags[field.replace("-", "_")] = True
            continue
        field = ALIASES.get(field, field)
        if field == "preset" or field not in known:
            raise UserError(f"unknown flag --{field}{near(field, known)}: see --help")
        if not given:
            if not rest:
                raise UserError(f"--{field} needs a value: {describe(known[field][0])}")
            value = rest.pop(0)
        changes[field] = convert(field, known[field][0], value)
    return Arguments(replace(config, changes), **flags)


def near(word: str, known: Any) -> str:
    """', did you mean ...?' or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
