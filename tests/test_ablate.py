"""The ablation: statistics against scipy, rows, one toy run of the core rows end to end, resumable, its report."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scipy import stats as scipy_stats
from tiny_pipelines import embedded_teacher, few_pictures

from senseflow import ablate, checkpoint
from senseflow.ablation.report import band, differences, parts_table, read_records, table, write_report
from senseflow.ablation.rows import BASES, GROUPS, PARTS, UNSTABLE_PARTS, command, rows_of
from senseflow.ablation.stats import Difference, holm, mean_and_half_width, paired
from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.fields import to_dict
from senseflow.logs import FATAL, Diverged


def test_interval_and_paired_test_are_scipys():
    values = [3.0, 5.0, 4.5, 9.0]
    mean, half = mean_and_half_width(values)
    low, high = scipy_stats.t.interval(0.95, 3, loc=mean, scale=scipy_stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    row, base = {0: 1.0, 1: 2.5, 2: 2.0, 7: 9.0}, {0: 2.0, 1: 3.0, 2: 4.0, 5: 0.0}
    d = paired(row, base)
    assert d is not None and d.seeds == 3 and d.mean == pytest.approx((-1 - 0.5 - 2) / 3)
    assert d.p == pytest.approx(scipy_stats.ttest_rel([1.0, 2.5, 2.0], [2.0, 3.0, 4.0]).pvalue, rel=1e-10)
    assert paired({0: 1.0}, {1: 1.0}) is None
    single = paired({0: 1.0}, {0: 3.0})
    assert single is not None and single.p is None and single.mean == -2
    same = paired({0: 0.5, 1: 1.0, 2: 2.0}, {0: 0.25, 1: 0.75, 2: 1.75})
    assert same is not None and (same.mean, same.half, same.p, same.significant) == (0.25, 0.0, None, False)


def test_holm_by_hand():
    """p = .01, .02, .04 of three rows: .03, .04, .04; never falling, at most 1: .02, .021 and .6: .06, .06, .6."""
    made = {n: paired({0: 0.0, 1: 1.0}, {0: 1.0, 1: 3.0}) for n in "abcd"}
    given = {
        n: type(d)(d.mean, d.half, d.seeds, p) for (n, d), p in zip(made.items(), (0.02, 0.01, 0.04, None), strict=True)
    }
    found = holm({**given, "e": None})
    assert [found[n].adjusted for n in "bac"] == pytest.approx([0.03, 0.04, 0.04])
    assert found["d"].adjusted is None and not found["d"].significant and found["e"] is None
    assert found["b"].significant
    for given, adjusted in (((0.021, 0.02, 0.6), (0.06, 0.06, 0.6)), ((0.7, 0.8, 0.9), (1, 1, 1))):
        rows = holm({n: Difference(0.0, 0.0, 2, p) for n, p in zip("abc", given, strict=True)})
        assert [d.adjusted for d in rows.values() if d] == pytest.approx(adjusted)


def test_every_row_is_a_valid_run_of_as_many_student_updates():
    for group, rows in GROUPS.items():
        assert BASES[group] in [row.name for row in rows]
        for row in rows:
            train = parse(command(row, 12, 4, []), "").config.train
            assert (train.iterations - train.fake_warmup) / train.gen_every == 12
    core = {row.name: parse(list(row.flags), "").config for row in GROUPS["core"]}
    seen = [(c.ida.lam < 1, c.isg.weight > 0, c.disc.kind) for c in core.values()]
    assert seen == [(False, False, "fake_features"), (True, False, "fake_features"), (True, True, "fake_features"),
                    (True, True, "vfm"), (False, True, "vfm")]  # fmt: skip
    assert [parse(list(r.flags), "").config.train.gen_every for r in GROUPS["ttur"][1:]] == [5, 10, 20]
    names = [row.name for row in rows_of(list(GROUPS))]
    assert len(names) == len(set(names))
    with pytest.raises(UserError, match="unknown group 'cores', did you mean 'core'"):
        rows_of(["cores"])
    sets = {row.name: parse(list(row.flags), "").config for rows in GROUPS.values() for row in rows}
    parts = {name: (c.ida.lam, c.isg.weight, c.disc.kind) for name, c in sets.items()}
    on, off = (0.97, 1.0, "vfm"), (1.0, 0.0, "fake_features")
    for words, row, base in (*PARTS, *UNSTABLE_PARTS):  # the first row has the part, the second all else
        k = ("IDA", "ISG", "VFM").index(words[:3])
        assert parts[row][k] == on[k] and parts[base] == (*parts[row][:k], off[k], *parts[row][k + 1 :])


def made_record(row, seed, kid, status="done"):
    curves = {"eval/kid": [[0, 50.0], [4, kid]], "fake_real_gap": [[1, 1.0], [2, 2.0], [3, 3.0], [4, 4.0]]}
    return dict(row=row, seed=seed, status=status, final={"eval/kid": kid}, best={"eval/kid": kid}, curves=curves)


def test_table_and_bands_from_records(tmp_path):
    (tmp_path / "runs").mkdir()
    scores = {"dmd2": [30.0, 34.0, 35.0], "full": [10.0, 13.0, 16.0], "full-no-ida": [12.0]}
    for row, values in scores.items():
        for seed, kid in enumerate(values):
            status = "diverged: x" if (row, seed) == ("dmd2", 1) else "done"
            record = made_record(row, seed, kid, status)
            if (row, seed) != ("dmd2", 0):
                record["warnings"] = [f"iteration 9: {FATAL[1] if row == 'dmd2' else 'over 20 % of x0 is saturated'}"]
            (tmp_path / "runs" / f"{row}-{seed}.json").write_text(json.dumps(record))
    records = read_records(tmp_path)
    columns, rows = table("core", records)
    by_title = {r[0]: dict(zip(columns, r, strict=True)) for r in rows}
    assert by_title["DMD2"]["seeds"] == "3, 1 diverged" and by_title["DMD2"]["diverging"] == "2"
    assert by_title["DMD2"]["dithered KID x1000 minus full"].startswith("20.0 +- ")
    assert by_title["full without IDA"]["dithered KID x1000 minus full"] == "2.0"  # one seed: no interval, no p
    assert by_title["DMD2 +IDA"]["dithered KID x1000"] == "-" and by_title["DMD2"]["fake-real gap"] == "4.000 +- 0.000"
    expected = scipy_stats.ttest_rel(scores["dmd2"], scores["full"]).pvalue  # the only p: Holm leaves it
    assert differences("core", records)["dmd2"].adjusted == pytest.approx(expected)
    two = records | {"full-no-ida": {s: made_record("full-no-ida", s, 12.0 + s**2) for s in range(3)}}
    p = [scipy_stats.ttest_rel(scores["full"], other).pvalue for other in (scores["dmd2"], [12, 13, 16])]
    both = differences("core", two)
    assert {row: d.adjusted for row, d in both.items() if d} == pytest.approx({"dmd2": 2 * p[0], "full-no-ida": p[1]})
    x, mean, half = band(list(records["full"].values()), "eval/kid")
    assert (x, mean) == ([0, 4], [50.0, 13.0]) and half[0] == 0
    assert half[1] == pytest.approx(4.302652729911275 * 3 / 3**0.5)  # t(.975, 2) x deviation / sqrt(3)
    columns, rows = parts_table(records)
    assert columns[:2] == ["with it minus without", "dithered KID x1000"]
    assert rows == [
        ["IDA, in the whole", "-2.00", "-2.00", "-", "-", "0.000", "-"]
    ]  # one seed; no ISG without IDA here
    kids = {"dmd2-ida": [31.0, 33.0, 35.5]}
    both = records | {row: {s: made_record(row, s, kid) for s, kid in enumerate(k)} for row, k in kids.items()}
    (ida, _), p = parts_table(both)[1], scipy_stats.ttest_rel(kids["dmd2-ida"], scores["dmd2"]).pvalue
    assert ida[0] == "IDA, added to DMD2" and ida[1].startswith("0.17 +- ") and ida[1].endswith(f", p {p:.2g}")
    page = write_report(tmp_path, ["core"]).read_text()
    assert (
        "full, seed 0: iteration 9: over 20 % of x0 is saturated" in page
        and "20.0 +- " in page
        and "data:image/png;base64," in page
        and (tmp_path / "core.png").stat().st_size > 5000
    )


def arguments(tmp_path, *words):
    places = ["--out", str(tmp_path / "out"), "--records", str(tmp_path / "records")]
    return ablate.build_parser().parse_args(["midpoint", "--updates", "2", "--evaluations", "1", *places, *words])


def write_metrics(cfg, rows=()):
    """What a run of the config leaves, without the run."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = rows or [{"iteration": 0, "eval/kid": 9.0}, {"iteration": cfg.train.iterations, "eval/kid": 3.0}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def test_runs_are_shared_and_none_is_made_twice(tmp_path, capsys, monkeypatch):
    """A run that another process is at is left to it; threads and places make no other run, all else does."""
    args, made = arguments(tmp_path, "--seeds", "3", "3", "4"), []
    reports = []
    monkeypatch.setattr(ablate, "write_report", lambda folder, groups: reports.append((folder, groups)))

    def start(run):
        made.append((Path(run.config.out).parent.name, run.config.seed))
        return write_metrics(run.config)

    busy = tmp_path / "out" / "full" / ".seed4.lock"
    busy.parent.mkdir(parents=True)
    with busy.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert ablate.run_all(args, start) == 0
    assert made == [("full", 3), ("midpoint-adaptive", 3), ("midpoint-adaptive", 4)]
    assert "1 runs were being made by another process" in capsys.readouterr().out
    other = arguments(tmp_path, "--seeds", "3", "4", "--set", "train.threads=1", "--set", "kernels.fuse=true")
    assert ablate.run_all(other, start) == 0 and made[3:] == [("full", 4)]
    file = tmp_path / "records" / "runs" / "full-seed3.json"
    record = json.loads(file.read_text())
    del record["same"]["train"]["warmup"]  # as of a version that did not have this setting yet
    file.write_text(json.dumps(record))
    assert ablate.run_all(args, start) == 0 and len(made) == 4
    assert reports == [(tmp_path / "records", ["midpoint"])] * 4  # after every run
    with pytest.raises(UserError, match=r"full-seed3.json is of other settings \(train.lr 3.6e-05, now 0.01\)"):
        ablate.run_all(arguments(tmp_path, "--set", "train.lr=0.01", "--seeds", "3"), start)
    for own in ("seed=1", "train.iterations=3", "train.minutes=1", "data.batch"):
        with pytest.raises(UserError, match="allowed is FIELD=VALUE of senseflow"):
            ablate.run_all(arguments(tmp_path, "--set", own), start)
    file.write_text("{}")
    with pytest.raises(UserError, match="is no record of a run: remove it"):
        read_records(tmp_path / "records")


