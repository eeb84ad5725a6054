"""What a run tells: metrics held on the device and drained in blocks, files, progress, warnings."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError

FATAL = (  # what a run does not come back from
    "the normaliser is 10 times its first value",
    "the fake-real gap is 10 times its first value",
    "the fake is over half the student's norm away from it",
)

Row = dict[str, float]  # "iteration" and the metrics that this iteration had


class MetricRing:
    """Per-iteration scalars in one fp32 buffer on the device; one host copy per drain.

    names: the metrics that may come, none given: any. capacity: rows of the buffer, made larger
    when a drain is late (nothing is lost, nothing waits). device: of the buffer, None: of the first
    value. The host knows which metrics a row has, so the buffer holds values alone, packed.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        capacity: int = 64,
        device: torch.device | str | None = None,
    ):
        self.names = frozenset(names)
        self.capacity = capacity
        self.device = device
        self.buffer: Tensor | None = None
        self.rows: list[tuple[int, tuple[str, ...]]] = []
        self.used = 0

    @torch.no_grad()
    def put(self, iteration: int, metrics: dict[str, Tensor]) -> None:
        """metrics: tensors of one element, on the ring's device. No host sync.

        Raises KeyError for a name that was not announced.
        """
        if self.names and not self.names.issuperset(metrics):
            raise KeyError(f"not a metric of this ring: {sorted(set(metrics) - self.names)}")
        if metrics:
            values = [v.detach().to(torch.float32).reshape(()) for v in metrics.values()]
            end = self.used + len(values)
            torch.stack(values, out=self._room(end, values[0].device)[self.used : end])
            self.used = end
        self.rows.append((iteration, tuple(metrics)))

    def _room(self, size: int, device: torch.device) -> Tensor:
        if self.buffer is None:
            per_row = len(self.names) or size
            size = max(size, self.capacity * per_row)
            self.buffer = torch.empty(size, device=self.device or device)
        elif size > len(self.buffer):
            larger = self.buffer.new_empty(2 * size)
            larger[: self.used] = self.buffer[: self.used]
            self.buffer = larger
        return self.buffer

    def drain(self, mean: Callable[[Tensor], Tensor] = lambda t: t) -> list[Row]:
        """Every row since the last drain, in order: {"iteration": k, name: value}. mean: over ranks, of all values."""
        host = [] if self.buffer is None or not self.used else mean(self.buffer[: self.used]).tolist()
        out, at = [], 0
        for iteration, names in self.rows:
            part = host[at : at + len(names)]
            out.append({"iteration": iteration, **dict(zip(names, part, strict=True))})
            at += len(names)
        self.rows.clear()
        self.used = 0
        return out


class Diverged(UserError):
    """A monitor's limit that stops a run, or sends it back to the last checkpoint."""


