"""A run's checkpoints as they are written: by all ranks through torch.distributed.checkpoint, behind the training."""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

from senseflow import checkpoint
from senseflow.config import UserError
from senseflow.dist import World

SPARE = 64 << 20  # bytes that stay free on the disk


class Saver:
    """Writes checkpoints into `folder`, one at a time.

    `save` copies the state to host memory and returns; files are written, synced and hashed by a thread, then rank 0
    makes the checkpoint appear by a rename. A crash of any rank at any instant leaves the last whole one. background
    False: `save` returns when all that is done. keep_last, keep_best: see `checkpoint.publish`.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_best: int = 0, background: bool = True):
        self.folder, self.world, self.background = folder, world, background
        self.keep_last, self.keep_best = keep_last, keep_best
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by one process alone: it may be
        # Groups of its own: the thread must not meet what the training sends.
        self.group: Any = td.new_group(backend="gloo") if world.size > 1 else None
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.last: Path | None = None  # the newest that is whole

    def save(self, iteration: int, state: dict[str, Any], **record: Any) -> None:
        """Begins a checkpoint; waits for the one before. state: nested dicts and lists of tensors (sharded, or the same
        on all ranks) and plain types. record: for the manifest, of rank 0; `score`, the lower the better.

        Raises TypeError for a type that could not be read back, and UserError for too small a disk or what the last
        save failed by; earlier checkpoints stay as they were.
        """
        self.wait()
        tensors, plain = checkpoint.split(state)
        checkpoint.check_readable(plain, "state")
        partial, final = self._begin(iteration, sum(t.numel() * t.element_size() for t in tensors.values()))
        import torch.distributed.checkpoint as dcp

        try:
            pending = dcp.async_save(
                tensors, storage_writer=_writer(partial), process_group=self.group,
                no_dist=self.group is None,
            )  # fmt: skip
        except (OSError, RuntimeError) as error:
            raise self._said(error, partial, final) from None
        record = dict(iteration=iteration, ranks=self.world.size, time=time.time(), **record)
        self.thread = threading.Thread(target=self._finish, args=(pending, plain, partial, final, record), daemon=True)
        self.thread.start()
        if not self.background:
            self.wait()

    def _begin(self, iteration: int, size: int) -> tuple[Path, Path]:
        """The folder to write in, made by rank 0, if there is room for it."""
        problem = ""
        if self.world.main:
            try:
                partial, _ = checkpoint.begin(self.folder, iteration)
                free = shutil.disk_usage(self.folder).free
                if size + SPARE > free:
                    raise UserError(
                        f"no room for checkpoint {self.folder} of iteration {iteration}: {size / 1e9:.3g} GB to write, "
                        f"{free / 1e9:.3g} GB free; free some, then --resume{self._good()}"
                    )
                partial.mkdir()
            except OSError as error:
                problem = f"checkpoint folder {self.folder} cannot be written: {error.strerror}{self._good()}"
            except UserError as error:
                problem = str(error)
        problem = self.world.tell(problem)
        if problem:
            raise UserError(problem)
        name = f"{iteration:08d}"
        return self.folder / f".partial-{name}", self.folder / f"step-{name}"

    def _good(self) -> str:
        return f"; last good checkpoint: {self.last}" if self.last else ""

    def _finish(self, pending: Any, plain: Any, partial: Path, final: Path, record: dict[str, Any]) -> None:
        """On the thread: waits for the tensors, writes the rest, publishes. All ranks learn whether it went well."""

        def mine() -> dict[str, list[Any]]:
            pending.result()
            paths = partial.glob(f"__{self.world.rank}_*")
            return {path.name: [path.stat().st_size, checkpoint.digest(path)] for path in paths}

        files, problem = _tried(mine)
        try:
            found = self._of_each(files)  # a rank that does not come leaves the others waiting
            if self.world.main and all(f is not None for f in found):
                listed = {k: v for f in found for k, v in f.items()}
                _, problem = _tried(lambda: self._publish(plain, partial, final, record, listed))
            whys = self._of_each("" if problem is None else f"rank {self.world.rank}: {_last_line(problem)}")
        except BaseException as error:
            problem = problem or error
        else:
            why = next(filter(None, whys), "")
            problem = problem or (RuntimeError(why) if why else None)
        if problem is None:
            self.last = final
        elif self.world.main:
            self.failure = self._said(problem, partial, final)
        else:
            self.failure = UserError(f"checkpoint {final} cannot be written: {_last_line(problem)}")

    def _of_each(self, value: Any) -> list[Any]:
        """What every rank gives, on every rank."""
        found = [value]
        if self.group is not None:
            found = [None] * self.world.size
            td.all_gather_object(found, value, group=self.group)
        return found

    def _publish(self, plain: Any, partial: Path, final: Path, record: dict[str, Any], files: dict) -> None:
        with (partial / checkpoint.PLAIN).open("wb") as f:
            torch.save(plain, f)
            f.flush()
            os.fsync(f.fileno())
        for name in (checkpoint.PLAIN, ".metadata"):
            path = partial / name
            files[name] = [path.stat().st_size, checkpoint.digest(path)]
        checkpoint.write_manifest(partial, files, **record)
        checkpoint.publish(partial, final, self.keep_last, self.keep_best)

    def _said(self, error: BaseException, partial: Path, final: Path) -> UserError:
        """One line of what went wrong; the ruin is removed, to make room."""
        why = _os_error(error)
        if why is None and shutil.disk_usage(self.folder).free < SPARE:
            why = OSError(28, "No space left on device")
        text = (why.strerror or str(why)) if why else _last_line(error)
        if self.world.main:
            checkpoint.make_room(partial)
        return UserError(f"checkpoint {final} cannot be written: {text}{self._good()}")

    @property
    def failed(self) -> bool:
        return self.failure is not None

    def settled(self) -> Path | None:
        """The newest whole checkpoint, the one that is being written included if it becomes one."""
        if self.thread is not None:
            self.thread.join()
        return self.last

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole. Raises what it failed by."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            error, self.failure = self.failure, None
            raise error


def _writer(folder: Path) -> Any:
    """torch's writer of tensors. An error goes to the other ranks by pickle, which drops what it came from: so it is
    the file system's own where there is one."""
    import torch.distributed.checkpoint as dcp

    class Writer(dcp.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            written, error = _tried(lambda: super(Writer, self).write_data(plan, planner))
            if error is not None:
                raise _os_error(error) or error
            return written

    return Writer(folder)


def _tried(make: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """(make(), None), or (None, what it raised)."""
    try:
        return make(), None
    except BaseException as error:
        return None, error


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def _os_error(error: BaseException | None) -> OSError | None:
    """The file system's own error in what torch.distributed.checkpoint raised, where there is one."""
    seen: set[int] = set()
    stack = [error]
    while stack:
        e = stack.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, OSError):
            return e
        stack += [e.__cause__, e.__context__]
        stack += [pair[0] for pair in getattr(e, "failures", {}).values()]
    return None
