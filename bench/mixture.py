"""Where the fake lags: DMD on a 2-D mixture of four Gaussians, with and without IDA: `python -m bench.mixture`.

    python -m bench.mixture --json bench/results/mixture.json     # seconds a seed; what the file has is not made again

The teacher's score is exact here, so what goes wrong is the fake's. Student and fake are small MLPs, both start from a
fit of the mixture; the student has one step or four, trained by backward simulation. All settings of a line (ratio of
the fake's rate to the student's, lambda) run at once, on the same draws. Measured: the share of 2048 samples within 3
deviations of a mode (the mixture itself: 98.9 %), at the start and eight times a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senseflow_kernels import dmd_loss

MODES = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
STD, BATCH, WIDTH, LR = 0.25, 256, 64, 1e-3
ANCHORS = {1: (1.0,), 4: (1.0, 0.75, 0.5, 0.25)}  # by steps of the student
RATIOS, LAMBDAS, FAKE_UPDATES = (0.1, 0.3, 1.0, 3.0), (1.0, 0.995, 0.97), (1, 2)
SETTINGS = [(ratio, lam) for ratio in RATIOS for lam in LAMBDAS]
SAMPLES, LOOKS, UPDATES, SEEDS = 2048, 8, 200, 3
Net = list[Tensor]  # [K, in, out] and [K, 1, out] of three layers


def exact_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """(x_t - E[x0 | x_t]) / sigma of the mixture, in closed form. x [N, 2], sigma [N, 1]."""
    alpha = 1 - sigma
    var = (alpha * STD) ** 2 + sigma**2
    distance = (x[:, None] - alpha[:, None] * MODES).square().sum(-1)
    share = torch.softmax(-distance / (2 * var), 1)
    mean = MODES + (alpha * STD**2 / var)[:, None] * (x[:, None] - alpha[:, None] * MODES)
    return (x - (share[..., None] * mean).sum(1)) / sigma


def predict(net: Net, x: Tensor, sigma: Tensor) -> Tensor:
    """Velocities [K, N, 2] of K networks. x [K, N, 2], sigma [K, N, 1]."""
    h = torch.cat([x, sigma.expand(*x.shape[:2], 1)], 2)
    for i in range(0, len(net), 2):
        h = torch.baddbmm(net[i + 1], h, net[i])
        h = F.silu(h) if i < 4 else h
    return h


class Adam:
    """Adam with a rate a network, gradients clipped to a norm of 1 each."""

    def __init__(self, net: Net, rates: Tensor):
        self.net, self.rates, self.step_ = net, rates.view(-1, 1, 1), 0
        self.m, self.v = [torch.zeros_like(p) for p in net], [torch.zeros_like(p) for p in net]

    @torch.no_grad()
    def step(self, loss: Tensor, factor: float = 1.0) -> None:
        grads = torch.autograd.grad(loss, self.net)
        norm = torch.stack([g.square().sum((1, 2)) for g in grads]).sum(0).sqrt().view(-1, 1, 1)
        self.step_ += 1
        for p, g, m, v in zip(self.net, grads, self.m, self.v, strict=True):
            g = g * (1 / norm.clamp_min(1.0))
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.001)
            size = (v / (1 - 0.999**self.step_)).sqrt() + 1e-8
            p -= self.rates * factor * (m / (1 - 0.9**self.step_)) / size


def start(g: torch.Generator) -> Net:
    """One network, fitted to the mixture's velocities."""
    sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, 2)]
    net = [t for i, o in sizes for t in (torch.randn(1, i, o, generator=g) / i**0.5, torch.zeros(1, 1, o))]
    optimizer = Adam([p.requires_grad_() for p in net], torch.tensor([3e-3]))
    for _ in range(400):
        sigma = torch.rand(BATCH, 1, generator=g).clamp_min(0.02)
        x0 = MODES[torch.randint(4, (BATCH,), generator=g)] + STD * torch.randn(BATCH, 2, generator=g)
        noise = torch.randn(BATCH, 2, generator=g)
        x_t = (1 - sigma) * x0 + sigma * noise
        optimizer.step((predict(net, x_t[None], sigma[None]) - (noise - x0)).square().mean())
    return [p.detach() for p in net]


@torch.no_grad()
def rollout(student: Net, noises: Tensor, anchors: Sequence[float], steps: int) -> Tensor:
    """The input of anchor `steps`: from pure noise through the first `steps` anchors, re-noised; the samples where
    these are all. noises [5, N, 2]."""
    x = noises[0].expand(len(student[0]), -1, -1)
    for k in range(steps):
        sigma = torch.tensor(anchors[k]).view(1, 1, 1)
        x0 = x - sigma * predict(student, x, sigma)
        after = anchors[k + 1] if k + 1 < len(anchors) else 0.0
        x = (1 - after) * x0 + after * noises[k + 1]
    return x


def inside(student: Net, seed: int, anchors: Sequence[float]) -> list[float]:
    """Of each student, the share of samples within 3 deviations of a mode; NaN is inside of nothing."""
    g = torch.Generator().manual_seed(10_000 + seed)
    x = rollout(student, torch.randn(5, SAMPLES, 2, generator=g), anchors, len(anchors))
    distance = (x[:, :, None] - MODES).square().sum(-1).amin(2).sqrt()
    return (distance < 3 * STD).double().mean(1).tolist()


