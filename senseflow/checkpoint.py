"""Checkpoints that a crash cannot spoil: written beside, synced, then renamed; read back by checksum."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

STATE, DIGEST = "state.pt", "sha256"


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, iteration: int, state: dict[str, Any], keep_last: int) -> Path:
    """Writes folder/step-<iteration> and removes all but the newest keep_last. A crash at any instant leaves the
    earlier ones as they were: the new one appears whole, by one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{iteration:08d}"
    partial = folder / f".partial-{iteration:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    torch.save(state, partial / STATE)
    (partial / DIGEST).write_text(_digest(partial / STATE))
    for path in (partial / STATE, partial / DIGEST, partial):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _sync(folder)
    for old in steps(folder)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def load_latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(iteration, state) of the newest whole checkpoint, None when there is none. A cut-off or altered one is skipped
    with a warning. Only tensors and plain types are read (weights_only)."""
    for path in reversed(steps(folder)):
        try:
            if (path / DIGEST).read_text() != _digest(path / STATE):
                raise ValueError("checksum differs")
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            warnings.warn(f"checkpoint {path} is incomplete ({error}): ignored", stacklevel=2)
            continue
        return int(path.name.removeprefix("step-")), state
    return None
