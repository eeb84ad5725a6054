"""All that needs a GPU, part by part, and one short table: `python -m bench.gpu [--out FOLDER] [PART ...]`, `make gpu`.

A part that fails or outlasts its time does not stop the rest: it is interrupted, and what it measured so far is kept.
In FOLDER (runs/gpu): a log a part, `table.md`, and `all.tar.gz` of these and the result files, which go to
bench/results/ too. Packages that a machine lacks are taken from `site/`, where `make gpu-pack` puts some. --collect,
which needs no GPU, only imports and lists what each part would run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bench.report import BadResult, load, merged, table, verdicts

ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"
SANITIZER = os.environ.get("SANITIZER", "compute-sanitizer")
FAIL, NONE = 1, 5  # pytest's exit codes


class Part(NamedTuple):
    """minutes: after which it is interrupted."""

    name: str
    command: Sequence[str]
    minutes: float


class Outcome(NamedTuple):
    part: str
    verdict: str
    counts: str
    seconds: float


def parts() -> dict[str, Part]:
    """By name, in the order they are run: first whether it is right, then how fast."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    apart = ["-n", "4", "--dist", "loadfile"] if find_spec("xdist") else []  # each compiles its own kernels
    ops = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/ops").glob("test_*.py"))
    ahead = [f for f in ops if "test_aot" in f]
    # Others' kernels (attention, whole blocks) and compilation alone are not ours to check there.
    checked = [f for f in ops if f not in ahead and "attention" not in f and "mmdit" not in f]
    csrc = shutil.which("cmake") and shutil.which("nvcc")
    found = [
        *([Part("csrc", ["make", "csrc"], 4)] if csrc else []),
        Part("kernels", [*pytest, *apart, *(f for f in ops if f not in ahead)], 8),
        Part("other tests", [*pytest, "-m", "gpu", "--ignore=tests/ops"], 4),
        *(Part(f"bench {name}", [*pytest, f"bench/test_{name}.py"], minutes) for name, minutes in BENCHES.items()),
        *(
            Part(f"bench {name}", [sys.executable, "-m", f"bench.{name}"], 8)
            for name in ("step", "data", "memory") if (ROOT / f"bench/{name}.py").exists()
        ),
        *(Part(f"real {preset}", [sys.executable, "-m", "bench.real", preset], 9) for preset in REAL),
        *(
            Part(tool, [SANITIZER, "--tool", tool, "--error-exitcode", "9", *pytest, *checked, "-k", BRIEF], 9)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Part("ahead of time", [*pytest, *apart, *ahead], 6),
    ]  # fmt: skip
    return {part.name.replace(" ", "-"): part for part in found}


# Under the sanitizer, where a kernel takes many times as long: without hypothesis, compilers and the largest tensors.
# `make sanitize` runs them all.
BRIEF = "not graph and not any_ and not compile and not opcheck and not size and not 2_to_the_31"


def collecting(part: Part) -> Part:
    """The same without running a test, so without the sanitizer too."""
    command = [*part.command[list(part.command).index(sys.executable) :], "--collect-only"]
    return part._replace(command=[c for c in command if c not in ("-n", "4", "--dist", "loadfile")])


REAL = ("sd35-medium", "sd35-large")  # trained at true size, where they fit
BENCHES = {"score": 8, "hinge": 6, "lerp": 6, "adamw": 6, "qk_norm_rope": 6, "attention": 5, "mmdit": 9, "modulate": 9}


def missing_packages() -> list[str]:
    """The folders of site/ whose package this Python has not got, each named after it."""
    return [str(p) for p in sorted(SITE.glob("*")) if p.is_dir() and find_spec(p.name) is None]


def environment(part: Part, results: Path) -> dict[str, str]:
    paths = [str(ROOT / "kernels"), str(ROOT), *missing_packages(), os.environ.get("PYTHONPATH", "")]
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join(filter(None, paths)), PYTHONUNBUFFERED="1", SENSEFLOW_BENCH_RESULTS=str(results)
    )
    if part.command[0] == SANITIZER:
        # Every tensor in an allocation of its own, or an access beyond one would hit a neighbour unseen; CUDA graphs
        # cannot have that.
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return env


