"""Files that ship inside installed packages, found without running a line of the package."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

INSTALL = "run: pip install -e '.[train]'"


def cache_folder() -> Path:
    """SENSEFLOW_CACHE, or ~/.cache/senseflow."""
    return Path(os.environ.get("SENSEFLOW_CACHE", Path.home() / ".cache" / "senseflow"))


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex. Computed once (10 GB take some 10 s) and kept in cache_folder()/digests by the file's
    path, size and time. Raises OSError."""
    stat = path.stat()
    name = hashlib.sha256(json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()
    kept = cache_folder() / "digests" / name
    try:
        found = kept.read_text()
        if len(found) == 64:
            return found
    except OSError:
        pass
    found = _digest(path, stat.st_size, stat.st_mtime_ns)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(found)
        os.replace(partial, kept)
    except OSError:
        pass  # no room: computed again next time
    return found


def package_file(package: str, relative_path: str, sha256: str) -> Path:
    """Path of a file inside the installed top-level package `package`, its content checked.

    The package is never imported: such packages are used as carriers of a data file only. The
    digest is computed once per process and file (and again if the file changes).

    Raises UserError when the package or the file is missing, or when the file is not the pinned
    one.
    """
    if "." in package:
        # find_spec imports the parents of a dotted name, which is what this function promises not
        # to do.
        raise ValueError(f"package must be a top-level name, got {package!r}")
    try:
        spec = find_spec(package)
    except (
        ImportError,
        ValueError,
    ):  # ValueError: something put a module without a spec in sys.modules
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise _user_error(f"package {package!r} is not installed: {INSTALL}")
    candidates = [Path(folder) / relative_path for folder in spec.submodule_search_locations]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise _user_error(f"{candidates[0]} is missing from package {package!r}: {INSTALL}")
    stat = path.stat()
    found = _digest(path, stat.st_size, stat.st_mtime_ns)
    if found != sha256:
        raise _user_error(
            f"{path} is corrupt or of another version: sha256 {found[:12]}..., "
            f"expected {sha256[:12]}...; "
            f"uninstall package {package!r} and {INSTALL}"
        )
    return path


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file; size and time are part of the key so that a changed file is read again."""
    del size, mtime_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _user_error(message: str) -> ValueError:
    from senseflow.config import UserError

    return UserError(message)
