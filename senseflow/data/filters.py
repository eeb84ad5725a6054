"""Which samples of a source are wanted: limits on sides, captions and scores, known before the first batch."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from senseflow.config import Data, UserError
from senseflow.data.files import write_whole
from senseflow.data.packages import cache_folder
from senseflow.data.pil import opened, oriented_size
from senseflow.data.samples import BadSample, Record, Source

HEAD = 2**16  # bytes of a file that hold its size; a long colour profile may push it further
COLUMNS = ("width", "height", "aesthetic", "nsfw")


@dataclass(frozen=True)
class Selection:
    """keep int64 [n]: the items wanted. width, height int64 [n]: of their pictures, where they were asked for; 1 for a
    picture that does not open. left_out: why the others are not wanted."""

    keep: np.ndarray
    width: np.ndarray | None
    height: np.ndarray | None
    left_out: Counter[str]

    def describe(self, total: int) -> str:
        """One line for the user."""
        reasons = ", ".join(f"{why}: {n:,}" for why, n in self.left_out.most_common())
        return f"data: {len(self.keep):,} of {total:,} samples kept" + (f" ({reasons})" if reasons else "")


def kept_captions(captions: Sequence[str], data: Data) -> tuple[str, ...]:
    """Those of the allowed length, in characters."""
    return tuple(c for c in captions if data.caption_min <= len(c) <= data.caption_max)


def _number(meta: Any, names: str) -> float:
    """The first of the named columns that holds a number; NaN where none does."""
    for name in names.split(","):
        value = meta.get(name.strip())
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return float("nan")


def _size(source: Source, item: int, record: Record) -> tuple[float, float]:
    """(width, height): of the metadata where it has both, else of the file. Raises BadSample."""
    width, height = _number(record.meta, "width"), _number(record.meta, "height")
    if width > 0 and height > 0:
        return width, height
    assert record.image is not None
    try:
        return oriented_size(opened(record.image))
    except BadSample as error:
        if len(record.image) < HEAD or error.reason in ("too small", "too many pixels", "animated"):
            raise
        whole = source.read(item).image
        assert whole is not None
        return oriented_size(opened(whole))


class _Facts:
    """A row of COLUMNS and whether a caption has an allowed length, for every item."""

    def __init__(self, source: Source, data: Data, sizes: bool, threads: int):
        self.source, self.data, self.sizes = source, data, sizes
        self.head = HEAD if sizes else 1
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            rows = list(pool.map(self.row, range(len(source)), chunksize=64))
        self.table = np.array(rows, np.float32).reshape(len(source), len(COLUMNS) + 1)

    def row(self, item: int) -> tuple[float, ...]:
        """NaN for what is not known; an unreadable sample is kept, so that the reader counts it by its reason."""
        nan = float("nan")
        try:
            record = self.source.read(item, self.head if self.source.has_images else None)
            good = float(bool(kept_captions(record.captions, self.data)))
            scores = _number(record.meta, self.data.aesthetic), _number(record.meta, self.data.nsfw)
            size = _size(self.source, item, record) if self.sizes else (nan, nan)
        except BadSample:
            return nan, nan, nan, nan, nan
        return *size, *scores, good


def _facts(source: Source, data: Data, sizes: bool, threads: int) -> np.ndarray:
    """float32 [N, 5], from the index folder where this very source was looked through before."""
    key = (1, source.fingerprint, sizes, data.aesthetic, data.nsfw, data.captions, data.caption_min, data.caption_max)
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    file = cache_folder() / "index" / name[:2] / f"{name[:32]}.facts.npy"
    try:
        table = np.load(file, allow_pickle=False)
        if table.shape == (len(source), len(COLUMNS) + 1):
            return table
    except (OSError, ValueError, EOFError):
        pass
    if len(source) > 10_000:
        print(f"data: looking through {len(source):,} samples, once, for what the filters ask", flush=True)
    table = _Facts(source, data, sizes, threads).table
    out = io.BytesIO()
    np.save(out, table)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, out.getvalue())
    except OSError:
        pass  # no room: looked through again next time
    return table


def select(source: Source, data: Data, threads: int = 8) -> Selection:
    """The items that data's limits allow, in the source's order.

    Without a limit and without buckets nothing is read. A sample without a score that a limit asks for is left out; one
    that cannot be read is kept, for the reader to count. Raises UserError where a limit's score is in no sample, or
    nothing is left.
    """
    count = len(source)
    sizes = source.has_images and bool(data.buckets or data.min_side or data.max_aspect)
    by_length = (data.caption_min, data.caption_max) != (Data.caption_min, Data.caption_max)
    if not (sizes or by_length or data.min_aesthetic > 0 or data.max_nsfw < 1):
        return Selection(np.arange(count), None, None, Counter())
    width, height, aesthetic, nsfw, good = _facts(source, data, sizes, threads).T
    keep, left_out = np.ones(count, bool), Counter()

    def drop(mask: np.ndarray, why: str) -> None:
        left_out[why] += int((mask & keep).sum())
        keep[mask] = False

    readable = ~np.isnan(good)
    for limit, values, names, worse in (
        (data.min_aesthetic > 0, aesthetic, data.aesthetic, aesthetic < data.min_aesthetic),
        (data.max_nsfw < 1, nsfw, data.nsfw, nsfw > data.max_nsfw),
    ):
        if limit:
            if np.isnan(values).all():
                raise UserError(
                    f"data.path = {source.path!r}: no sample has a column {names!r}, which a filter asks for"
                )
            drop(np.isnan(values) & readable, f"no {names.split(',')[0]} score")
            drop(worse, f"{names.split(',')[0]} score")
    if by_length:
        drop(good == 0, "caption length")
    if data.min_side:
        drop(np.fmin(width, height) < data.min_side, f"short side under {data.min_side}")
    if data.max_aspect:
        drop(np.fmax(width, height) / np.fmin(width, height) > data.max_aspect, f"aspect over {data.max_aspect:g}")
    chosen = np.flatnonzero(keep)
    if not len(chosen):
        raise UserError(f"data.path = {source.path!r}: no sample passes the filters: {dict(left_out)}")
    left_out = Counter({why: n for why, n in left_out.items() if n})
    if not sizes:
        return Selection(chosen, None, None, left_out)
    whole = [np.nan_to_num(v[chosen], nan=1).astype(np.int64) for v in (width, height)]
    return Selection(chosen, whole[0], whole[1], left_out)
