"""webdataset tars, read at random: member offsets are looked up once a shard and kept in a small index file.

The cost, once: a local shard's headers are read, a remote shard is streamed whole. An index takes 48 bytes a sample
(16 more for each kind of text beyond .json and .txt) and its key, in memory and, packed, in SENSEFLOW_CACHE/index, by
the shard's path, size and time. Reading a sample afterwards is one range of one file: image and texts are neighbours.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from senseflow.config import UserError
from senseflow.data.files import open_file, read_range, stamp, write_whole
from senseflow.data.packages import cache_folder
from senseflow.data.samples import BadSample, Record, Skip, captions_of, decoded_json, decoded_text

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif")
INDEX_VERSION = 3


@dataclass
class Shard:
    """Where the samples of one tar are. members int64 [N, 1 + K, 2]: offset and size (-1: none) of the image and
    of the K text members; dropped: (key, reason, detail)."""

    path: str
    keys: list[str]
    members: np.ndarray
    dropped: list[tuple[str, str, str]] = field(default_factory=list)


def text_members(columns: Sequence[str]) -> tuple[str, ...]:
    """Extensions of the text members looked for: the two usual ones, then NAME and NAME.txt of each column."""
    return ("json", "txt", *columns, *(f"{c}.txt" for c in columns))


class _Builder:
    """Groups a tar's members into samples: neighbours with one name up to its first dot."""

    def __init__(self, texts: Sequence[str], needs_text: bool):
        self.texts, self.needs_text = texts, needs_text
        self.keys: list[str] = []
        self.rows: list[list[tuple[int, int]]] = []
        self.dropped: list[tuple[str, str, str]] = []
        self.seen: set[str] = set()
        self.key, self.row, self.fault = "", self._empty(), ""
        self.other = ""  # an image of this sample under a name that is not looked for

    def _empty(self) -> list[tuple[int, int]]:
        return [(0, -1)] * (1 + len(self.texts))

    def add(self, member: tarfile.TarInfo, limit: int) -> None:
        folder, _, name = member.name.rpartition("/")
        stem, _, ext = name.partition(".")
        key, ext = f"{folder}/{stem}".lstrip("/").removeprefix("./"), ext.lower()
        if key != self.key:
            self.close()
            self.key = key
        column = 0 if ext in IMAGES else 1 + self.texts.index(ext) if ext in self.texts else None
        if column is None:
            if stem and ext.rpartition(".")[2] in IMAGES:
                self.other = name
            return
        if self.row[column][1] >= 0:
            self.fault = self.fault or "duplicate key"
        if member.offset_data + member.size > limit:
            self.fault = "half tar"
        self.row[column] = (member.offset_data, member.size)

    def close(self) -> None:
        """The sample in progress is over."""
        key, row, fault, other = self.key, self.row, self.fault, self.other
        self.key, self.row, self.fault, self.other = "", self._empty(), "", ""
        if not key or (all(size < 0 for _, size in row) and not other):
            return
        if key in self.seen:
            fault = fault or "duplicate key"
        elif row[0][1] < 0:
            fault = fault or "no image"
        elif self.needs_text and all(size < 0 for _, size in row[1:]):
            fault = fault or "no caption"
        if fault:
            copy = f"{key}#{len(self.dropped)}" if fault == "duplicate key" else key
            detail = f"{other}: a name ends at its first dot" if fault == "no image" and other else ""
            self.dropped.append((copy, fault, detail if copy == key else f"{key} again"))
        else:
            self.keys.append(key)
            self.rows.append(row)
        self.seen.add(key)


