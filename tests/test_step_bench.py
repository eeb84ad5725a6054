"""bench.step: what it makes of times and losses, and whole runs of it on tiny networks."""

import json
from types import SimpleNamespace

import pytest
from test_real import SMALL, TINY

from bench import step, tables
from senseflow.cli import parse
from senseflow.config import UserError


def test_an_iteration_is_the_mean_of_a_cycle_of_medians():
    """Warm-up of 10, so of ten timed ones every fifth is a generator's."""
    times = [1, 2, 3, 1, 10, 1, 2, 9, 1, 20]
    critic, generator, mean = step.per_cycle(times, 10, 5)
    assert (critic, generator, mean) == (1.5, 15, (4 * 1.5 + 15) / 5)
    found = dict(seconds={"ours": times, "released": [2.0 * t for t in times]}, warm=10,
                 pictures={"ours": {"student": 60}, "released": {}})  # fmt: skip
    ours, released = step.summary(found, 5, 3)
    assert ours["over_ours"] == 1 and ours["pictures"] == {"student": 2} and ours["iteration_ms"] == 1e3 * mean
    assert released["over_ours"] == released["median_over_ours"] == 2 and released["quartiles_over_ours"] == [2, 2]
    assert step.cells(released)[:6] == ["released", "3000", "30000", "8400", "2.00", "2.00 to 2.00"]


def test_losses_that_differ_stop_it():
    same = [{"fake": 1.0, "dmd": 2.0}] * 3
    for name, later, fine in (("released", 1.011, False), ("released", 1.009, True), ("modelopt", 1.04, True)):
        rows = {"ours": same, name: [*same[:2], {"fake": later}]}
        if fine:
            step.check(rows, "ours", 2)
        else:
            with pytest.raises(AssertionError, match=r"released, iteration 2: fake 1.011 1.0"):
                step.check(rows, "ours", 2)
    with pytest.raises(AssertionError, match="iteration 0"):
        step.check({"ours": same, "modelopt": [{"fake": 1.001}, *same[1:]]}, "ours", 2)


def test_every_saving_has_a_row_and_a_form_that_is_none_is_named():
    cfg = parse(["tiny"], "").config
    assert {f"ours, disc.{name} false" for name in step.SAVINGS} <= set(step.recipes_of(cfg))
    nothing = SimpleNamespace(teacher=None, vfm=None, adapter=None)
    with pytest.raises(UserError, match="--only 'ours, fast': allowed is ours, ours, compile"):
        step.forms(cfg, nothing, ["ours, fast"])


def test_the_documents_row_is_the_files(tmp_path, monkeypatch):
    row = dict(form="ours", critic_ms=10.4, generator_ms=20.0, iteration_ms=12.3, over_ours=1.0, iterations=20,
               quartiles_over_ours=[0.9, 1.1], pictures={"student": 2.0})  # fmt: skip
    where = dict(device="a CPU", threads=2, torch="2", commit="abc", command="python -m bench.step tiny")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.step_rows("step-tiny", tables.STEP) == "Not timed yet.\n"
    (tmp_path / "bench" / "results").mkdir(parents=True)
    record = dict(environment=where, batch=32, rows=[row, row | dict(form="else")])
    (tmp_path / "bench" / "results" / "step-tiny.json").write_text(json.dumps(record))
    text = tables.step_rows("step-tiny", [*tables.STEP, "student"], ("ours",))
    assert "| ours | 10 | 20 | 12 | 1.00 | 0.90 to 1.10 | 2.00 |" in text and "else" not in text
    assert text.endswith("a CPU, 2 threads, torch 2, commit abc: medians of 20 iterations, batch 32; "
                         "`python -m bench.step tiny`.\n")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sd35-medium", "flux-dev"])
def test_networks_of_public_classes(preset, tmp_path):
    """Ours, the published order and each saving: losses agree, and a saving's row has fewer pictures."""
    file = tmp_path / "step.json"
    sizes = ["--network", json.dumps(TINY[preset]), *SMALL, "--model.text_length=16"]
    names = ["ours", "ours, model.decode bf16", "ours, kernels.fuse false", "released", "tuned"]
    command = [preset, "--random", *sizes, "--model.dtype=fp32", "--train.precision=fp32", "--only", *names]
    assert step.main([*command, "--iterations", "4", "--json", str(file)]) == 0
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == names
    assert rows["released"]["pictures"]["backbone"] == 6 > rows["ours"]["pictures"]["backbone"]
    assert rows["released"]["pictures"]["decode"] > rows["ours"]["pictures"]["decode"]
