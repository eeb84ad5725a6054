"""How much of the intended move of theta (Adam) and phi (IDA) each way of keeping bf16 weights makes.

    python -m bench.precision [--steps 500] [--out FILE.json]

theta and phi have elements of N(0, 0.02), phi a gap of 1 % to theta; every element's gradient keeps its sign and has
noise of its own size, so that Adam moves by about lr a step. The intended move is that of the same run in fp64; the
share made is its projection, <made, intended> / <intended, intended>: 1 is all of it. Also the cosine of the two, 1
being no noise. The released code's form is torch.optim.AdamW on bf16 weights and phi.mul_(lam).add_(theta,
alpha=1 - lam). Every form starts at the same point and gets the same gradients, bf16 numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senseflow_kernels import AdamW, join_fp32, split_fp32

N, LAM, LR, BETAS = 1 << 18, 0.97, 1e-6, (0.9, 0.999)
FORMS = ("released two-op", "nearest", "stochastic", "split", "fp32")


def start() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    theta = (0.02 * torch.randn(N, generator=g)).bfloat16().float()
    return theta, (theta * (1 + 0.01 * torch.randn(N, generator=g))).bfloat16().float()


def gradients(steps: int) -> Any:
    g = torch.Generator().manual_seed(1)
    sign = torch.randn(N, generator=g).sign()
    for _ in range(steps):
        yield (sign + torch.randn(N, generator=g)).bfloat16().float()


def fp64_run(steps: int) -> tuple[Tensor, Tensor]:
    theta, phi = (t.double() for t in start())
    param = torch.nn.Parameter(theta)
    optimizer = torch.optim.AdamW([param], lr=LR, betas=BETAS, weight_decay=0.0)
    for grad in gradients(steps):
        param.grad = grad.double()
        optimizer.step()
        phi.lerp_(param.detach(), 1 - LAM)
    return param.detach(), phi


def released(steps: int) -> tuple[Tensor, Tensor]:
    theta, phi = (t.bfloat16() for t in start())
    param = torch.nn.Parameter(theta)
    optimizer = torch.optim.AdamW([param], lr=LR, betas=BETAS, weight_decay=0.0)
    for grad in gradients(steps):
        param.grad = grad.bfloat16()
        optimizer.step()
        phi.mul_(LAM).add_(param.detach(), alpha=1 - LAM)
    return param.detach().float(), phi.float()


def ours(form: str, steps: int) -> tuple[Tensor, Tensor]:
    theta, phi = (t if form == "fp32" else t.bfloat16() for t in start())
    low = phi_low = None
    if form == "split":
        (theta, low), (phi, phi_low) = (split_fp32(t.float()) for t in (theta, phi))
    param = torch.nn.Parameter(theta)
    optimizer = AdamW(
        [param], lr=LR, betas=BETAS, weight_decay=0.0, precision=form, phi=[phi],
        phi_low=None if phi_low is None else [phi_low],
    )  # fmt: skip
    if low is not None:
        optimizer.state[param]["low"].copy_(low)
    for grad in gradients(steps):
        param.grad = grad.to(param.dtype)
        optimizer.step(lam=LAM)
    if phi_low is not None:
        return join_fp32(param.detach(), optimizer.state[param]["low"]), join_fp32(phi, phi_low)
    return param.detach().float(), phi.float()


def measure(steps: int) -> list[dict[str, Any]]:
    begin = [t.double() for t in start()]
    wanted = [end - t for end, t in zip(fp64_run(steps), begin, strict=True)]
    rows = []
    for form in FORMS:
        ends = released(steps) if form == FORMS[0] else ours(form, steps)
        row: dict[str, Any] = dict(form=form)
        for name, end, t, want in zip(("theta", "phi"), ends, begin, wanted, strict=True):
            made = end.double() - t
            row[f"{name} share"] = float(made @ want / (want @ want))
            row[f"{name} cosine"] = float(made @ want / (made.norm() * want.norm()).clamp_min(1e-300))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args.steps)
    names = list(rows[0])[1:]
    print(f"| form | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for row in rows:
        print(f"| {row['form']} | {' | '.join(f'{row[name]:.4f}' for name in names)} |")
    if args.out:
        record = dict(steps=args.steps, elements=N, lam=LAM, lr=LR, betas=BETAS, torch=torch.__version__, rows=rows)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
