"""Files by path or by URL: sizes, ranges, patterns. Local paths go straight to the system, URLs through fsspec."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from senseflow.config import UserError
from senseflow.data.samples import BadSample

ATTEMPTS = 3  # of a remote read, a second and then two apart


def is_url(path: str) -> bool:
    """Whether a path is for fsspec: s3://, https://, memory://."""
    return "://" in path


def _filesystem(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"data.path = {path!r}: {error}") from None


@contextmanager
def _as_oserror() -> Iterator[None]:
    """Around what a remote file system does: each raises errors of its library's own (aiohttp's, botocore's)."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def expand(pattern: str) -> list[str]:
    """The paths that a pattern means, sorted: {00000..00041} and {a,b} written out, then * ? [] looked up.

    Names without wildcards are returned whether they exist or not. Raises UserError where wildcards find nothing.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]

    try:
        names = list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise UserError(f"data.path = {pattern!r}: its braces do not match") from None
    found: list[str] = []
    for name in names:
        if not any(c in name for c in "*?["):
            found.append(name)
        elif is_url(name):
            try:
                with _as_oserror():
                    fs, inner = _filesystem(name)
                    found += [fs.unstrip_protocol(path) for path in fs.glob(inner)]
            except OSError as error:
                raise UserError(f"data.path = {pattern!r} cannot be listed: {error}") from None
        else:
            found += glob.glob(name, recursive=True)
    if not found:
        raise UserError(f"data.path = {pattern!r}: no file has such a name")
    return sorted(found)


def stamp(path: str) -> tuple[int, str]:
    """(size, what changes when the file does: time or tag). Raises OSError."""
    if not is_url(path):
        stat = os.stat(path)
        return stat.st_size, str(stat.st_mtime_ns)
    with _as_oserror():
        fs, inner = _filesystem(path)
        info = fs.info(inner)
    marks = (info.get(k) for k in ("ETag", "etag", "mtime", "LastModified", "last_modified", "created"))
    return int(info["size"]), str(next((m for m in marks if m), ""))


def open_file(path: str) -> IO[bytes]:
    """For reading from front to back, with seeks. Raises OSError."""
    if not is_url(path):
        return open(path, "rb")
    with _as_oserror():
        fs, inner = _filesystem(path)
        return fs.open(inner, "rb")


def read_range(path: str, start: int = 0, end: int | None = None) -> bytes:
    """Bytes start to end (None: the file's) of a file; fewer where it is shorter.

    The file is opened anew each time: 10 us on a local disk, and one that has vanished is noticed.
    Raises BadSample ("missing file", "unreadable file").
    """
    try:
        if is_url(path):
            return _remote_range(path, start, end)
        with open(path, "rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            return os.pread(f.fileno(), max(min(size if end is None else end, size) - start, 0), start)
    except FileNotFoundError:
        raise BadSample("missing file", path) from None
    except OSError as error:
        raise BadSample("unreadable file", f"{path}: {error.strerror or error}") from None


def _remote_range(path: str, start: int, end: int | None) -> bytes:
    fs, inner = _filesystem(path)
    for attempt in range(ATTEMPTS):
        try:
            with _as_oserror():
                return fs.cat_file(inner, start=start or None, end=end)
        except FileNotFoundError:
            raise
        except OSError:
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(2**attempt)
    raise AssertionError


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside, syncs, renames: `path` is there whole or not at all. Raises OSError, and leaves nothing then."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
