"""Metrics, files and warnings of a run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from senseflow.config import UserError
from senseflow.logs import MetricRing, Monitors, RunLog, print_table


def rows_of(path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# MetricRing


@pytest.mark.parametrize("names, capacity", [((), 1), ((), 64), (("fake", "dmd"), 2)])
def test_ring_values(device, names, capacity):
    """Rows of different metrics, more than the buffer was made for, drained in two parts."""
    ring = MetricRing(names, capacity, device)
    expected: list[dict] = []
    for part in range(2):
        for i in range(part * 7, part * 7 + 7):
            row = {"fake": i + 0.25}
            if i % 3 == 0:
                row |= {"dmd": -i / 8}
            ring.put(i, {k: torch.tensor(v, device=device) for k, v in row.items()})
            expected.append({"iteration": i, **row})
        assert ring.drain() == expected
        assert ring.drain() == []
        expected.clear()


def test_ring_keeps_the_value_at_the_time(device):
    """A copy, in fp32: the caller's tensor may change, be bf16, fp64 or part of a graph."""
    ring = MetricRing()
    value = torch.tensor(1.5, device=device, dtype=torch.bfloat16)
    graph = torch.tensor([2.0], device=device, dtype=torch.float64, requires_grad=True) * 3
    ring.put(1, {"a": value, "b": graph, "c": torch.tensor(math.inf, device=device)})
    value.zero_()
    ring.put(2, {})
    assert ring.drain() == [{"iteration": 1, "a": 1.5, "b": 6.0, "c": math.inf}, {"iteration": 2}]


def test_ring_put_reads_nothing_back(device, monkeypatch):
    ring = MetricRing()

    def sync(*_: object) -> None:
        raise AssertionError("a value went to the host")

    values = {"a": torch.tensor(1.0, device=device), "b": torch.tensor(2.0, device=device)}
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__"):
            patch.setattr(torch.Tensor, name, sync)
        for i in range(100):
            ring.put(i, values)
    assert len(ring.drain()) == 100