def index_tar(path: str, texts: Sequence[str], needs_text: bool = True) -> Shard:
    """Reads a tar's headers. needs_text: a sample without a text member is dropped.

    A tar that breaks off keeps its whole samples; the one it breaks off in is dropped as "half tar", or the tar's end
    itself. Raises BadSample ("unreadable tar", "missing file") for a file that is none, or is compressed.
    """
    builder = _Builder(texts, needs_text)
    try:
        size, _ = stamp(path)
        with open_file(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            fault = ""
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError as error:
                    fault = str(error)
                    break
                if member is None:
                    break
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps each one it has seen
                if member.isfile():
                    builder.add(member, size)
            f.seek(tar.offset)
            end = f.read(512)
    except FileNotFoundError:
        raise BadSample("missing file", path) from None
    except UserError:  # no driver for such a URL
        raise
    except Exception as error:  # tarfile's, the system's, a remote file system's own
        raise BadSample("unreadable tar", str(error)) from None
    builder.close()
    if (fault or len(end) < 512 or any(end)) and not any(reason == "half tar" for _, reason, _ in builder.dropped):
        builder.dropped.append(("(end)", "half tar", fault or "no end-of-archive block"))
    members = np.array(builder.rows, np.int64).reshape(len(builder.rows), 1 + len(texts), 2)
    return Shard(path, builder.keys, members, builder.dropped)


def _raw(names: str) -> bytes:
    """As the file system or the tar has them: names need not be UTF-8."""
    return names.encode(errors="surrogateescape")


def cached_index(path: str, texts: Sequence[str], needs_text: bool) -> Shard:
    """`index_tar`, from the index file where there is one of this very tar. Raises BadSample."""
    try:
        size, mark = stamp(path)
    except FileNotFoundError:
        raise BadSample("missing file", path) from None
    except OSError as error:
        raise BadSample("unreadable tar", str(error)) from None
    name = hashlib.sha256(repr((INDEX_VERSION, path, size, mark, tuple(texts), needs_text)).encode()).hexdigest()
    file = cache_folder() / "index" / name[:2] / f"{name[:32]}.npz"
    try:
        with np.load(file, allow_pickle=False) as kept:
            keys = bytes(kept["keys"]).decode(errors="surrogateescape").split("\0") if kept["keys"].size else []
            rows = bytes(kept["dropped"]).decode(errors="surrogateescape").split("\n")
            dropped = [tuple(row.split("\t")) for row in rows if row]
            return Shard(path, keys, kept["members"], dropped)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, EOFError):
        shard = index_tar(path, texts, needs_text)
    out = io.BytesIO()
    lines = "\n".join("\t".join(part.replace("\t", " ").replace("\n", " ") for part in row) for row in shard.dropped)
    np.savez_compressed(
        out, members=shard.members, keys=np.frombuffer(_raw("\0".join(shard.keys)), np.uint8),
        dropped=np.frombuffer(_raw(lines), np.uint8),
    )  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, out.getvalue())
    except OSError:
        pass  # no room for the index: it is made again next time
    return shard


