"""Daemon threads that work through a queue.

concurrent.futures' threads are waited for when the interpreter ends: one that sits in a read of a disk which is gone
would turn the line that says so into a process that never ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from senseflow.config import UserError

GRACE = 5.0  # seconds that `close` waits for what is in progress


def result(future: Future[Any], seconds: float, what: str) -> Any:
    """Of a future, or what was raised there. Raises UserError where nothing comes for that long."""
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # raised there, not here
            return future.result()
        raise UserError(f"no {what} for {seconds:g} s (data.timeout): is the data's disk or network gone?") from None


class Threads:
    """`count` of them, started at the first call."""

    def __init__(self, count: int, name: str):
        self.queue: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self.threads = [threading.Thread(target=self._work, name=f"{name}_{i}", daemon=True) for i in range(count)]
        self.lock, self.started, self.closed = threading.Lock(), False, False

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Its result, or what it raises, to come."""
        future: Future[Any] = Future()
        with self.lock:
            if self.closed:
                raise RuntimeError("these threads are closed")
            self.queue.put((future, function, arguments))
            if not self.started:
                self.started = True
                for thread in self.threads:
                    thread.start()
        return future

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Of each item, in their order."""
        return [future.result() for future in [self.submit(function, item) for item in items]]

    def close(self) -> None:
        """What has not begun is cancelled; what has is waited for, for GRACE seconds."""
        with self.lock:
            self.closed = True
        try:
            while (task := self.queue.get_nowait()) is not None:
                task[0].cancel()
        except Empty:
            pass
        for _ in self.threads:
            self.queue.put(None)
        until = time.monotonic() + GRACE
        for thread in self.threads if self.started else ():
            thread.join(max(until - time.monotonic(), 0))

    def _work(self) -> None:
        while (task := self.queue.get()) is not None:
            future, function, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # heard where the result is asked for
                future.set_exception(error)
            del task, future, function, arguments  # the result lives as long as its reader wants it
