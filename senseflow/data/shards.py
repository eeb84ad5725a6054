"""Writing a cache so that a crash, a kill or a full disk at any instant leaves no half shard that counts.

A shard is written beside its place, synced and renamed; its record (a JSON beside it: rows, captions, what was skipped,
sha256) is there first. The index is written when all shards are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from senseflow.config import UserError
from senseflow.data.cache import FORMAT, differing, is_cache, read_json
from senseflow.data.files import write_whole
from senseflow.data.samples import Skip, Skipped


def shard_file(folder: Path, kind: str, number: int) -> Path:
    """kind: images or prompts."""
    return folder / "shards" / f"{kind}-{number:05d}.safetensors"


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(captions: Sequence[str]) -> str:
    """sha256: binds a prompt shard to its prompts."""
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around all writing into a cache: one run at a time, and a full disk is one line. Raises UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cache {folder} cannot be written: {why}; what is finished stays, run it again") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """This run alone writes there. Raises UserError where another does, and for a folder of something else."""
    with writing(folder):
        there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        other = next((name for name in there if name != "shards" and not name.startswith(".")), None)
        if other and "settings.json" not in there:
            raise UserError(f"--out {folder} is no cache, it holds {other}: give a folder of its own")
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"cache {folder} is being written by another run") from None
        for left in (*folder.glob(".*.partial*"), *(folder / "shards").glob(".*.partial*")):
            left.unlink()
        yield


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Records the settings, or compares them with those recorded. Raises UserError naming a field that differs."""
    file = folder / "settings.json"
    if not file.exists():
        write_whole(file, to_json(settings))
        return
    try:
        recorded = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"{file} does not parse: give another --out") from None
    now = json.loads(to_json(settings))
    differing(recorded, {field: now[field] for field in settings})  # in this order: a cause before what follows from it


def write_shard(folder: Path, kind: str, number: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Puts a shard and its record in place. A shard without tensors (all its samples are unusable) is an empty file of
    the same format. Raises OSError, SafetensorError."""
    from safetensors.torch import save_file

    file = shard_file(folder, kind, number)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
        with partial.open("rb+") as f:
            os.fsync(f.fileno())
        digest = sha256_of(partial)
        file.unlink(missing_ok=True)  # whose record is gone: the new one is not this file's
        beside = file.with_suffix(".json")
        write_whole(beside, to_json(record | {"sha256": digest}))
        partial.chmod(beside.stat().st_mode)  # safetensors makes it the owner's alone
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def finished(folder: Path, kind: str, number: int, captions: Sequence[str] | None = None) -> dict[str, Any] | None:
    """A shard's record; None where the shard or the record is not there, or where it is of other prompts than
    `captions`. Raises UserError for one that is spoiled."""
    file = shard_file(folder, kind, number)
    record = file.with_suffix(".json")
    if not (file.is_file() and record.is_file()):
        return None
    try:
        found = dict(json.loads(record.read_text()))
        return found if captions is None or found["captions"] == digest_of(captions) else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{record} is spoiled ({error}): delete it and run senseflow.prepare again") from None


def skips_of(record: dict[str, Any]) -> list[Skip]:
    """What a shard's record lists as unusable."""
    return [Skip(*row) for row in record["skipped"]]


def distinct_captions(folder: Path, shards: int) -> dict[str, int]:
    """Caption -> its number, in the order of the samples."""
    found: dict[str, int] = {}
    for number in range(shards):
        record = finished(folder, "images", number)
        assert record is not None
        for *_, captions in record["rows"]:
            for caption in captions:
                found.setdefault(caption, len(found))
    return found


def finish(
    folder: Path, shards: int, prompt_shards: int, sizes: list[tuple[int, int]], skipped: Skipped, extra: dict[str, Any]
) -> int:
    """Writes skipped.jsonl, index.safetensors and index.json; returns the number of samples.

    sizes: (height, width) of the pictures, numbered as the order of training numbers its buckets. skipped: of the
    whole source, what its listing drops included. extra: what index.json says besides. Raises UserError where too much
    was unusable.
    """
    from safetensors.numpy import save

    captions = distinct_captions(folder, shards)
    rows: list[tuple[int, int, int]] = []
    first, prompts, files = [0], [], {}
    tensors: set[str] = set()
    for number in range(shards):
        record = finished(folder, "images", number)
        assert record is not None
        skipped.add(skips_of(record), skipped.total)
        tensors |= set(record["tensors"])
        for size, row, texts in record["rows"]:
            rows.append((number, sizes.index(tuple(size)), row))
            prompts += [captions[text] for text in texts]
            first.append(len(prompts))
        files[f"shards/images-{number:05d}.safetensors"] = record["sha256"]
    for number in range(prompt_shards):
        record = finished(folder, "prompts", number)
        assert record is not None
        files[f"shards/prompts-{number:05d}.safetensors"] = record["sha256"]
    skipped.begin(folder / "skipped.jsonl", fresh=True)
    columns = np.array(rows, np.int64).reshape(len(rows), 3)
    index = {"shard": columns[:, 0], "size": columns[:, 1], "row": columns[:, 2], "first": first, "prompts": prompts}
    data = save({k: np.ascontiguousarray(np.array(v, np.int64)) for k, v in index.items()})
    write_whole(folder / "index.safetensors", data)
    files["index.safetensors"] = hashlib.sha256(data).hexdigest()
    beside = [Path(name).with_suffix(".json") for name in files if name.startswith("shards")]
    records = {str(name): sha256_of(folder / name) for name in (*beside, Path("settings.json"), Path("skipped.jsonl"))}
    counts = dict(samples=len(rows), prompts=len(captions), skipped=dict(sorted(skipped.counts.items())))
    record = dict(format=FORMAT, sizes=sizes, tensors=sorted(tensors), files=files, records=records, **counts, **extra)
    write_whole(folder / "index.json", to_json(record))
    return len(rows)


def verify(folder: Path) -> Counter[str]:
    """Rereads every file of a finished cache: {"good": n, "bad": n}; a bad one is named in a line. Raises UserError for
    a cache that is not finished."""
    if not is_cache(str(folder)):
        raise UserError(f"--out {folder} holds no cache: name the folder that senseflow.prepare made")
    if not (folder / "index.json").is_file():
        raise UserError(f"cache {folder} is not finished: run the same senseflow.prepare again, it goes on")
    counts = Counter(good=0, bad=0)
    index = read_json(folder / "index.json")
    for name, expected in (index["files"] | index["records"]).items():
        try:
            flaw = "" if sha256_of(folder / name) == expected else "its checksum differs"
        except OSError as error:
            flaw = str(error.strerror)
        counts["bad" if flaw else "good"] += 1
        if flaw:
            print(f"{folder / name}: {flaw}", flush=True)
    return counts
