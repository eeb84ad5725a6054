"""One sample as a source gives it, why one cannot be used, and the record of those."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from senseflow.config import UserError

CAPTION_COLUMNS = ("caption", "text", "prompt", "TEXT", "captions", "prompts", "top_caption")
LIMIT = 0.05  # share of unusable samples that stops a run
FIRST_CHECK = 1000  # samples that the share is of, at least: one bad file among the first ten is no verdict


class BadSample(Exception):
    """A sample that cannot be used. reason: one of a few words, what is counted; detail: this one's own."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Record:
    """One sample as it is stored. image: the file's bytes, None in a list of prompts; meta: its JSON or table row."""

    key: str
    image: bytes | None
    captions: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A sample that was not used. samples: how many it stands for (an unreadable shard: as the others hold)."""

    key: str
    reason: str
    detail: str = ""
    samples: int = 1


class Source(Protocol):
    """Image-text pairs by number. Read from several threads at once."""

    path: str
    has_images: bool
    dropped: list[Skip]  # what the listing alone shows to be unusable; not among the items
    fingerprint: str  # sha256 of the listing: names, places, sizes

    def __len__(self) -> int: ...

    def key(self, item: int) -> str:
        """The item's name, unique within the source."""
        ...

    def read(self, item: int, head: int | None = None) -> Record:
        """The item; of the image its first `head` bytes alone. Raises BadSample."""
        ...


def decoded_text(raw: bytes) -> str:
    """UTF-8 text, a byte-order mark dropped. Raises BadSample."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8", f"byte {error.start}") from None


def decoded_json(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises BadSample."""
    try:
        row = json.loads(decoded_text(raw))
    except ValueError as error:
        raise BadSample("JSON does not parse", str(error)) from None
    if not isinstance(row, dict):
        raise BadSample("JSON does not parse", f"an object was expected, found a {type(row).__name__}")
    return row


def captions_of(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """The captions in `columns` of a row, in their order; no columns: the first of CAPTION_COLUMNS that is there.

    A column holds one caption or a list of them. Empty ones are left out. Raises BadSample for text that is no UTF-8.
    """
    wanted = columns or [c for c in CAPTION_COLUMNS if row.get(c)][:1]
    found: list[str] = []
    for column in wanted:
        value = row.get(column)
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [v.strip() for v in values if isinstance(v, str) and v.strip()]
    for caption in found:
        if any(0xD800 <= ord(c) <= 0xDFFF for c in caption):  # a tokenizer would panic at half a surrogate pair
            raise BadSample("caption is not UTF-8", "half a surrogate pair")
    return tuple(found)


class Skipped:
    """What was not used, each once, in `skipped.jsonl`; stops the run when it is over LIMIT of what was tried."""

    def __init__(self, path: str, total: int, dropped: Sequence[Skip] = ()):
        """path: the source's, for messages. total: its samples, dropped ones included."""
        self.path, self.total = path, total
        self.counts: Counter[str] = Counter()
        self.known: set[str] = set()
        self.file: Path | None = None
        self._pending: list[Skip] = []
        self._note(dropped)

    def _note(self, skips: Iterable[Skip]) -> None:
        for skip in skips:
            if skip.key not in self.known:
                self.known.add(skip.key)
                self.counts[skip.reason] += skip.samples
                self._pending.append(skip)

    def begin(self, file: Path, fresh: bool) -> None:
        """Writes to `file` from now on; fresh: it is emptied, else what it lists counts. Raises UserError."""
        self.file = file
        kept = b"" if fresh or not file.exists() else file.read_bytes()
        for line in kept.splitlines(keepends=True):
            row = json.loads(line) if line.endswith(b"\n") else {}  # a crash may cut the last one off
            if row and row["key"] not in self.known:
                self.known.add(row["key"])
                self.counts[row["reason"]] += row["samples"]
        listed = {json.loads(line)["key"] for line in kept.splitlines(keepends=True) if line.endswith(b"\n")}
        self._pending = [skip for skip in self._pending if skip.key not in listed]
        self._write("wb", kept[: kept.rfind(b"\n") + 1])
        self.add([], 0)

    def _write(self, mode: str, data: bytes) -> None:
        assert self.file is not None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open(mode) as f:
                f.write(data)
        except OSError as error:
            raise UserError(f"{self.file} cannot be written: {error.strerror}") from None

    def add(self, skips: Iterable[Skip], tried: int) -> None:
        """Counts and writes new ones. tried: samples asked for so far. Raises UserError over the limit."""
        self._note(skips)
        if self._pending and self.file is not None:
            rows = [dict(key=s.key, reason=s.reason, detail=s.detail, samples=s.samples) for s in self._pending]
            self._write("ab", "".join(json.dumps(row) + "\n" for row in rows).encode())
            self._pending = []
        count, base = self.counts.total(), max(min(self.total, FIRST_CHECK), min(tried, self.total))
        if count > LIMIT * base:
            reason, most = self.counts.most_common(1)[0]
            where = f"; see {self.file}" if self.file else ""
            raise UserError(
                f"{self.path}: {count} of {base} samples cannot be used ({reason}: {most}), allowed is 5 %{where}"
            )
