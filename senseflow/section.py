"""What every section of the config is made of: typed, documented, checked fields, and the error of bad input."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import field, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Bad input: one line that says what, where, and what is allowed."""


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a section's fields. Kept: a plan's search makes hundreds of configs."""
    return get_type_hints(kind)


def describe(kind: Any) -> str:
    """What a field of this type takes, in words."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "whole numbers with commas between"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind, "a section: {field: value}")


def span(low: float, high: float) -> str:
    """A range, both ends allowed, in words."""
    return f"{low:.10g} to {high:.10g}" if high < math.inf else f"{low:.10g} or more"


def near(word: str, known: Iterable[str]) -> str:
    """The words `, did you mean ...?`, or none. A field is found by its bare name too: lr means train.lr."""
    names = list(known)
    found = [n for n in names if n.rpartition(".")[2] == word] or difflib.get_close_matches(word, names, n=1)
    return f", did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type. A whole number is a float too; true is no number."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(type(v) is int for v in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind or (isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, kind))


class Section:
    """A part of the config. Subclasses give RANGES: field -> (low, high), both allowed."""

    NAME = ""
    RANGES: dict[str, tuple[float, float]] = {}

    def __post_init__(self) -> None:
        prefix = f"{self.NAME}." if self.NAME else ""
        hints = hints_of(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if not _fits(value, hints[f.name]):
                raise UserError(f"{prefix}{f.name} = {value!r}: allowed is {describe(hints[f.name])}")
            low, high = self.RANGES.get(f.name, (-math.inf, math.inf))
            for number in value if isinstance(value, tuple) else [value] if isinstance(value, (int, float)) else []:
                if not (low <= number <= high and abs(number) != math.inf):
                    allowed = span(low, high) if low > -math.inf else "a finite number"
                    raise UserError(f"{prefix}{f.name} = {value!r} is out of range: allowed is {allowed}")
        for name in [f.name for f in fields(self) if f.name.endswith("_min")]:  # type: ignore[arg-type]
            low, high = getattr(self, name), getattr(self, name[:-4] + "_max")
            if low > high:
                top = name[:-4] + "_max"
                raise UserError(f"{self.NAME}.{name} = {low!r} is above {self.NAME}.{top} = {high!r}")


def doc(text: str, default: Any) -> Any:
    """A field with its documentation, shown by --help."""
    return field(default=default, metadata={"doc": text})
