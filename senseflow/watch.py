"""What ends a run early, and what shows that one no longer moves: signals, and ranks that are stuck."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from senseflow.dist import World

INTERRUPTED, RESUMABLE = 130, 75  # exit status after Ctrl-C; after SIGTERM or SIGUSR1: run again with --resume
SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: RESUMABLE, signal.SIGUSR1: RESUMABLE}


class Stop:
    """Ctrl-C, SIGTERM and SIGUSR1 (preemption) ask the run to save and end after the iteration in progress; a second
    Ctrl-C ends it at once. status: the exit status asked for, 0 while none is. say: a line tells that it was heard, as
    an evaluation in progress may take minutes."""

    def __init__(self, say: bool = False) -> None:
        self.status, self.say = 0, say
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self.before = {s: signal.signal(s, self._ask) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.status == INTERRUPTED:
            raise KeyboardInterrupt
        self.status = SIGNALS[signal.Signals(number)]
        if self.say:  # a system call: a signal may come in the middle of a write to sys.stderr
            os.write(2, b"\nstopping: saves after the iteration in progress; Ctrl-C again ends it at once\n")


def say_alone(text: str) -> None:
    """A line on stderr in one write, so that ranks do not mix."""
    sys.stderr.write(f"warning: {text.rstrip()}\n")
    sys.stderr.flush()


def stack_of(thread: int) -> str:
    """Where a thread stands, newest call last; a line where it has ended."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame else "it has ended\n"


class Watchdog:
    """Reports, from a thread of its own, a rank that has not moved for `seconds`, with the stack of its main thread.

    `beat(what)` says that this rank moves, and what it begins. Ranks tell each other how far they are through the
    process group's store; those that are behind are the stuck ones, the others wait for them. Each stall is reported
    once, by every rank for itself where it is behind, and by rank 0 in one line that names all of them. seconds 0: no
    thread. say: prints a line.
    """

    def __init__(self, world: World, seconds: float, say: Callable[[str], None]):
        self.world, self.seconds, self.say = world, seconds, say
        self.count, self.what, self.at = 0, "start", time.monotonic()
        self.main = threading.get_ident()
        self.store = _store() if world.size > 1 else None
        self.ended = threading.Event()
        self.reported = -1
        self.thread = threading.Thread(target=self._watch, name="senseflow-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(5)

    def beat(self, what: str) -> None:
        self.count, self.what, self.at = self.count + 1, what, time.monotonic()

    def _watch(self) -> None:
        while not self.ended.wait(min(self.seconds / 4, 15)):
            self._tell()
            count = self.count
            if time.monotonic() - self.at > self.seconds and self.reported != count:
                ended = self.ended.wait(min(self.seconds / 4, 15))  # until all have told where they stand
                if ended or self.count != count:  # it moved after all
                    continue
                self.reported = count
                self.say(self._report())

    def _tell(self) -> None:
        if self.store is not None:
            self.store.set(f"beat{self.world.rank}", json.dumps([self.count, self.what]))

    def _report(self) -> str:
        """Which ranks are behind; of this one, if it is, the stack."""
        waited = f"no progress for {time.monotonic() - self.at:.0f} s"
        where: dict[int, list[Any]] = {self.world.rank: [self.count, self.what]}
        for rank in range(self.world.size):
            if self.store is not None and rank != self.world.rank and self.store.check([f"beat{rank}"]):
                where[rank] = json.loads(self.store.get(f"beat{rank}"))
        least = min(count for count, _ in where.values())
        behind = {rank: what for rank, (count, what) in where.items() if count == least}
        silent = [rank for rank in range(self.world.size) if rank not in where]
        names = ", ".join(f"rank {rank} in {what}" for rank, what in behind.items())
        names += "".join(f", rank {rank} has not said anything" for rank in silent)
        text = f"{waited}: stuck: {names}"
        if self.world.rank in behind:
            text += f"; the stack of rank {self.world.rank}:\n{stack_of(self.main)}"
        return text


def _store() -> Any:
    """The process group's own key-value store, of which each rank has a connection."""
    import torch.distributed as td
    from torch.distributed.distributed_c10d import _get_default_store

    return td.PrefixStore("senseflow", _get_default_store())