def student_step(adam: Adam, student: Net, fake: Net, x0: Tensor, t: Tensor, noise: Tensor, factor: float) -> Tensor:
    """The DMD gradient into every student; the rms of the normalised score difference [K]."""
    k, t = len(student[0]), 0.02 + 0.96 * t
    x_t = ((1 - t) * x0 + t * noise).detach()
    x, flat, faked = (v.reshape(-1, 2) for v in (x0, x_t, predict(fake, x_t, t).detach()))
    each = t.repeat(k, 1)
    out = dmd_loss(x, flat, faked, exact_velocity(flat, each), sigma=each.flatten())
    adam.step(out.loss * k, factor)
    return out.grad_rms.view(k, -1).mean(1)


def train(seed: int, steps: int, fake_updates: int, updates: int) -> list[dict[str, Any]]:
    """All SETTINGS of one number of fake updates. The rates fall over the second half, the student's to 0 and the
    fake's to a tenth, as the trainer's."""
    g = torch.Generator().manual_seed(seed)
    first, k, anchors = start(g), len(SETTINGS), ANCHORS[steps]
    student, fake = ([p.repeat(k, 1, 1).requires_grad_() for p in first] for _ in range(2))
    ratios, lams = (torch.tensor(v) for v in zip(*SETTINGS, strict=True))
    adam, adam_fake = Adam(student, torch.full((k,), LR)), Adam(fake, LR * ratios)
    total, paths, gaps = updates * fake_updates, [inside(student, seed, anchors)], []
    for i in range(total):
        left = min(1.0, 2 * (1 - i / total))
        draw = torch.randn(8, BATCH, 2, generator=g)
        sigma, t = torch.rand(2, BATCH, 1, generator=g).unbind(0)
        j = int(torch.randint(len(anchors), (1,), generator=g))
        anchor = torch.tensor(anchors[j]).view(1, 1, 1)
        x_tau = rollout(student, draw[:5], anchors, j)
        x0 = x_tau - anchor * predict(student, x_tau, anchor)
        if (i + 1) % fake_updates == 0:
            gaps.append(student_step(adam, student, fake, x0, t, draw[5], left).tolist())
            with torch.no_grad():
                for p, q in zip(fake, student, strict=True):
                    p.lerp_(q, 1 - lams.view(-1, 1, 1))
        x0 = x0.detach()
        error = predict(fake, (1 - sigma) * x0 + sigma * draw[6], sigma) - (draw[6] - x0)
        adam_fake.step(error.square().mean((1, 2)).sum(), 0.1 + 0.9 * left)
        if (i + 1) * LOOKS % total < LOOKS:
            paths.append(inside(student, seed, anchors))
    late = torch.tensor(gaps)[-(len(gaps) // 4) :].mean(0).tolist()
    where = dict(seed=seed, steps=steps, fake_updates=fake_updates)
    return [
        where | dict(ratio=r, lam=lam, inside=[p[n] for p in paths], gap=late[n]) for n, (r, lam) in enumerate(SETTINGS)
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def lines(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a result file: for each lambda the share inside at the end and, in brackets, the lowest after
    the first quarter, means over seeds; rows that no seed has yet are left out."""
    columns = ["steps", "fake updates", "fake's rate / student's"]
    columns += [f"IDA, lambda {lam:g}" if lam < 1 else "no IDA" for lam in LAMBDAS]
    found = []
    for steps, n, ratio in product(ANCHORS, sorted({row["fake_updates"] for row in record["rows"]}), RATIOS):
        cells = []
        for lam in LAMBDAS:
            key = dict(steps=steps, fake_updates=n, ratio=ratio, lam=lam)
            paths = [r["inside"] for r in record["rows"] if key.items() <= r.items()]
            if paths:
                worst = mean([min(path[len(path) // 4 :]) for path in paths])
                cells.append(f"{100 * mean([p[-1] for p in paths]):.0f} ({100 * worst:.0f})")
        if cells:
            found.append([str(steps), str(n), f"{ratio:g}", *cells])
    return columns, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mixture", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, required=True, help="result file, continued where it is there")
    add("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    add("--steps", nargs="+", type=int, default=list(ANCHORS), choices=ANCHORS)
    add("--fake-updates", nargs="+", type=int, default=list(FAKE_UPDATES))
    add("--updates", type=int, default=UPDATES, help="student updates of every run")
    args = parser.parse_args(argv)
    record: dict[str, Any] = dict(
        updates=args.updates, torch=torch.__version__, python=platform.python_version(), rows=[]
    )
    if args.json.is_file():
        record = json.loads(args.json.read_text())
        if record["updates"] != args.updates:
            print(f"bench.mixture: {args.json} is of --updates {record['updates']}", file=sys.stderr)
            return 2
    for seed, steps, n in product(args.seeds, args.steps, args.fake_updates):
        where = dict(seed=seed, steps=steps, fake_updates=n)
        if not any(where.items() <= row.items() for row in record["rows"]):
            record["rows"] += train(seed, steps, n, args.updates)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    columns, rows = lines(record)
    for row in (columns, *rows):
        print(" | ".join(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
