"""Where image-text pairs come from: folders, tars, img2dataset's output, a list in JSON, prompts without images."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from senseflow.config import UserError
from senseflow.data.files import expand, is_url, read_range
from senseflow.data.samples import BadSample, Record, Skip, Source, captions_of, decoded_json, decoded_text
from senseflow.data.tables import prompt_rows
from senseflow.data.tars import IMAGES, ParquetTarSource, TarSource

PROMPT_FILES = (".txt", ".jsonl", ".parquet")


class FileSource:
    """Image files and where their captions are: what a folder and a JSON list share.

    places: of each item the key, the file, and its captions, or the file that holds them.
    """

    has_images = True

    def __init__(self, path: str, places: list[tuple[str, str, dict[str, Any] | str]], columns: Sequence[str]):
        self.path, self.places, self.columns = path, places, tuple(columns)
        self.dropped: list[Skip] = []
        self.fingerprint = ""

    def __len__(self) -> int:
        return len(self.places)

    def key(self, item: int) -> str:
        return self.places[item][0]

    def read(self, item: int, head: int | None = None) -> Record:
        key, file, text = self.places[item]
        if isinstance(text, dict):
            meta, captions = text, captions_of(text, self.columns)
        elif text.endswith(".json"):
            meta = decoded_json(read_range(text))
            captions = captions_of(meta, self.columns)
        else:
            meta, captions = {}, captions_of({"txt": decoded_text(read_range(text))}, ["txt"])
        if not captions:
            raise BadSample("no caption")
        return Record(key, read_range(file, 0, head), captions, meta)


class FolderSource(FileSource):
    """A folder of pictures, its subfolders included, in the order of their names.

    The caption of a/b.jpg: its row in a/metadata.jsonl (`file_name`, and the caption's column) or in one of a folder
    above (`file_name` with the subfolder), else a/b.json (an object with that column), else a/b.txt, all of it one
    caption. Files of other kinds are passed over. Links are followed, each folder is read once.
    """

    def __init__(self, path: str, columns: Sequence[str] = ()):
        super().__init__(path, [], columns)
        self.rows: dict[str, dict[str, Any]] = {}  # of the metadata.jsonl read so far, by key
        digest, seen = hashlib.sha256(), set()
        for folder, subfolders, names in os.walk(path, onerror=self._unreadable, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # by a link, perhaps a ring of them
                subfolders[:] = []
                continue
            seen.add(real)
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            self._folder(Path(folder), sorted(names), digest)
        self.places.sort(key=lambda place: place[0])
        self.fingerprint = digest.hexdigest()
        if not self.places:
            why = f": {self.dropped[0].key}: {self.dropped[0].reason}" if self.dropped else ""
            raise UserError(f"data.path = {path!r}: no picture with a caption is in this folder{why}")

    def _unreadable(self, error: OSError) -> None:
        self.dropped.append(Skip(os.path.relpath(error.filename, self.path), "unreadable folder", str(error.strerror)))

    def _folder(self, folder: Path, names: list[str], digest: Any) -> None:
        there = set(names)
        where = os.path.relpath(folder, self.path)
        if "metadata.jsonl" in there:
            self._metadata(folder, where)
        for name in names:
            stem, dot, ext = name.rpartition(".")
            if not dot or ext.lower() not in IMAGES or name.startswith("."):
                continue
            key = os.path.normpath(os.path.join(where, name))
            sidecar = next((s for s in (f"{stem}.json", f"{stem}.txt") if s in there), None)
            if key not in self.rows and sidecar is None:
                self.dropped.append(Skip(key, "no caption"))
                continue
            text = self.rows.get(key) or str(folder / str(sidecar))
            try:
                there_is = (folder / name).stat()
                found = json.dumps(text) if key in self.rows else f"{sidecar} {os.stat(folder / str(sidecar)).st_size}"
            except OSError as error:  # a link to nowhere
                self.dropped.append(Skip(key, "missing file", str(error.strerror)))
                continue
            if not stat.S_ISREG(there_is.st_mode):  # reading a pipe would never end
                self.dropped.append(Skip(key, "unreadable file", "no regular file"))
                continue
            self.places.append((key, str(folder / name), text))
            digest.update(f"{key}\0{there_is.st_size}\0{found}\n".encode(errors="surrogateescape"))

    def _metadata(self, folder: Path, where: str) -> None:
        """Adds the rows of a metadata.jsonl; lines that cannot be used are dropped, and so are later duplicates."""
        try:
            lines = read_range(str(folder / "metadata.jsonl")).splitlines()
        except BadSample as error:
            lines = []
            self.dropped.append(Skip(os.path.join(where, "metadata.jsonl"), error.reason, error.detail))
        for number, line in enumerate(lines, 1):
            key = os.path.normpath(os.path.join(where, f"metadata.jsonl:{number}"))
            try:
                row = decoded_json(line) if line.strip() else {}
            except BadSample as error:
                self.dropped.append(Skip(key, error.reason, error.detail))
                continue
            name = row.get("file_name")
            if not isinstance(name, str):
                continue
            place = os.path.normpath(os.path.join(where, name))
            if place in self.rows:
                self.dropped.append(Skip(key, "duplicate key", name))
            elif place.startswith("..") or not (folder / name).is_file():
                self.dropped.append(Skip(key, "missing file", name))
            else:
                self.rows[place] = row


class ListSource(FileSource):
    """The JSON list of the released SenseFlow: {"keys": [...], "image_paths": [...], "prompts": [...]}, equally long.

    Paths are absolute, or relative to the JSON's folder. Without `keys`, the paths are the keys.
    """

    def __init__(self, path: str, lists: dict[str, Any]):
        super().__init__(path, [], ("prompt",))
        files, prompts = lists["image_paths"], lists.get("prompts", [])
        keys = lists.get("keys", files)
        for name, found in (("prompts", prompts), ("keys", keys)):
            if not isinstance(found, list) or len(found) != len(files):
                raise UserError(f"{path}: {name!r} must be a list as long as 'image_paths' ({len(files)})")
        seen: set[str] = set()
        for key, file, prompt in zip(map(str, keys), files, prompts, strict=True):
            if key in seen:
                self.dropped.append(Skip(f"{key}#{len(self.dropped)}", "duplicate key", str(file)))
            else:
                seen.add(key)
                full = str(file) if is_url(str(file)) else str(Path(path).parent / str(file))
                self.places.append((key, full, {"prompt": prompt}))
        self.fingerprint = hashlib.sha256(json.dumps([keys, files, prompts]).encode()).hexdigest()
        if not self.places:
            raise UserError(f"data.path = {path!r}: the list is empty")


class PromptSource:
    """Prompts without images, for backward simulation alone."""

    has_images = False

    def __init__(self, path: str, rows: Iterable[dict[str, Any] | BadSample], columns: Sequence[str] = ()):
        self.path = path
        self.prompts: list[tuple[str, tuple[str, ...]]] = []
        self.dropped: list[Skip] = []
        for number, row in enumerate(rows, 1):
            try:
                if isinstance(row, BadSample):
                    raise row
                if captions := captions_of(row, columns):
                    self.prompts.append((f"{number}", captions))
                else:
                    self.dropped.append(Skip(f"{number}", "no caption"))
            except BadSample as error:
                self.dropped.append(Skip(f"{number}", error.reason, error.detail))
        if not self.prompts:
            raise UserError(f"data.path = {path!r}: no prompt can be used")
        self.fingerprint = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def key(self, item: int) -> str:
        return self.prompts[item][0]

    def read(self, item: int, head: int | None = None) -> Record:
        key, captions = self.prompts[item]
        return Record(key, None, captions)


def _lines(path: str) -> Iterable[dict[str, Any] | BadSample]:
    """Rows of a .txt (a prompt a line, empty lines left out) or a .jsonl."""
    for line in read_range(path).splitlines():
        if not line.strip():
            continue
        try:
            yield decoded_json(line) if path.endswith(".jsonl") else {"prompt": decoded_text(line)}
        except BadSample as error:
            yield error


def _row_of(item: Any) -> dict[str, Any] | BadSample:
    """An entry of a JSON list of prompts: a string, or an object with columns."""
    if isinstance(item, dict):
        return item
    if isinstance(item, str):
        return {"prompt": item}
    return BadSample("no caption", f"a {type(item).__name__}")


def _json_source(path: str, columns: Sequence[str]) -> Source:
    try:
        found = json.loads(decoded_text(read_range(path)))
    except (ValueError, BadSample) as error:
        raise UserError(f"data.path = {path!r} does not parse: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("image_paths"), list):
        return ListSource(path, found)
    prompts = found.get("prompts") if isinstance(found, dict) else found
    if not isinstance(prompts, list):
        raise UserError(f"data.path = {path!r}: allowed is {{'keys', 'image_paths', 'prompts'}} or a list of prompts")
    return PromptSource(path, map(_row_of, prompts), columns)


def _tar_source(path: str, tars: list[str], columns: Sequence[str]) -> TarSource:
    """With parquet files where the first tar has one beside it."""
    beside = tars[0].removesuffix(".tar") + ".parquet"
    try:
        read_range(beside, 0, 4)
    except BadSample:
        return TarSource(tars, columns, path)
    return ParquetTarSource(tars, columns, path)


def open_source(path: str, columns: Sequence[str] = ()) -> Source:
    """The source that `path` is: a folder of pictures or of tars; a tar, a pattern of tars, or a URL of either; the
    released JSON list; prompts in .txt, .jsonl, .json or .parquet. columns: of the captions, none: the usual names.

    Raises UserError for a path that is not there, or that holds nothing usable.
    """
    if is_url(path) and not path.endswith((".tar", ".json", *PROMPT_FILES)):
        path = path.rstrip("/") + "/*.tar"
    if path.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise UserError(f"data.path = {path!r}: a compressed tar cannot be read at random; unpack it to .tar")
    if path.endswith(".tar"):
        return _tar_source(path, expand(path), columns)
    if not is_url(path) and not os.path.exists(path):
        raise UserError(f"data.path = {path!r} does not exist")
    if os.path.isdir(path):
        tars = sorted(str(p) for p in Path(path).glob("*.tar"))
        return _tar_source(path, tars, columns) if tars else FolderSource(path, columns)
    try:
        if path.endswith(".json"):
            return _json_source(path, columns)
        if path.endswith(".parquet"):
            return PromptSource(path, prompt_rows(path, columns), columns)
        if path.endswith(PROMPT_FILES):
            return PromptSource(path, _lines(path), columns)
    except BadSample as error:
        raise UserError(f"data.path = {path!r}: {error}") from None
    raise UserError(f"data.path = {path!r}: allowed is a folder, .tar, .json, .txt, .jsonl, .parquet or a pattern")
