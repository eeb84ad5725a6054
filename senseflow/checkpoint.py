"""Checkpoints that a crash cannot spoil: written beside, synced, then renamed; read by checksum.

A checkpoint is a folder `step-00000123`, of one of two kinds. A run's holds what torch.distributed.checkpoint writes
(each rank its own files), `plain.pt` (everything that is no tensor) and, written last, `manifest.json` with size and
sha256 of each file; `saving.Saver` writes it, `read` reads it on any number of ranks. That of `save`, for one process,
is `state.pt` and `sha256`, its digest in hex.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError

STATE, DIGEST = "state.pt", "sha256"
MANIFEST, PLAIN, VERSION = "manifest.json", "plain.pt", 1
MARK = "__tensor__"  # {MARK: name} in plain.pt stands for a tensor
# Only `step-` is a finished save; a crash may leave the other, whole or not: the checksum tells.
_FOLDER = re.compile(r"(step-|\.partial-)(\d{8,})")
_PLAIN = (Tensor, str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)


def digest(path: Path) -> str:
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


def check_readable(value: Any, where: str) -> None:
    """Refuses now what `weights_only` would refuse at resume, when it is too late."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_readable(key, f"{where}, a key")
            check_readable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set, torch.Size):
        for i, item in enumerate(value):
            check_readable(item, f"{where}[{i}]")
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
    (partial / DIGEST).write_text(digest(partial / STATE))
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


def _prune(final: Path, keep_last: int, keep_best: int = 0) -> None:
    """Removes all but keep_last and the keep_best of the lowest score. `final` is whole and stays. One with a higher
    number is the ruin that a resume went around, or not ours to judge: it goes only if it is not whole."""
    steps = _folders(final.parent, ("step-",))
    older = [p for p in steps if _iteration(p) < _iteration(final)]
    newer = [p for p in steps if _iteration(p) > _iteration(final)]
    scored = sorted((score, -_iteration(p), p) for p in [*older, final] if (score := score_of(p)) is not None)
    best = {p for *_, p in scored[:keep_best]}
    doomed = [p for p in older[: max(len(older) - max(keep_last - 1, 0), 0)] if p not in best]
    for path in [*doomed, *(p for p in newer if _flaw(p))]:
        shutil.rmtree(path, ignore_errors=True)


def publish(partial: Path, final: Path, keep_last: int, keep_best: int = 0) -> None:
    """Makes a whole, synced `partial` the checkpoint `final`, then removes what crashes and keep_last left over."""
    _publish(partial, final)
    for left in _folders(final.parent, (".partial-",)):
        shutil.rmtree(left, ignore_errors=True)
    _prune(final, keep_last, keep_best)


def begin(folder: Path, iteration: int) -> tuple[Path, Path]:
    """(partial, final): an empty folder to write a checkpoint in, and its place when it is whole. Raises OSError.

    Leftovers of other crashes stay until it is: one may be the newest whole state.
    """
    partial, final = folder / f".partial-{iteration:08d}", folder / f"step-{iteration:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    return partial, final


def save(folder: Path, iteration: int, state: dict[str, Any], keep_last: int) -> Path:
    """Writes folder/step-<iteration> and removes all but the newest keep_last (at least this one).

    state: nested dicts and lists of tensors and plain types. A crash at any instant leaves a whole
    checkpoint, the new one or the one before. One process per folder saves at a time.
    Raises TypeError for a type that could not be read back, and UserError when the folder cannot
    be written; both leave earlier checkpoints as they were.
    """
    check_readable(state, "state")
    final, partial = folder / f"step-{iteration:08d}", folder / f".partial-{iteration:08d}"
    try:
        begin(folder, iteration)
        _write(partial, state)
        publish(partial, final, keep_last)
    except OSError as error:
        make_room(partial)
        raise UserError(f"checkpoint {final} cannot be written: {error.strerror}") from error
    return final


def make_room(partial: Path) -> None:
    """Removes what a failed save left; a whole one may by now be the only one of its iteration, and stays."""
    if _flaw(partial):
        shutil.rmtree(partial, ignore_errors=True)


def _flaw(path: Path) -> str:
    """Why a checkpoint is not whole, empty when it is."""
    try:
        if (path / MANIFEST).exists():
            return _flaw_by_manifest(path)
        if not (path / STATE).exists() and (path / PLAIN).exists():
            return f"{MANIFEST} is missing"
        expected = (path / DIGEST).read_bytes()
        return "" if expected == digest(path / STATE).encode() else "its checksum differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.strerror}"


# -- a run's checkpoints -------------------------------------------------------------------------------------------


def write_manifest(path: Path, files: Mapping[str, list], **record: Any) -> None:
    """manifest.json of a folder, on the disk when this returns. files: name -> [bytes, sha256]."""
    whole = dict(version=VERSION, **record, files=dict(files))
    whole["sha256"] = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    with (path / MANIFEST).open("w") as f:
        f.write(json.dumps(whole, indent=1))
        f.flush()
        os.fsync(f.fileno())
    _sync(path)


def manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError where it is not as it was written."""
    record = json.loads((path / MANIFEST).read_text())
    kept = record.pop("sha256")
    if kept != hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest():
        raise ValueError("its checksum differs")
    return record


def score_of(path: Path) -> float | None:
    """The score that a checkpoint was saved with, the lower the better; None where there is none."""
    try:
        return manifest(path).get("score")
    except (OSError, ValueError, KeyError):
        return None


def _flaw_by_manifest(path: Path) -> str:
    try:
        record = manifest(path)
    except (ValueError, KeyError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if record["version"] != VERSION:
        raise UserError(f"{path} has version {record['version']!r}: this program reads version {VERSION} alone")
    for name, (size, kept) in record["files"].items():
        found = (path / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes, not {size}"
        if digest(path / name) != kept:
            return f"{name}: its checksum differs"
    return ""


def split(state: Any, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """(tensors by name, the rest with a mark for each): of nested dicts and lists, the live tensors."""
    if isinstance(state, Tensor):
        return {name: state.detach()}, {MARK: name}
    if isinstance(state, dict) or type(state) in (list, tuple):
        tensors: dict[str, Tensor] = {}
        rest: dict[Any, Any] = {}
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            found, rest[key] = split(value, f"{name}/{key}" if name else str(key))
            tensors |= found
        return tensors, rest if isinstance(state, dict) else type(state)(rest.values())
    return {}, state


def join(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """The inverse of `split`; tensors that are not there leave their marks."""
    if isinstance(rest, dict):
        if rest.keys() == {MARK}:
            return tensors.get(rest[MARK], rest)
        return {key: join(tensors, value) for key, value in rest.items()}
    if type(rest) in (list, tuple):
        return type(rest)(join(tensors, value) for value in rest)
    return rest


def read_plain(path: Path) -> dict[str, Any]:
    """All of a checkpoint that is no tensor; of the older kind, all of it, its tensors mapped from the file."""
    file = path / (PLAIN if (path / MANIFEST).exists() else STATE)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=file.name == STATE)


def read(
    path: Path, live: Mapping[str, Tensor] | None = None, wanted: Callable[[str], bool] = lambda name: True,
    group: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """The state of a run's checkpoint. live: tensors by `split`'s names, sharded or not, that are filled in place on
    whatever number of ranks (all must read); those that are not there are made on the CPU. wanted: names to read.

    Raises UserError where a live tensor is not in it, or of another shape.
    """
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by one process alone: it may be
    reader = dcp.FileSystemReader(path)
    known: dict[str, Any] = {k: m for k, m in reader.read_metadata().state_dict_metadata.items() if wanted(k)}
    into: dict[str, Any] = dict(live or {})
    for name, t in into.items():
        if name not in known or known[name].size != t.shape:
            found = list(known[name].size) if name in known else "missing"
            raise UserError(f"{path}: {name} is {found} in the checkpoint and {list(t.shape)} here")
    for name, m in known.items():
        if name not in into:
            into[name] = torch.empty(m.size, dtype=m.properties.dtype)
    if into:
        dcp.load(into, storage_reader=reader, process_group=group, no_dist=group is None)
    return join(into, read_plain(path))


def is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file() or (path / MANIFEST).is_file()


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, None when there is none. Cut-off or altered ones (any byte) are passed over, with
    one warning that names them and the one used instead. Raises UserError for one of another version."""
    return _newest(folder, lambda path: None)[0]


def _newest(folder: Path, use: Callable[[Path], Any]) -> tuple[Path | None, Any]:
    """(path, use(path)) of the newest whole checkpoint that can be used."""
    if not folder.is_dir():
        return None, None
    passed, found, value = [], None, None
    for path in reversed(_folders(folder, ("step-", ".partial-"))):
        flaw = _flaw(path)
        if not flaw:
            try:
                value = use(path)
                found = path
                break
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                flaw = str(error).partition("\n")[0]
        passed.append(f"{path} ({flaw})")
    if passed:
        used = f"iteration {_iteration(found)} is used instead" if found else "and no other is there"
        text = f"incomplete checkpoint ignored: {', '.join(passed)}; {used}"
        warnings.warn(text, stacklevel=3)
    return found, value


def iteration_of(path: Path) -> int:
    return _iteration(path)


def load_latest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(iteration, state on the CPU) of the newest whole checkpoint, None when there is none; see `newest`.

    Only tensors and plain types are read (weights_only).
    """

    def use(path: Path) -> Any:
        if (path / MANIFEST).exists():
            return read(path)
        return torch.load(path / STATE, map_location="cpu", weights_only=True)

    path, state = _newest(folder, use)
    return None if path is None else (_iteration(path), state)


def load(path: Path, *parts: str) -> dict[str, Any]:
    """The state of one checkpoint folder on the CPU; tensors of the older kind are mapped from the file: what is not
    used is not read. parts: beginnings of the names of tensors to read of a run's ("updates/student"), all if none.

    Raises UserError when it is no whole checkpoint.
    """
    if flaw := _flaw(path):
        raise UserError(f"{path} is no whole checkpoint: {flaw}")
    try:
        if (path / MANIFEST).exists():
            return read(path, wanted=lambda name: not parts or name.startswith(parts))
        return read_plain(path)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no whole checkpoint: {str(error).partition(chr(10))[0]}") from None
