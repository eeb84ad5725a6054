"""Do 8-bit moments train the embedded preset as fp32 ones do? Three seeds of each, the scores of the last student.

    python -m bench.moments [--iterations 60] [--prompts 96] [--seeds 0 1 2] [--out FILE.json]

Six trainings one after another, some 4 minutes each on two cores at the defaults. A score agrees where the mean
of the 8-bit runs differs from that of the fp32 runs by no more than the spread (largest less smallest) of these. As
iterations are few, the cooldown is left as it is in the preset. Exit status 1 where a score does not agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

SCORES = ("eval/kid", "eval/fd", "eval/r1", "eval/cosine")
MOMENTS = ("fp32", "8bit")


def train(moments: str, seed: int, iterations: int, prompts: int, out: Path) -> dict[str, float]:
    """The last student's scores, and the fake's loss averaged over the last quarter."""
    from senseflow.train import main

    flags = {
        "seed": seed, "out": out, "train.moments": moments, "train.iterations": iterations, "eval.prompts": prompts,
        "eval.every": 10**6, "eval.teacher_steps": 4, "train.checkpoint_every": 10**6, "log.tensorboard": "false",
        "log.progress": "false",
    }  # fmt: skip
    if status := main([word for name, value in flags.items() for word in (f"--{name}", str(value))]):
        raise SystemExit(f"the training ended with {status}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/kid" in row][-1]
    losses = [row["fake"] for row in rows if "fake" in row and row["iteration"] > 0.75 * iterations]
    return {name: last[name] for name in SCORES} | {"fake": mean(losses)}


def verdicts(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Of each score: both means, the fp32 spread, and whether they agree."""
    rows = []
    for name in runs["fp32"][0]:
        exact, eight = ([run[name] for run in runs[m]] for m in MOMENTS)
        spread = max(exact) - min(exact)
        row = dict(score=name, fp32=mean(exact), eight=mean(eight), spread=spread)
        rows.append(row | dict(agrees=abs(mean(eight) - mean(exact)) <= spread))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    runs: dict[str, list[dict[str, float]]] = {m: [] for m in MOMENTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for m in MOMENTS:
                runs[m].append(train(m, seed, args.iterations, args.prompts, Path(folder) / f"{m}-{seed}"))
    rows = verdicts(runs)
    print("| score | fp32 | 8-bit | spread of fp32 | |\n|---|---|---|---|---|")
    for row in rows:
        numbers = " | ".join(f"{row[name]:.4g}" for name in ("fp32", "eight", "spread"))
        print(f"| {row['score']} | {numbers} | {'agrees' if row['agrees'] else 'DIFFERS'} |")
    if args.out:
        import torch

        settings = {k: v for k, v in vars(args).items() if k != "out"}
        record = dict(settings, torch=torch.__version__, runs=runs, rows=rows)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
