"""What a run tells: metrics kept on the device and drained now and then, files, progress, warnings."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow.config import UserError


class MetricRing:
    """Per-iteration scalars on the device; one host copy per drain, none in between."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, list[str], Tensor]] = []

    def put(self, iteration: int, metrics: dict[str, Tensor]) -> None:
        """metrics: 0-d tensors."""
        values = torch.stack([v.detach().float().reshape(()) for v in metrics.values()])
        self.rows.append((iteration, list(metrics), values))

    def drain(self) -> list[dict[str, float]]:
        """Every row since the last drain: {"iteration": k, name: value}."""
        if not self.rows:
            return []
        host = torch.cat([values for _, _, values in self.rows]).tolist()
        out, at = [], 0
        for iteration, names, _ in self.rows:
            part = host[at : at + len(names)]
            out.append({"iteration": iteration, **dict(zip(names, part, strict=True))})
            at += len(names)
        self.rows.clear()
        return out


class Monitors:
    """Warnings about a run that goes wrong, each said once."""

    def __init__(self, max_nonfinite: int):
        self.max_nonfinite = max_nonfinite
        self.in_a_row: dict[str, int] = {}
        self.first_gap: float | None = None
        self.said: set[str] = set()

    def check(self, rows: Sequence[dict[str, float]]) -> list[str]:
        """New warnings from drained rows. Raises UserError when updates were skipped max_nonfinite times in a row."""
        warnings = []
        for row in rows:
            for key in [k for k in row if k.endswith("_skipped")]:
                self.in_a_row[key] = self.in_a_row.get(key, 0) + 1 if row[key] else 0
                if self.in_a_row[key] >= self.max_nonfinite:
                    raise UserError(
                        f"{key.removesuffix('_skipped')}: {self.in_a_row[key]} non-finite updates in a row at "
                        f"iteration {row['iteration']:.0f}: lower its learning rate, then --resume"
                    )
            gap = row.get("fake_real_gap")
            if gap is not None and self.first_gap is None:
                self.first_gap = gap
            for name, bad in (
                ("a non-finite update was skipped", any(row.get(k) for k in row if k.endswith("_skipped"))),
                ("over 20 % of x0 is saturated", row.get("saturation", 0) > 0.2),
                ("the discriminator is always right (accuracy > .99)", row.get("d_accuracy", 0) > 0.99),
                ("the fake has drifted from the student by over half its norm", row.get("ida_drift", 0) > 0.5),
                ("the fake-real gap is 10 times its first value", (gap or 0) > 10 * (self.first_gap or math.inf)),
            ):  # fmt: skip
                if bad and name not in self.said:
                    self.said.add(name)
                    warnings.append(f"iteration {row['iteration']:.0f}: {name}")
        return warnings


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


class RunLog:
    """The run folder's metrics.jsonl, TensorBoard events and picture grids, and the progress line.

    On resume, rows after the resumed iteration are dropped. Raises UserError when the folder cannot be written.
    """

    SHOWN = ("dmd", "isg", "adv", "fake", "disc")

    def __init__(self, out: Path, tensorboard: bool, progress: bool, total: int, resume_at: int = 0):
        self.out, self.total, self.start = out, total, resume_at
        self.began = self.spoke = time.monotonic()
        try:
            out.mkdir(parents=True, exist_ok=True)
            kept = self._kept(out / "metrics.jsonl", resume_at)
            self.file = (out / "metrics.jsonl").open("w")
        except OSError as error:
            raise UserError(f"out = {str(out)!r} cannot be written: {error.strerror}") from None
        self.file.writelines(kept)
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=resume_at or None)
        self.bar: Any = None
        self.task: Any = None
        if progress and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"))
            self.bar = Progress(*columns)
            self.task = self.bar.add_task("", total=total, completed=resume_at, losses="")
        self.progress = progress

    @staticmethod
    def _kept(path: Path, last: int) -> list[str]:
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= last]

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

    def metrics(self, rows: Sequence[dict[str, float]]) -> None:
        """Writes drained rows and moves the progress line."""
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
            for key, value in row.items():
                if self.writer and key != "iteration":
                    self.writer.add_scalar(key, value, int(row["iteration"]))
        self.file.flush()
        if not rows:
            return
        at = int(rows[-1]["iteration"])
        seen: dict[str, float] = {}
        for row in rows:
            seen |= {k: row[k] for k in self.SHOWN if k in row}
        losses = "  ".join(f"{k} {v:.3f}" for k, v in seen.items())
        if self.bar:
            self.bar.update(self.task, completed=at, losses=losses)
        elif self.progress and (time.monotonic() - self.spoke > 10 or at == self.total):
            self.spoke = time.monotonic()
            left = (self.spoke - self.began) / max(at - self.start, 1) * (self.total - at)
            print(f"iteration {at}/{self.total}  {losses}  {left / 60:.1f} min left", flush=True)

    def evaluation(self, iteration: int, row: dict[str, float], grid: Tensor, picture_path: Path) -> None:
        """Writes the scores and the grid (uint8 [3, H, W]) of one evaluation."""
        from PIL import Image

        self.file.write(json.dumps({"iteration": iteration, **row}) + "\n")
        self.file.flush()
        picture_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(picture_path)
        if self.writer:
            for key, value in row.items():
                self.writer.add_scalar(key, value, iteration)
            self.writer.add_image("grid", grid, iteration)
        self.say(f"iteration {iteration}: " + "  ".join(f"{k.removeprefix('eval/')} {v:.3g}" for k, v in row.items()))

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")