def _hears_interrupts() -> None:
    """In the child: a shell's background jobs (`make gpu &`) inherit an ignored SIGINT, and exec keeps it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(part: Part, log: Path, results: Path) -> Outcome:
    """Its output goes to the log; interrupted after its minutes, so that a benchmark still writes what it has."""
    start = time.monotonic()
    if shutil.which(part.command[0]) is None:
        return Outcome(part.name, "not run", f"no {part.command[0]} here", 0.0)
    with log.open("w") as file:
        print("$", *part.command, file=file, flush=True)
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment(part, results), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_hears_interrupts,
        )  # fmt: skip
        late = False
        for last, seconds in ((signal.SIGINT, 60 * part.minutes), (signal.SIGKILL, 30), (None, None)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                late = True
                assert last is not None
                os.killpg(process.pid, last)
    spent = time.monotonic() - start
    return Outcome(part.name, _verdict(process.returncode, late, part), _counts(log), spent)


def _verdict(code: int, late: bool, part: Part) -> str:
    if late:
        return f"stopped after {part.minutes:g} min"
    return "ok" if code == 0 or (code == NONE and part.name == "other tests") else f"FAILED ({code})"


def _counts(log: Path) -> str:
    """pytest's closing line without its seconds; else the last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if found := re.search(r"(([\d/]+ (passed|failed|errors?|skipped|deselected|tests collected)(, )?)+)", line):
            return found[1].removesuffix(", ")
    return lines[-1][:80] if len(lines) > 1 else ""


# -- the end -------------------------------------------------------------------------------------------------------


def gathered(results: Path) -> tuple[list[list[str]], Path | None]:
    """(rows of the table of targets, the result file): every benchmark's results in one file under bench/results/."""
    files = sorted(results.glob("*/*.json"), key=lambda p: p.stat().st_mtime)
    if not files:
        return [], None
    whole = merged([load(file) for file in files])
    folder = ROOT / "bench" / "results" / files[0].parent.name
    folder.mkdir(parents=True, exist_ok=True)
    path, i = folder / files[0].name, 1
    while path.exists():
        i += 1
        path = folder / f"{files[0].stem}-{i}.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return verdicts(whole), path


def real_files(results: Path) -> list[Path]:
    """The files of bench.real, each copied to bench/results/DEVICE/real/."""
    copies = []
    for file in sorted(results.glob("*/real/*.json")):
        target = ROOT / "bench" / "results" / file.relative_to(results)
        target.parent.mkdir(parents=True, exist_ok=True)
        copies.append(Path(shutil.copy(file, target)))
    return copies


def main(arguments: list[str] | None = None) -> int:
    """0 where every part passed; 1 where one did not; 2 without a GPU or for a part that is not known."""
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--collect", action="store_true", help="import and list what would run; needs no GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="FOLDER")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in known]:
        print(f"bench.gpu: no part {', '.join(unknown)}: there are {', '.join(known)}", file=sys.stderr)
        return 2
    if args.collect:
        known = {name: collecting(part) for name, part in known.items() if "pytest" in part.command}
    device = "no device: collected alone" if args.collect else device_name()
    if device is None:
        return 2
    print(device, flush=True)
    if args.out.exists():
        shutil.rmtree(args.out / "results", ignore_errors=True)
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    done = []
    for name in [n for n in args.parts or known if n in known]:
        print(f"== {name}", flush=True)
        done.append(run(known[name], args.out / f"{name}.log", args.out / "results"))
        print(f"   {done[-1].verdict}: {done[-1].counts}, {done[-1].seconds:.0f} s", flush=True)
    text = summary(device, done, args.out)
    print(text)
    return 0 if all(o.verdict in ("ok", "not run") for o in done) else FAIL


def summary(device: str, done: Sequence[Outcome], out: Path) -> str:
    """The tables, which are written to out/table.md too, and out/all.tar.gz."""
    try:
        targets, path = gathered(out / "results")
    except BadResult as why:
        targets, path = [[str(why), "", "fail"]], None
    real = real_files(out / "results")
    rows = [[o.part, o.verdict, o.counts, f"{o.seconds:.0f}"] for o in done]
    text = f"\n{device}\n\n" + table(["part", "", "", "s"], rows)
    if targets:
        text += "\n\n" + table(["target", "measured", "verdict"], targets)
    (out / "table.md").write_text(text + "\n")
    with tarfile.open(out / "all.tar.gz", "w:gz") as tar:
        for file in [*sorted(out.glob("*.log")), out / "table.md", *([path] if path else []), *real]:
            tar.add(file, file.name)
    return text


def device_name() -> str | None:
    """The GPU, torch and Triton in a line; None, said, where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        print(f"gpu: NO GPU: torch {torch.__version__} sees no CUDA device here, so nothing was run")
        return None
    import triton

    gpu = f"{torch.cuda.get_device_name()}, driver's CUDA {torch.version.cuda}"
    return f"{gpu}, torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"


if __name__ == "__main__":
    sys.exit(main())
