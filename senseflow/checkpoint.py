"""Checkpoints that a crash cannot spoil: written beside, synced, then renamed; read by checksum.

A checkpoint is a folder `step-00000123`: `state.pt`, and `sha256`, its digest in hex.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError

STATE, DIGEST = "state.pt", "sha256"
# Only `step-` is a finished save; a crash may leave the other, whole or not: the checksum tells.
_FOLDER = re.compile(r"(step-|\.partial-)(\d{8,})")
_PLAIN = (Tensor, str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _iteration(path: Path) -> int:
    found = _FOLDER.fullmatch(path.name)
    assert found, path
    return int(found[2])


def _folders(folder: Path, prefixes: tuple[str, ...]) -> list[Path]:
    """Folders of these kinds, oldest first; of one iteration, the finished one last."""
    found = [p for p in folder.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir()]
    kept = [p for p in found if p.name.startswith(prefixes)]
    return sorted(kept, key=lambda p: (_iteration(p), p.name.startswith("step-"), p.name))


def _check_readable(value: Any, where: str) -> None:
    """Refuses now what `weights_only` would refuse at resume, when it is too late."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_readable(key, f"{where}, a key")
            _check_readable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set, torch.Size):
        for i, item in enumerate(value):
            _check_readable(item, f"{where}[{i}]")
    elif not (isinstance(value, Tensor) or type(value) in _PLAIN):
        raise TypeError(f"{where} is a {type(value).__name__}: allowed are tensors and plain types")


def _write(partial: Path, state: dict[str, Any]) -> None:
    """state.pt and its digest, on the disk when this returns."""
    partial.mkdir()
    with (partial / STATE).open("wb") as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:
            # A full disk, of which torch's closing of the archive makes another error.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    (partial / DIGEST).write_text(_digest(partial / STATE))
    for path in (partial / STATE, partial / DIGEST, partial):
        _sync(path)


def _publish(partial: Path, final: Path) -> None:
    """The rename that makes a checkpoint appear whole. A folder cannot be renamed over another: one
    of the same iteration goes first, as load_latest would read `partial` in between."""
    if final.exists():
        _sync(final.parent)
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(final.parent)


def _prune(final: Path, keep_last: int) -> None:
    """Removes all but keep_last. `final` is whole and stays. One with a higher number is the ruin
    that a resume went around, or not ours to judge: it goes only if it is not whole."""
    steps = _folders(final.parent, ("step-",))
    older = [p for p in steps if _iteration(p) < _iteration(final)]
    newer = [p for p in steps if _iteration(p) > _iteration(final)]
    doomed = older[: max(len(older) - max(keep_last - 1, 0), 0)]
    for path in [*doomed, *(p for p in newer if _flaw(p))]:
        shutil.rmtree(path, ignore_errors=True)


def save(folder: Path, iteration: int, state: dict[str, Any], keep_last: int) -> Path:
    """Writes folder/step-<iteration> and removes all but the newest keep_last (at least this one).

    state: nested dicts and lists of tensors and plain types. A crash at any instant leaves a whole
    checkpoint, the new one or the one before. One process per folder saves at a time.
    Raises TypeError for a type that could not be read back, and UserError when the folder cannot
    be written; both leave earlier checkpoints as they were.
    """
    _check_readable(state, "state")
    final = folder / f"step-{iteration:08d}"
    partial = folder / f".partial-{iteration:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Leftovers of other crashes go only after this save: one may be the newest whole state.
        if partial.exists():
            shutil.rmtree(partial)
        _write(partial, state)
        _publish(partial, final)
        for left in _folders(folder, (".partial-",)):
            shutil.rmtree(left, ignore_errors=True)
        _prune(final, keep_last)
    except OSError as error:
        if _flaw(partial):  # makes room; a whole one may by now be the only one of its iteration
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"checkpoint {final} cannot be written: {error.strerror}") from error
    return final


def _flaw(path: Path) -> str:
    """Why a checkpoint is not whole, empty when it is."""
    try:
        expected = (path / DIGEST).read_bytes()
        return "" if expected == _digest(path / STATE).encode() else "its checksum differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.strerror}"


def load_latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(iteration, state on the CPU) of the newest whole checkpoint, None when there is none.

    Cut-off or altered ones (any byte) are passed over, with one warning that names them and the
    one used instead. Only tensors and plain types are read (weights_only).
    """
    if not folder.is_dir():
        return None
    passed, found = [], None
    for path in reversed(_folders(folder, ("step-", ".partial-"))):
        flaw = _flaw(path)
        if not flaw:
            try:
                state = torch.load(path / STATE, map_location="cpu", weights_only=True)
                found = _iteration(path), state
                break
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                flaw = str(error).partition("\n")[0]
        passed.append(f"{path} ({flaw})")
    if passed:
        used = f"iteration {found[0]} is used instead" if found else "and no other is there"
        text = f"incomplete checkpoint ignored: {', '.join(passed)}; {used}"
        warnings.warn(text, stacklevel=2)
    return found


def load(path: Path) -> dict[str, Any]:
    """The state of one checkpoint folder, its tensors mapped from the file: what is not used is not read.

    Raises UserError when it is no whole checkpoint.
    """
    if flaw := _flaw(path):
        raise UserError(f"{path} is no whole checkpoint: {flaw}")
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no whole checkpoint: {str(error).partition(chr(10))[0]}") from None