def test_a_divergence_is_recorded_and_a_stopped_run_is_held_to_its_settings(tmp_path):
    args = arguments(tmp_path, "--seeds", "0")
    row = rows_of(["midpoint"])[0]
    cfg = ablate.settings_of(row, 0, args)
    gaps = [{"iteration": i, "fake_real_gap": 1.0 if i < 20 else 40.0} for i in range(60)]
    scores = [{"iteration": 0, "eval/kid": 9.0}, {"iteration": 5, "eval/kid": 7.0}, {"iteration": 5, "eval/kid": 8.0}]

    def diverges(run):
        write_metrics(run.config, [scores[0], *gaps[:6], *scores[1:], *gaps[6:], {"iteration": 60, "eval/kid": None}])
        raise Diverged("student: 20 non-finite updates in a row at iteration 9: lower its learning rate; last good: x")

    assert ablate.one_run(row, 0, cfg, args, diverges)
    record = read_records(tmp_path / "records")["full"][0]
    assert record["status"] == "diverged: student: 20 non-finite updates in a row at iteration 9"
    assert record["curves"]["eval/kid"] == [[0.0, 9.0], [1.0, 8.0]] and record["final"]["eval/kid"] == 8.0
    assert record["warnings"] == ["iteration 24: the fake-real gap is 10 times its first value"]
    rows = [scores[0], {"iteration": cfg.train.iterations, "eval/kid": None}]
    assert ablate.one_run(row, 0, cfg, args, lambda run: write_metrics(run.config, rows))
    assert read_records(tmp_path / "records")["full"][0]["status"] == "diverged: the last scores are not finite"
    with pytest.raises(UserError, match="no checkpoint"):  # of bad input nothing is recorded
        ablate.one_run(row, 1, cfg, args, lambda run: (_ for _ in ()).throw(UserError("no checkpoint")))
    was = to_dict(cfg)
    was["train"]["lr"] = 1e-3
    checkpoint.save(Path(cfg.out) / "checkpoints", 5, {"config": was}, 1)
    with pytest.raises(UserError, match=r"holds a run of other settings \(train.lr 0.001, now 3.6e-05\)"):
        ablate.one_run(row, 0, cfg, args, diverges)