class TarSource:
    """Samples of many tars. Captions come from a sample's JSON member (columns by name), else from its text member."""

    has_images = True
    needs_text = True

    def __init__(self, paths: Sequence[str], columns: Sequence[str] = (), path: str = ""):
        """Raises UserError when no sample is left."""
        self.path, self.columns, self.texts = path or paths[0], tuple(columns), text_members(columns)
        self.dropped: list[Skip] = []
        self.shards: list[Shard] = []
        broken: list[Skip] = []
        with ThreadPoolExecutor(8) as pool:
            for name, found in zip(paths, pool.map(self._open, paths), strict=True):
                if isinstance(found, BadSample):
                    broken.append(Skip(name, found.reason, found.detail))
                else:
                    self.shards.append(found)
                    self.dropped += [Skip(f"{name}/{key}", why, detail) for key, why, detail in found.dropped]
        self.starts = np.cumsum([0, *(len(s.keys) for s in self.shards)])
        if not len(self):
            first = broken[0] if broken else self.dropped[0] if self.dropped else None
            why = f": {first.key}: {first.reason} {first.detail}" if first else ""
            raise UserError(f"data.path = {self.path!r}: no sample can be used{why}")
        typical = max(round(len(self) / len(self.shards)), 1)  # how much an unreadable shard stands for
        self.dropped += [Skip(s.key, s.reason, s.detail, typical) for s in broken]
        self.fingerprint = self._fingerprint()

    def _open(self, name: str) -> Shard | BadSample:
        try:
            return self.index(name)
        except BadSample as error:
            return error

    def index(self, name: str) -> Shard:
        return cached_index(name, self.texts, self.needs_text)

    def _fingerprint(self) -> str:
        """Of every key, offset and size, and of what stands beside a tar; not of the shards' folder, which may move."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(_raw("\n".join(shard.keys)) + b"\0" + shard.members.tobytes() + self.beside(shard))
        return digest.hexdigest()

    def beside(self, shard: Shard) -> bytes:
        """A digest of what else its samples are made of."""
        return b""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def where(self, item: int) -> tuple[Shard, int]:
        """The shard of an item and its row there."""
        number = int(np.searchsorted(self.starts, item, side="right")) - 1
        return self.shards[number], item - int(self.starts[number])

    def key(self, item: int) -> str:
        shard, row = self.where(item)
        return f"{shard.path}/{shard.keys[row]}"

    def read(self, item: int, head: int | None = None) -> Record:
        shard, row = self.where(item)
        image, *texts = self._members(shard, row, head)
        captions, meta = self.captions(shard, row, texts)
        if not captions:
            raise BadSample("no caption")
        return Record(self.key(item), image, captions, meta)

    def captions(self, shard: Shard, row: int, texts: list[bytes | None]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """(captions, meta) of a sample's text members: the JSON's columns, else the named members, else the .txt."""
        meta = decoded_json(texts[0]) if texts[0] is not None else {}
        named = {ext.removesuffix(".txt"): t for ext, t in zip(self.texts[2:], texts[2:], strict=True) if t is not None}
        found = meta | {name: decoded_text(raw) for name, raw in named.items()}
        captions = captions_of(found, self.columns)
        if not captions and not self.columns and texts[1] is not None:
            captions = captions_of({"txt": decoded_text(texts[1])}, ["txt"])
        return captions, meta

    def _members(self, shard: Shard, row: int, head: int | None) -> list[bytes | None]:
        """Contents of the image (its first `head` bytes) and of the text members, read as one range."""
        places = [(int(o), int(min(s, head) if head and not i else s)) for i, (o, s) in enumerate(shard.members[row])]
        there = [(o, s) for o, s in places if s >= 0]
        first, last = min(o for o, _ in there), max(o + s for o, s in there)
        if head and last - first > sum(s for _, s in there) + 2**20:  # a long image between: range by range
            return [read_range(shard.path, o, o + s) if s >= 0 else None for o, s in places]
        data = read_range(shard.path, first, last)
        if len(data) < last - first:
            raise BadSample("half tar", f"{shard.path} is shorter than it was")
        return [data[o - first : o - first + s] if s >= 0 else None for o, s in places]


class ParquetTarSource(TarSource):
    """img2dataset's output: NAME.tar, and beside it NAME.parquet with the captions and scores of its keys."""

    needs_text = False

    def __init__(self, paths: Sequence[str], columns: Sequence[str] = (), path: str = ""):
        self.tables: dict[str, Any] = {}
        super().__init__(paths, columns, path)

    def index(self, name: str) -> Shard:
        from senseflow.data.tables import KeyedTable

        shard = super().index(name)
        self.tables[name] = KeyedTable(name.removesuffix(".tar") + ".parquet", self.columns)
        return shard

    def beside(self, shard: Shard) -> bytes:
        return self.tables[shard.path].digest

    def captions(self, shard: Shard, row: int, texts: list[bytes | None]) -> tuple[tuple[str, ...], dict[str, Any]]:
        meta = self.tables[shard.path].row(shard.keys[row].rpartition("/")[2])
        return captions_of(meta, self.columns), meta
