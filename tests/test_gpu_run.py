"""`make gpu`: every part runs though one fails, what was measured is kept and judged, and one table says so."""

import json
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from bench_rows import ROWS, result, row

from bench import gpu, report
from bench.gpu import Part

SLOW = """
import pathlib, os, time
try:
    print("7 passed, 1 skipped in 3.00s", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(os.environ["OUT"], "interrupted").touch()
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(parts, *arguments) -> (exit code, what was printed); results land in tmp_path/repo."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "repo")
    monkeypatch.setattr(gpu, "device_name", lambda: "GPU, torch 2")
    monkeypatch.setenv("OUT", str(tmp_path))
    (tmp_path / "repo").mkdir()

    def call(parts, *arguments):
        monkeypatch.setattr(gpu, "parts", lambda: {part.name: part for part in parts})
        code = gpu.main([*arguments, "--out", str(tmp_path / "out")])
        return code, capsys.readouterr().out

    return call


def shell(text):
    return ["sh", "-c", text]


def test_one_that_fails_or_hangs_or_is_absent_does_not_stop_the_rest(run, tmp_path):
    parts = [
        Part("fine", shell("echo 12 passed, 3 skipped in 4.00s"), 1), Part("broken", shell("echo 1 failed; exit 1"), 1),
        Part("slow", [sys.executable, "-c", SLOW], 0.05), Part("absent", ["no-such-program"], 1),
        Part("last", shell("echo checked"), 1),
    ]  # fmt: skip
    code, out = run(parts)
    assert code == 1
    rows = [line.rpartition("| ")[0] for line in out.splitlines()]  # without seconds
    for line in (
        "| fine | ok | 12 passed, 3 skipped ", "| broken | FAILED (1) | 1 failed ",
        "| slow | stopped after 0.05 min | 7 passed, 1 skipped ",
        "| absent | not run | no no-such-program here ", "| last | ok | checked ",
    ):  # fmt: skip
        assert line in rows
    assert (tmp_path / "interrupted").exists()  # and not killed: a benchmark writes its file then
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as tar:
        assert tar.getnames() == ["broken.log", "fine.log", "last.log", "slow.log", "table.md"]
    assert run([parts[0], parts[3]], "fine")[0] == 0 and run(parts, "fine", "absent")[0] == 0


def test_results_of_the_parts_become_one_and_are_judged(run, tmp_path):
    """Each row against the copy of its own run."""
    results = tmp_path / "out" / "results"
    score = json.dumps(result("cuda", ROWS, device="GPU") | dict(missing=["lerp"], stopped=False))
    slower = row("copy_", "copy", 2000, op="copy", case="2048 MiB", mode="call", bytes=2_000_000_000)
    lerp = row("ours", "ours", 1050, op="lerp fp32", case="large: 8e9", mode="call", bytes=1_000_000_000)
    other = json.dumps(result("cuda", [slower, lerp], device="GPU") | dict(missing=["score"], stopped=False))

    def part(name, text):
        (tmp_path / name).write_text(text)
        at = results / "gpu" / f"2026-01-02-{name}.json"
        return Part(name, shell(f"mkdir -p {at.parent} && cp {tmp_path / name} {at} && echo 1 passed"), 1)

    code, out = run([part("0123456789", score), part("0123456789-2", other)])
    assert code == 0
    assert "| score gradient b=1: at most 8 us | 5.00 us | pass |" in out
    assert "| lerp fp32: 92 % of the copy bandwidth | 95.2% (large: 8e9) | pass |" in out  # of 1 TB/s; 48 % of 2
    (file,) = (tmp_path / "repo" / "bench" / "results" / "gpu").iterdir()
    whole = report.load(file)
    assert file.name == "2026-01-02-0123456789.json" and not whole["partial"]
    assert len(whole["rows"]) == len(ROWS) + 1
    assert "95%" in report.render(whole)


def test_trainings_at_true_size_keep_their_files(run, tmp_path):
    """Each of bench.real's beside the table of its phases: to bench/results/ and into the archive."""
    at = tmp_path / "out" / "results" / "gpu" / "real"
    write = f"mkdir -p {at} && echo '{{}}' > {at}/day-commit-sd35-medium.json"
    code, out = run([Part("real", shell(f"{write} && echo sd35-medium: generator iteration 900 ms"), 1)])
    assert code == 0 and "| real | ok | sd35-medium: generator iteration 900 ms |" in out
    assert (tmp_path / "repo/bench/results/gpu/real/day-commit-sd35-medium.json").read_text() == "{}\n"
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as tar:
        assert "day-commit-sd35-medium.json" in tar.getnames()


@pytest.mark.parametrize("name", ["device", "commit", "torch", "triton"])
def test_runs_that_differ_are_not_merged(name):
    one, two = result("cuda", ROWS), result("cuda", ROWS, **{name: "another"})
    with pytest.raises(report.BadResult, match=f"differ in {name}"):
        report.merged([one, two])


def test_what_one_run_lacks_the_whole_lacks():
    score, lerp = (result("cuda", ROWS) | dict(partial=True, stopped=False, missing=m) for m in (["a"], ["a", "b"]))
    assert report.merged([score, lerp])["partial"] and report.merged([score, lerp])["missing"] == ["a"]
    assert not report.merged([score, lerp | dict(missing=["b"])])["partial"]
    assert report.merged([score, lerp | dict(missing=["b"], stopped=True)])["partial"]


def test_packed_packages_stand_in_for_missing_ones_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    for name in ("torch", "no_such_package"):
        (tmp_path / name / name).mkdir(parents=True)
    assert gpu.missing_packages() == [str(tmp_path / "no_such_package")]
    paths = gpu.environment(Part("", ["x"], 1), tmp_path)["PYTHONPATH"].split(":")
    assert paths[:3] == [str(gpu.ROOT / "kernels"), str(gpu.ROOT), str(tmp_path / "no_such_package")]


def test_every_test_file_of_the_ops_and_every_benchmark_has_a_part():
    parts = gpu.parts()
    named = {word for part in parts.values() for word in part.command}
    for file in (*gpu.ROOT.glob("tests/ops/test_*.py"), *gpu.ROOT.glob("bench/test_*.py")):
        name = str(file.relative_to(gpu.ROOT))
        assert name in named or name == "bench/test_csrc.py", name  # of a CPU
    assert [p.name for p in parts.values() if p.command[0] == gpu.SANITIZER] == ["memcheck", "racecheck", "synccheck"]
    assert parts["real-sd35-large"].command[1:] == ["-m", "bench.real", "sd35-large"]
    score = gpu.collecting(parts["memcheck"]).command
    assert score[0] == sys.executable and score[-1] == "--collect-only"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_without_a_gpu_is_an_error():
    """And an unknown part, and a sanitizer that is not there."""
    make = ["make", f"PYTHON={sys.executable}"]
    if not torch.cuda.is_available():
        done = subprocess.run([*make, "gpu"], cwd=gpu.ROOT, capture_output=True, text=True)
        assert done.returncode and "NO GPU" in done.stdout
    done = subprocess.run([*make, "gpu", "PARTS=fast"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode and "no part fast: there are" in done.stderr
    done = subprocess.run([*make, "sanitize", "SANITIZER=none"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode and done.stdout == "sanitize: no none here, so nothing was checked\n"