TOY = ["data.images=pictures", "eval.prompts=4", "eval.teacher_steps=1", "eval.grid=2", "data.batch=2",
       "log.every=1", "log.progress=false", "disc.taps=2", "disc.width=8", "disc.size=28",
       "train.gen_every=2"]  # fmt: skip


def test_a_group_of_no_record_is_drawn_and_a_wrong_name_is_said(tmp_path, capsys, recwarn):
    where = ["--report-only", "--records", str(tmp_path)]
    assert ablate.main(["cores", *where]) == 2 and "unknown group 'cores'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert ablate.main(["core", *where]) == 0 and (tmp_path / "core.png").is_file()
    assert not [w for w in recwarn if "legend" in str(w.message)]


@pytest.mark.slow
def test_core_rows_on_a_toy_budget(tmp_path, monkeypatch, capsys):
    """Every row of the core trains; Ctrl-C in one goes on at the same bits; nothing is made twice; the report is
    whole."""
    monkeypatch.setenv("SENSEFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("senseflow.train.load_variants", lambda canvas: few_pictures(canvas))
    teacher = embedded_teacher(tmp_path / "teacher")
    argv = ["core", "--seeds", "0", "--updates", "2", "--evaluations", "2", "--out", str(tmp_path / "out"),
            "--records", str(tmp_path / "records"), "--set", f"model.teacher={teacher}", *TOY]  # fmt: skip
    real, runs = ablate.train, []

    def stopped_once(args):
        runs.append(args)
        if len(runs) != 2:
            return real(args)
        from senseflow import train as module

        with monkeypatch.context() as patch:
            iterate = module.iterate

            def interrupted(cfg, parts, updates, batch, iteration):
                if iteration == 2:
                    signal.raise_signal(signal.SIGINT)
                return iterate(cfg, parts, updates, batch, iteration)

            patch.setattr(module, "iterate", interrupted)
            return real(args)

    parser = ablate.build_parser()
    assert ablate.run_all(parser.parse_args(argv), stopped_once) == 130 and len(runs) == 2
    assert ablate.main(argv) == 0
    assert "5 runs, 1 of them done already" in capsys.readouterr().out
    records = read_records(tmp_path / "records")
    assert {row: sorted(seeds) for row, seeds in records.items()} == {row.name: [0] for row in GROUPS["core"]}
    assert all(r["status"] == "done" for seeds in records.values() for r in seeds.values())
    points = records["full"][0]["curves"]
    assert [x for x, _ in points["eval/kid"]] == [0.0, 1.0, 2.0] and len(points["ida_drift"]) == 4
    fresh = parser.parse_args([*argv[: argv.index("--out")], "--out", str(tmp_path / "again"), "--records",
                               str(tmp_path / "again"), *argv[argv.index("--set"):]])  # fmt: skip
    row = rows_of(["core"])[1]  # the one that was stopped: the same curves without a stop
    assert ablate.one_run(row, 0, ablate.settings_of(row, 0, fresh), fresh, real)
    assert read_records(tmp_path / "again")[row.name][0]["curves"] == records[row.name][0]["curves"]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "records" / "runs").iterdir()}
    assert ablate.main(argv) == 0 and before == {f: f.stat().st_mtime_ns for f in before}
    assert "5 runs, 5 of them done already" in capsys.readouterr().out
    assert ablate.main([*argv, "isg.margin=20"]) == 2
    assert "is of other settings (isg.margin 50.0, now 20.0)" in capsys.readouterr().err
    assert torch.isfinite(torch.tensor(records["dmd2"][0]["final"]["eval/kid"]))