@pytest.mark.gpu
def test_ring_put_does_not_sync_the_gpu():
    ring = MetricRing(("a", "b"), 2, "cuda")
    values = {"a": torch.ones((), device="cuda"), "b": torch.ones((), device="cuda").double()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(10):
            ring.put(i, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ring.drain()[9] == {"iteration": 9, "a": 1.0, "b": 1.0}


def test_ring_refuses_an_unannounced_name():
    with pytest.raises(KeyError, match="typo"):
        MetricRing(("dmd",), 4, "cpu").put(0, {"typo": torch.zeros(())})


# RunLog


def test_rows_are_strict_json(tmp_path):
    with RunLog(tmp_path, False, False, 10) as log:
        log.metrics([{"iteration": 1, "dmd": 0.5}, {"iteration": 2, "dmd": math.nan}])
        log.metrics([])
        log.metrics([{"iteration": 3, "dmd": -math.inf}])
        assert len(rows_of(tmp_path)) == 3, "written at once, not at the end"
    assert rows_of(tmp_path) == [
        {"iteration": 1, "dmd": 0.5},
        {"iteration": 2, "dmd": None},
        {"iteration": 3, "dmd": None},
    ]


def test_resume_truncates(tmp_path):
    """Rows after the checkpoint go, wherever they stand; so does the line a crash cut off."""
    with RunLog(tmp_path, False, False, 10) as log:
        log.metrics([{"iteration": i, "dmd": float(i)} for i in (1, 2)])
        log.metrics([{"iteration": 4, "eval/kid": 0.5}])  # stands before the rows drained later
        log.metrics([{"iteration": i, "dmd": float(i)} for i in (3, 4, 5)])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('[1]\nnull\n{"iteration": 3, "dmd"')
    with RunLog(tmp_path, False, False, 10, resume_at=3) as log:
        log.metrics([{"iteration": 4, "dmd": 40.0}])
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert rows_of(tmp_path) == [{"iteration": i, "dmd": v} for i, v in expected]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_begins_anew(tmp_path):
    for value in (1.0, 2.0):
        with RunLog(tmp_path, False, False, 10) as log:
            log.metrics([{"iteration": 0, "eval/kid": value}])
    assert rows_of(tmp_path) == [{"iteration": 0, "eval/kid": 2.0}]


def test_tensorboard_scalars_grid_and_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grid = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    with RunLog(tmp_path, True, False, 10) as log:
        log.metrics([{"iteration": i, "dmd": i / 2} for i in range(1, 7)])
        log.evaluation(6, {"eval/kid": 0.25}, grid, tmp_path / "grids" / "6.png")
    with RunLog(tmp_path, True, False, 10, resume_at=4) as log:
        log.metrics([{"iteration": 5, "dmd": 100.0}])
        log.evaluation(5, {"eval/kid": 0.5}, grid, tmp_path / "grids" / "5.png")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("dmd")]
    assert scalars == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 100.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/kid")] == [(5, 0.5)]
    image = events.Images("grid")[-1]
    assert (image.step, image.height, image.width) == (5, 4, 6)


def test_picture_is_the_grid(tmp_path, capsys):
    import numpy as np
    from PIL import Image

    grid = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    with RunLog(tmp_path, False, False, 10) as log:
        log.evaluation(2, {"eval/kid": 0.25}, grid, tmp_path / "grids" / "2.png")
    pixels = np.array(Image.open(tmp_path / "grids" / "2.png"))
    assert np.array_equal(pixels, grid.permute(1, 2, 0).numpy())
    assert rows_of(tmp_path) == [{"iteration": 2, "eval/kid": 0.25}]
    assert capsys.readouterr().out == "iteration 2: kid 0.25\n"


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out = '.*run' cannot be written: Not a directory") as e:
        RunLog(tmp_path / "file" / "run", True, False, 10)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="cannot be written: File exists"):
        RunLog(tmp_path / "file", False, False, 10)


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    """Generator losses are not in every row: the line shows the newest of each."""
    with RunLog(tmp_path, False, True, 4, seconds=0) as log:
        log.metrics([{"iteration": 1, "dmd": 1.0, "fake": 2.0, "student_grad_norm": 9.0}])
        log.metrics([{"iteration": 2, "fake": 3.0}])
        log.warn("[b]careful[/b]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("iteration 1/4  dmd 1.000  fake 2.000  ")
    assert lines[1].startswith("iteration 2/4  dmd 1.000  fake 3.000  ")
    assert lines[0].endswith(" min left") and lines[2] == "warning: [b]careful[/b]"


def test_plain_lines_are_rare_but_the_last_is_there(tmp_path, capsys):
    with RunLog(tmp_path, False, True, 40) as log:
        for i in range(1, 41):
            log.metrics([{"iteration": i, "fake": 1.0}])
    assert capsys.readouterr().out == "iteration 40/40  fake 1.000  0.0 min left\n"


def test_the_time_left_is_that_of_iterations_alone(tmp_path, monkeypatch, capsys):
    """60 s of loading and of the first look, then 10 iterations of 3 s: 30 more take 1.5 minutes."""
    now = [0.0]
    monkeypatch.setattr("senseflow.logs.time", SimpleNamespace(monotonic=lambda: now[0]))
    with RunLog(tmp_path, False, True, 40) as log:
        now[0] = 60.0
        log.evaluation(0, {}, torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "0.png")
        now[0] = 90.0
        log.metrics([{"iteration": 10, "fake": 1.0}])
    assert capsys.readouterr().out.splitlines()[-1] == "iteration 10/40  fake 1.000  1.5 min left"


def test_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with RunLog(tmp_path, False, True, 8, resume_at=2) as log:
        log.metrics([{"iteration": 6, "dmd": 1.25}])
        log.say("[x] is no markup")
    assert log.bar.tasks[0].completed == 6 and log.bar.tasks[0].total == 8
    assert log.bar.tasks[0].fields["losses"] == "dmd 1.250"
    assert "[x] is no markup" in capsys.readouterr().out


def test_table(capsys):
    print_table("a [b]", ["model", "KID"], [["[x]", "0.1"], ["student", "12.25"]])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a [b]", "model", "[x]", "student", " 0.1 ", "12.25"))


# Monitors

STEADY = {"normaliser": 1.0, "fake_real_gap": 2.0, "d_accuracy": 0.7, "saturation": 0.01}


def warned(change: dict, rows: int = 40) -> list[str]:
    """Warnings after a steady window, then `rows` rows with the change."""
    monitors = Monitors(20)
    steady = [{"iteration": i, **STEADY} for i in range(20)]
    assert monitors.check(steady) == []
    later = [{"iteration": 20 + i, **STEADY, **change} for i in range(rows)]
    return monitors.check(later) + monitors.check(later)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"normaliser": 11.0}, "normaliser is 10 times"),
        ({"normaliser": 0.09}, "normaliser is under a tenth"),
        ({"fake_real_gap": 21.0}, "fake-real gap is 10 times"),
        ({"ida_drift": 0.51}, "half the student's norm"),
        ({"d_accuracy": 0.995}, "discriminator is always right"),
        ({"saturation": 0.21}, "saturated"),
        ({"fake_real_gap": math.nan}, "fake_real_gap is not finite"),
        ({"fake_skipped": 0.0, "disc_skipped": 0.0}, None),
        ({"normaliser": 9.0, "fake_real_gap": 19.0, "d_accuracy": 0.98, "saturation": 0.19}, None),
        ({"normaliser": 0.11, "ida_drift": 0.49}, None),
    ],
)
def test_monitor_says_it_once(change, text):
    found = warned(change)
    if text is None:
        assert found == []
    else:
        assert len(found) == 1 and text in found[0]


def test_monitor_ignores_one_odd_row():
    assert warned({"d_accuracy": 1.0, "saturation": 0.9}, rows=1) == []


def test_nonfinite_updates_are_counted_and_stop_the_run():
    """In a row means of one network; rows without that network's update do not break it."""
    monitors = Monitors(3, last_good=lambda: "runs/a/step-00000010")
    rows: list[dict] = []
    for i in range(4):
        rows.append({"iteration": i, "student_skipped": float(i != 1), "fake_skipped": 0.0})
        rows.append({"iteration": i, "fake_skipped": 0.0})
    found = monitors.check(rows)
    assert found == ["iteration 0: a non-finite student update was skipped (later ones are only counted)"]
    assert monitors.skipped == {"student": 3}
    with pytest.raises(UserError, match=r"student: 3 .* iteration 5: .*runs/a/step-00000010"):
        monitors.check([{"iteration": 5, "student_skipped": 1.0}])