class Monitors:
    """Warnings about a run that goes wrong, each said once.

    A metric is judged by its mean over the last WINDOW rows that have it, as single rows of a small
    batch say little; "first" is the first full window of this process.
    max_nonfinite: non-finite updates of one network in a row that stop the run. strict: what a run does not come back
    from does too. last_good: gives the newest checkpoint's path, asked for that message alone.
    """

    WINDOW = 20

    def __init__(
        self, max_nonfinite: int, last_good: Callable[[], Path | str | None] = lambda: None, strict: bool = False
    ):
        self.max_nonfinite, self.strict = max_nonfinite, strict
        self.last_good = last_good
        self.skipped: dict[str, int] = defaultdict(int)  # non-finite updates so far, by network
        self.in_a_row: dict[str, int] = defaultdict(int)
        self.windows: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=self.WINDOW))
        self.first: dict[str, float] = {}
        self.said: set[str] = set()

    def check(self, rows: Sequence[Row]) -> list[str]:
        """New warnings from drained rows. Raises Diverged when updates of one network were skipped max_nonfinite times
        in a row, and if strict for a metric that is not finite, a normaliser or a gap 10 times its first value, or a
        fake over half the student's norm away."""
        warnings = []
        for row in rows:
            for text in [*self._skips(row), *self._judge(row)]:
                if text not in self.said:
                    self.said.add(text)
                    warnings.append(f"iteration {row['iteration']:.0f}: {text}")
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on judging by, plain types."""
        windows = {k: list(w) for k, w in self.windows.items()}
        return dict(
            skipped=dict(self.skipped), in_a_row=dict(self.in_a_row), windows=windows, first=dict(self.first),
            said=sorted(self.said),
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped.update(state.get("skipped", {}))
        self.in_a_row.update(state.get("in_a_row", {}))
        for key, values in state.get("windows", {}).items():
            self.windows[key].extend(values)
        self.first.update(state.get("first", {}))
        self.said.update(state.get("said", []))

    def _skips(self, row: Row) -> list[str]:
        found = []
        for key in row:
            name = key.removesuffix("_skipped")
            if name == key:
                continue
            if not row[key]:
                self.in_a_row[name] = 0
                continue
            self.skipped[name] += 1
            self.in_a_row[name] += 1
            found.append(f"a non-finite {name} update was skipped (later ones are only counted)")
            if self.in_a_row[name] >= self.max_nonfinite:
                raise Diverged(
                    f"{name}: {self.in_a_row[name]} non-finite updates in a row at iteration "
                    f"{row['iteration']:.0f}: lower its learning rate, then --resume{self._good()}"
                )
        return found

    def _good(self) -> str:
        path = self.last_good()
        return f"; last good checkpoint: {path}" if path else ""

    def _judge(self, row: Row) -> list[str]:
        found = self._judged(row)
        fatal = [text for text in found if self.strict and ("not finite" in text or text in FATAL)]
        if fatal:
            raise Diverged(f"iteration {row['iteration']:.0f}: {fatal[0]}{self._good()}")
        return found

    def _judged(self, row: Row) -> list[str]:
        found = []
        mean: dict[str, float] = {}
        for key in ("normaliser", "fake_real_gap", "d_accuracy", "saturation"):
            if not math.isfinite(row.get(key, math.nan)):
                if key in row:
                    found.append(f"{key} is not finite")
                continue
            window = self.windows[key]
            window.append(row[key])
            if len(window) == self.WINDOW:
                mean[key] = sum(window) / self.WINDOW
                self.first.setdefault(key, mean[key])
        change = {k: v / self.first[k] for k, v in mean.items() if self.first[k] > 0}
        for text, bad in (
            (FATAL[0], change.get("normaliser", 1) > 10),
            (
                "the normaliser is under a tenth of its first value: it enlarges the gradient",
                change.get("normaliser", 1) < 0.1,
            ),
            (FATAL[1], change.get("fake_real_gap", 1) > 10),
            (FATAL[2], row.get("ida_drift", 0) > 0.5),
            (
                "the discriminator is always right (accuracy over 0.99)",
                mean.get("d_accuracy", 0) > 0.99,
            ),
            ("over 20 % of x0 is saturated", mean.get("saturation", 0) > 0.2),
        ):
            if bad:
                found.append(text)
        return found


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: first column left, the others right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: "[x]" is no markup
    # Wide where nobody looks: a log file should not cut columns at 80.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _truncate(path: Path, last: int) -> None:
    """Drops rows after iteration `last` and a row that a crash cut off; all rows at last = 0.

    Row by row and not by position: an evaluation may stand before the metrics of earlier
    iterations. Replaced by a rename, so that a crash here loses nothing.
    """
    if last <= 0 or not path.exists():
        path.write_text("")
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["iteration"] <= last:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def _json(row: Row) -> str:
    """One line of strict JSON: it has no NaN or infinity, so these become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class NoLog:
    """What `RunLog` is on the ranks that write nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None: ...

    def metrics(self, rows: Sequence[Row]) -> None: ...

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class RunLog:
    """The run folder's metrics.jsonl, TensorBoard events and picture grids, and the progress bar.

    total: iterations of the run. On resume, rows after iteration resume_at are dropped from both
    files; at 0 the run begins anew. Without a terminal a plain line stands in for the bar, every
    `seconds`. Raises UserError when the folder cannot be written or TensorBoard is not there.
    """

    SHOWN = ("dmd", "isg", "adv", "fake", "disc")

    def __init__(
        self,
        out: Path,
        tensorboard: bool,
        progress: bool,
        total: int,
        resume_at: int = 0,
        seconds: float = 10,
    ):
        self.out, self.total, self.start = out, total, resume_at
        self.progress, self.seconds = progress, seconds
        self.began = self.spoke = time.monotonic()
        self.shown: Row = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            _truncate(out / "metrics.jsonl", resume_at)
            self.file = (out / "metrics.jsonl").open("a")
            # Events from this step on, of earlier runs in the folder, are hidden by TensorBoard.
            self.writer = self._writer(resume_at + 1 if resume_at else 0) if tensorboard else None
        except OSError as error:
            raise UserError(f"out = {str(out)!r} cannot be written: {error.strerror}") from None
        self.bar: Any = self._bar() if progress and sys.stdout.isatty() else None

    def _writer(self, purge_step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard = True, but tensorboard is missing: run pip install -e '.[train]', or set False"
            ) from None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=purge_step)

    def _bar(self) -> Any:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        # Ten minutes: drains may be further apart than rich's 30 s, and the ETA would stay empty.
        bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
            speed_estimate_period=600,
        )
        self.task = bar.add_task("", total=self.total, completed=self.start, losses="")
        return bar

    def __enter__(self) -> RunLog:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        self.file.close()
        if self.writer:
            self.writer.close()

    def _write(self, rows: Sequence[Row]) -> None:
        try:
            self.file.writelines(_json(row) for row in rows)
            self.file.flush()
        except OSError as error:
            where = self.out / "metrics.jsonl"
            raise UserError(f"{where} cannot be written: {error.strerror}") from None
        if not self.writer:
            return
        for row in rows:
            for key, value in row.items():
                if key != "iteration":
                    self.writer.add_scalar(key, value, int(row["iteration"]))

    def metrics(self, rows: Sequence[Row]) -> None:
        """Writes drained rows and moves the progress bar."""
        self._write(rows)
        if not rows:
            return
        for row in rows:  # the newest of each loss: the generator's are not in every row
            self.shown |= {k: row[k] for k in self.SHOWN if k in row}
        at = int(rows[-1]["iteration"])
        losses = "  ".join(f"{k} {self.shown[k]:.3f}" for k in self.SHOWN if k in self.shown)
        if self.bar:
            self.bar.update(self.task, completed=at, losses=losses)
        elif self.progress and (time.monotonic() - self.spoke >= self.seconds or at == self.total):
            self.spoke = time.monotonic()
            left = (self.spoke - self.began) / max(at - self.start, 1) * (self.total - at)
            print(f"iteration {at}/{self.total}  {losses}  {left / 60:.1f} min left", flush=True)

    def evaluation(self, iteration: int, row: Row, grid: Tensor, picture_path: Path) -> None:
        """Writes the scores and the grid (uint8 [3, H, W], on the CPU) of one evaluation."""
        from PIL import Image

        self._write([{"iteration": iteration, **row}])
        try:
            picture_path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(picture_path)
        except OSError as error:
            raise UserError(f"{picture_path} cannot be written: {error.strerror}") from None
        if self.writer:
            self.writer.add_image("grid", grid, iteration)
            self.writer.flush()
        if iteration == self.start:  # what it took, a minute on a CPU, would be counted into every iteration left
            self.began = self.spoke = time.monotonic()
        scores = "  ".join(f"{k.removeprefix('eval/')} {v:.3g}" for k, v in row.items())
        self.say(f"iteration {iteration}: {scores or f'pictures in {picture_path}'}")

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A line that begins with "warning:"."""
        self.say(f"warning: {text}")
