"""The profiler: FLOPs against the formula, times that add up, a trace that Perfetto can read."""

import gzip
import json
import os
import time

import pytest
import torch

from senseflow import profiling
from senseflow.profiling import Profiler

SLEEP = {"student": 0.004, "fake": 0.012}
COLUMNS = ("times", "ms", "share", "peak", "gflop", "rate")


def table(rows: list[list[str]]) -> dict[str, dict[str, float]]:
    return {row[0]: {k: float(v) for k, v in zip(COLUMNS, row[1:], strict=True) if v} for row in rows}


def run(out, steps: int = 9, cycle: int = 2, form: str = "iteration") -> Profiler:
    """64 x 128 @ 128 x 32 with a backward in `fake`; `student` in every second iteration."""
    prof = Profiler(True, out, steps, cycle)
    a, b = torch.randn(64, 128, requires_grad=True), torch.randn(128, 32, requires_grad=True)

    def body(i: int) -> None:
        if i % 2:
            with prof.phase("student"):
                time.sleep(SLEEP["student"])
        with prof.phase("fake"):
            time.sleep(SLEEP["fake"])
            (a @ b).sum().backward()

    for i in range(steps):
        if form == "iteration":
            with prof.iteration():
                body(i)
        else:
            body(i)
            prof.step()
    return prof


@pytest.mark.parametrize("form", ["iteration", "step"])
def test_table(tmp_path, form, capsys):
    rows = run(tmp_path, form=form).report()
    found = table(rows)
    assert [row[0] for row in rows] == ["fake", "student", "(rest)", "whole cycle"]
    assert found["fake"]["times"] == 2 and found["student"]["times"] == 1
    for name, seconds in SLEEP.items():
        assert found[name]["ms"] >= 1e3 * seconds - 0.1
    # Shares of phases and the rest make the whole; four roundings to 0.1.
    parts = sum(found[name]["share"] for name in ("fake", "student", "(rest)"))
    assert parts == pytest.approx(100, abs=0.2)
    assert found["(rest)"]["share"] >= 0
    spent = sum(SLEEP[name] * found[name]["times"] for name in SLEEP)
    assert found["whole cycle"]["ms"] >= 1e3 * spent - 0.1
    assert found["fake"]["peak"] > 0
    printed = capsys.readouterr().out
    assert "ms (median)" in printed and "ui.perfetto.dev" in printed


def test_times_sum_to_the_step(tmp_path):
    """In seconds, before the table's rounding: phases never exceed the iteration around them."""
    prof = run(tmp_path)
    prof.report()
    steps = sum(s.seconds() for s in prof.steps)
    phases = sum(s.seconds() for spans in prof.spans.values() for s in spans)
    assert len(prof.steps) == 2
    assert 0.8 * steps < phases <= steps  # what is left is reading the memory, well under a ms


def test_flops_are_the_formula(tmp_path):
    prof = run(tmp_path)
    product = 2 * 64 * 128 * 32
    assert prof.flops["fake"] == [3 * product] * 2  # forward, and one product per gradient
    assert prof.flops["student"] == [0]
    prof.flops["fake"] = [10**9, 3 * 10**9]  # known numbers, to see the report's division
    found = table(prof.report())
    assert found["fake"]["gflop"] == 2.0
    seconds = sum(s.seconds() for s in prof.spans["fake"]) / 2
    assert found["fake"]["rate"] == pytest.approx(2 / seconds, abs=0.06)
    assert found["whole cycle"]["gflop"] == 4.0


def events_of(path) -> list[dict]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as f:
        return json.load(f)["traceEvents"]


def test_trace_opens_in_perfetto(tmp_path):
    """Valid JSON of the Trace Event Format, with our phases around torch's operators."""
    run(tmp_path).report()
    events = events_of(tmp_path / "profile" / "trace.json")
    complete = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] > 0 and "pid" in e and "tid" in e for e in complete)
    fakes = [e for e in complete if e["name"] == "fake"]
    assert len(fakes) == 2 and sum(e["name"] == "student" for e in complete) == 1
    products = [e for e in complete if e["name"] == "aten::mm"]
    assert len(products) == 2 * 3
    assert all(e["dur"] >= 1e6 * SLEEP["fake"] - 100 for e in fakes)
    forward = [e for e in products if any(f["tid"] == e["tid"] for f in fakes)]
    assert forward
    for e in forward:
        assert any(f["ts"] <= e["ts"] and e["ts"] + e["dur"] <= f["ts"] + f["dur"] for f in fakes)


def test_large_trace_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "TRACE_LIMIT", 1000)
    run(tmp_path).report()
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["trace.json.gz"]
    names = {e["name"] for e in events_of(tmp_path / "profile" / "trace.json.gz")}
    assert {"student", "fake", "aten::mm"} <= names


def test_memory_peak_is_that_of_the_phase(tmp_path):
    """A phase that holds 200 MB for a moment shows it; the next, small, one does not."""
    if not torch.cuda.is_available() and not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel cannot reset the peak of resident memory")
    prof = Profiler(True, tmp_path, 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for _ in range(3):
        with prof.iteration():
            with prof.phase("large"):
                torch.ones(200 * 2**18, device=device).sum()
            with prof.phase("small"):
                torch.ones(2**18, device=device).sum()
    prof.report()
    assert 150 < prof.peak["large"] - prof.peak["small"] < 250


def test_disabled_does_nothing(tmp_path):
    prof = Profiler(False, tmp_path, 9)
    assert prof.phase("a") is prof.phase("b")
    with prof.iteration(), prof.phase("a"), prof.phase("b"):
        pass
    prof.step()
    assert prof.report() == [] and list(tmp_path.iterdir()) == []
    assert prof.index == 0 and not prof.spans


def test_phases_do_not_nest(tmp_path):
    prof = Profiler(True, tmp_path, 9)
    error = pytest.raises(RuntimeError, match="'b' begins inside 'a'")
    with error, prof.phase("a"), prof.phase("b"):
        pass
    with prof.phase("c"):  # and the failure leaves nothing open
        pass


def test_run_that_ended_early_has_no_table(tmp_path):
    prof = Profiler(True, tmp_path, 99, 2)
    with prof.iteration(), prof.phase("a"):
        pass
    assert prof.report() == []