KILLED = """
import senseflow.train, tiny_pipelines
senseflow.train.load_variants = tiny_pipelines.few_pictures
from senseflow import ablate
raise SystemExit(ablate.main({argv}))
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path, monkeypatch):
    """SIGKILL after a checkpoint of the second row's run: the same command goes on from it, and every record is that of
    a command which nobody killed."""
    teacher = embedded_teacher(tmp_path / "teacher")
    path = [str(Path(__file__).parent), *sys.path]
    env = os.environ | {"SENSEFLOW_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(path)}

    def begin(where):
        argv = ["midpoint", "--seeds", "0", "--updates", "4", "--evaluations", "4", "--out", str(tmp_path / where),
                "--records", str(tmp_path / where), "--set", f"model.teacher={teacher}", *TOY]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", KILLED.format(argv=argv)], env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    second, first = GROUPS["midpoint"][1].name, begin("killed")
    saved = tmp_path / "killed" / second / "seed0" / "checkpoints"
    until = time.monotonic() + 300
    while checkpoint.newest(saved) is None and first.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    first.kill()
    assert first.wait() == -signal.SIGKILL and checkpoint.newest(saved) is not None
    again, whole = begin("killed"), begin("whole")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and "2 runs, 1 of them done already" in said and "resumed" in said, said
    assert whole.communicate(timeout=300)[0] and whole.returncode == 0
    records = [read_records(tmp_path / where) for where in ("killed", "whole")]
    for row in ("full", second):
        mine, theirs = (r[row][0] for r in records)
        assert mine["curves"] == theirs["curves"] and mine["final"] == theirs["final"] and mine["status"] == "done"
