"""The session of `pytest bench`: one `measure` for every benchmark, the table at the end, the result file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from bench import harness, report

HERE = Path(__file__).parent


class Session:
    """What was measured so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.partial = False


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session()
    if harness.CUDA and os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("bench: TRITON_INTERPRET=1 would time the interpreter: unset it")


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    # Its table says neither bytes nor launches; ours does. -v brings it back.
    plugin = getattr(session.config, "_benchmarksession", None)
    if plugin is not None and session.config.option.verbose <= 0:
        plugin.quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.benchmark(timer=harness.clock))


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[SESSION].partial = True


@pytest.fixture(autouse=True)
def _quiet_machine() -> Iterator[None]:
    """The right path of our ops, the same numbers every run, no tensors left over."""
    torch.manual_seed(0)
    with harness.kernels():
        yield
    if harness.CUDA:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    found = request.config.stash[SESSION]
    found.rows.append(harness.copy_row())
    return found


@pytest.fixture
def measure(benchmark: Any, session: Session) -> Callable[..., None]:
    """measure(op=, case=, form=, kind=, mode=, fn=, bytes=, error=, tolerance=): times fn, adds the row.

    error is that of fn's values against fp64, measured before; above tolerance nothing is timed and the test fails.
    beside=[dict(form=, kind=, fn=, error=), ...]: forms whose rounds are run in turn with fn's, a row each, so that
    a machine that slows down for a while slows all of them.
    """

    def run(
        *, fn: Callable[[], Any], error: float, tolerance: float, mode: str, beside: Sequence[dict[str, Any]] = (),
        **what: Any,
    ) -> None:  # fmt: skip
        for form, off in [(what["form"], error), *((other["form"], other["error"]) for other in beside)]:
            assert off <= tolerance, f"{form}: error {off:.2e} against fp64, allowed is {tolerance:.2e}"
        try:
            a_round, calls = harness.a_round(fn, mode)
        except RuntimeError as why:
            if mode == "call":
                raise
            torch.cuda.synchronize()
            reason = f"not captured: {str(why).splitlines()[0]}"
            session.skipped.append(dict(op=what["op"], case=what["case"], form=what["form"], reason=reason))
            pytest.skip(reason)
        launches, fused = harness.count_launches(fn)
        if harness.CUDA and what["kind"] == "ours" and not what["op"].startswith("attention"):  # others' kernels
            assert fused, "no fused kernel ran"
        turns = [harness.Turn(other, mode) for other in beside]
        rounds = what.pop("rounds", harness.ROUNDS)

        def before_a_round() -> None:
            for turn in turns:
                turn.run()

        benchmark.pedantic(
            a_round, setup=before_a_round if turns else None, rounds=rounds, warmup_rounds=2, iterations=1
        )
        if benchmark.stats is None:  # --benchmark-disable
            return
        stats = benchmark.stats.stats
        row = dict(
            what, mode=mode, median_s=stats.median, iqr_s=stats.iqr, rounds=stats.rounds, calls_a_round=calls,
            launches=launches, fused_launches=fused, error=error, tolerance=tolerance,
        )  # fmt: skip
        benchmark.extra_info.update(row)
        session.rows.append(row)
        session.rows += [turn.row(row, rounds) for turn in turns]

    return run


@pytest.fixture
def leave_out(session: Session) -> Callable[..., NoReturn]:
    """leave_out(op, case, form, reason): skips, and the result file says so."""

    def skip(op: str, case: str, form: str, reason: str) -> NoReturn:
        session.skipped.append(dict(op=op, case=case, form=form, reason=reason))
        pytest.skip(f"{form}: {reason}")

    return skip


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    found = config.stash[SESSION]
    if not [r for r in found.rows if r["kind"] != "copy"]:
        return
    whole = {"score", "hinge", "lerp", "adaLN", "joint", "attention", "mmdit"}
    whole |= set() if harness.CUDA else {"csrc"}
    missing = whole - {row["op"].split()[0] for row in found.rows}  # `pytest bench/test_lerp.py`
    path = harness.save(found.rows, found.skipped, bool(found.partial or exitstatus), sorted(missing))
    terminalreporter.write_line("")
    terminalreporter.write_line(report.render(report.load(path), every_row=True))
    terminalreporter.write_line(f"\nwritten: {os.path.relpath(path)}")
