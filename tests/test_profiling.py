"""The profiler: FLOPs against the formula, times that add up, a trace that Perfetto can read."""

import gzip
import json
import os
import time

import pytest
import torch

from senseflow import profiling
from senseflow.profile_page import Rates, measure_rates, write_page
from senseflow.profiling import Profiler

SLEEP = {"student": 0.004, "fake": 0.012}
COLUMNS = ("times", "ms", "share", "peak", "gflop", "rate", "mfu", "gb", "gbps", "launches", "floor")
RATES = Rates(1e9, 1e8)  # FLOP/s and bytes/s: so slow that floors show


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


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    monkeypatch.setattr(profiling, "measure_rates", lambda dtype: RATES)


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


def test_calls_within_a_phase_are_counted_and_timed_by_the_call(tmp_path, capsys):
    """Two network calls in the cycle of FLOPs, four in that of times, as rollout lengths are drawn."""
    prof, a, b = Profiler(True, tmp_path, 3, 1), torch.randn(64, 128), torch.randn(128, 32)
    for calls in (2, 4, 1):
        with prof.iteration(), prof.phase("rollout"):
            for _ in range(calls):
                prof.call()
                time.sleep(0.002)
                a @ b
    prof.flops["rollout"] = [g * 10**9 // (2 * 64 * 128 * 32) for g in prof.flops["rollout"]]  # a GFLOP a call
    found = table(prof.report())
    assert found["rollout"]["times"] == 4 and found["rollout"]["gflop"] == 1.0
    assert found["rollout"]["ms"] == pytest.approx(found["whole cycle"]["ms"] / 4, rel=0.1)
    assert found["whole cycle"]["gflop"] == 4.0
    assert found["rollout"]["launches"] == found["whole cycle"]["launches"] > 0
    assert "without FLOPs" not in capsys.readouterr().out


def test_a_phase_that_the_counting_cycle_lacks_is_named(tmp_path, capsys):
    prof = Profiler(True, tmp_path, 3, 1)
    for name in ("student", "rollout", "student"):
        with prof.iteration(), prof.phase(name):
            time.sleep(0.001)
    prof.report()
    assert "the cycle that counts them had none: rollout" in capsys.readouterr().out


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
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == ["profile.html", "trace.json.gz"]
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


def test_floors_are_by_the_measured_rates(tmp_path, capsys):
    """Of the product the FLOPs, of what was told to move bytes: 0.4 MB at 0.1 GB/s are 4 ms; MFU is over the rate."""
    prof = Profiler(True, tmp_path, 6, 2)
    a, b = torch.randn(64, 128), torch.randn(128, 32)
    for _ in range(6):
        with prof.iteration():
            with prof.phase("product"):
                a @ b
            with prof.phase("sweep"):
                prof.moves("sweep", lambda: 4e5)
                time.sleep(0.005)
            with prof.phase("data"):
                time.sleep(0.002)
    found = table(prof.report())
    product = 2 * 64 * 128 * 32
    assert found["product"]["floor"] == pytest.approx(1e3 * product / RATES.flops, abs=0.006)
    seconds = sum(s.seconds() for s in prof.spans["product"]) / 2
    assert found["product"]["mfu"] == pytest.approx(100 * product / seconds / RATES.flops, abs=0.06)
    assert found["product"]["launches"] >= 1 and found["sweep"]["launches"] == 0
    assert found["sweep"]["floor"] == 4.0 and "floor" not in found["(rest)"]
    seconds = sum(s.seconds() for s in prof.spans["sweep"]) / 2
    assert found["sweep"]["gbps"] == pytest.approx(4e5 / seconds / 1e9, abs=0.06)
    ideal = 2 * (product / RATES.flops + 4e5 / RATES.bytes)
    assert found["whole cycle"]["floor"] == pytest.approx(1e3 * ideal, abs=0.006)
    printed = capsys.readouterr().out
    total = sum(s.seconds() for s in prof.steps)
    assert f"ideal cycle at these rates: {1e3 * ideal:.1f} ms; this one took {1e3 * total:.1f} ms" in printed
    waited = sum(s.seconds() for s in prof.spans["data"])
    assert f"waiting for data: {1e3 * waited:.1f} ms, {100 * waited / total:.1f} % of the cycle" in printed


def test_page_is_whole_by_itself(tmp_path):
    """Every phase a bar with its place and width, every row in the table; nothing is fetched, names are escaped."""
    import xml.etree.ElementTree as ET

    lanes = [[("a<b", 0.0, 0.25), ("c", 0.5, 0.5)], [("c", 0.0, 1.0)]]
    path = tmp_path / "profile.html"
    write_page(path, lanes, [("c", 1.5, 0.75), ("a<b", 0.25, 0.0)], ["phase", "ms"], [["a<b", "250"]], ["note & more"])
    text = path.read_text()
    assert "http" not in text.replace("http://www.w3.org", "") and "<script" not in text
    assert "note &amp; more" in text and "<td>a&lt;b</td><td>250</td>" in text
    svgs = [ET.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>") for part in text.split("<svg")[1:]]
    rects = svgs[0].findall("rect")
    assert [r.find("title").text for r in rects] == ["a<b: 250.00 ms", "c: 500.00 ms", "c: 1000.00 ms"]
    left, widths = float(rects[0].get("x")), [float(r.get("width")) for r in rects]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.02) and widths[2] == pytest.approx(4 * widths[0], abs=0.02)
    assert float(rects[1].get("x")) == pytest.approx(left + widths[1], abs=0.02)
    whole, floor = (float(r.get("width")) for r in svgs[1].findall("rect")[:2])
    assert floor == pytest.approx(whole / 2, abs=0.02)
    assert "2.0x its floor" in text and "no floor counted" in text


def test_lanes_are_the_timed_cycle(tmp_path):
    prof = run(tmp_path)
    prof.report()
    lanes = prof._lanes()
    assert sorted([name for name, *_ in lane] for lane in lanes) == [["fake"], ["student", "fake"]]
    for lane, step in zip(lanes, prof.steps, strict=True):
        ends = [start + took for _, start, took in lane]
        assert all(start >= 0 for _, start, _ in lane) and ends[-1] <= step.seconds() and ends == sorted(ends)
    assert (tmp_path / "profile" / "profile.html").is_file()


def test_rates_are_what_products_and_copies_reach():
    """Both positive, a product far above a FLOP per byte copied; fp32 on any machine, in any load."""
    rates = measure_rates(torch.float32, side=256, rounds=2)
    assert rates.flops > 1e7 and rates.bytes > 1e7
    assert rates.floor(rates.flops, 0.0) == 1.0 and rates.floor(0.0, 2 * rates.bytes) == 2.0
