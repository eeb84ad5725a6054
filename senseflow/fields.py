"""A config by its fields: all of them by name, some of them changed, as plain JSON types and back."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any

from senseflow.config import Config
from senseflow.section import Section, UserError, describe, hints_of, near


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON types, sections as nested dicts."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def settings(config: Config) -> dict[str, tuple[Any, Any, str]]:
    """Every leaf of the config: "section.field" -> (type, value, doc), in order of declaration."""
    found: dict[str, tuple[Any, Any, str]] = {}
    hints = hints_of(Config)
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Section):
            inner = hints_of(type(value))
            for g in fields(value):  # type: ignore[arg-type]
                key = f"{f.name}.{g.name}"
                found[key] = (inner[g.name], getattr(value, g.name), g.metadata["doc"])
        else:
            found[f.name] = (hints[f.name], value, f.metadata["doc"])
    return found


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """A config with "section.field" -> value changed and checked. Raises UserError for an unknown field."""
    known = settings(config)
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in known:
            raise UserError(f"unknown field {key!r}{near(key, known)}: see --help")
        section, _, name = key.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        else:
            top[name] = value
    for section, values in sections.items():
        top[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **top)


def from_dict(data: dict[str, Any]) -> Config:
    """The inverse of to_dict; what is absent has its field's default. Raises UserError naming a bad key or value."""
    if not isinstance(data, dict):
        raise UserError(f"config = {data!r}: allowed is {describe(Config)}")
    sections = {f.name for f in fields(Config) if f.name not in settings(Config())}
    changes: dict[str, Any] = {}
    for key, value in data.items():
        if key in sections and not isinstance(value, dict):
            raise UserError(f"{key} = {value!r}: allowed is {describe(Section)}")
        if key in sections:
            changes |= {f"{key}.{k}": tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        else:
            changes[key] = value
    return replace(Config(), changes)
