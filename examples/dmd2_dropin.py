"""A DMD2-style loop as such projects write it, and the same loop with senseflow_kernels: three lines differ.

Both start from the same weights and see the same random numbers; after some steps their losses, gradients and weights
are compared. Toy networks, a few seconds on a CPU. After `pip install -e .` in the repo:

    python examples/dmd2_dropin.py [--steps N] [--device cuda]

Exits with 1 where they differ by more than is allowed: see `ALLOWED`.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senseflow_kernels import dmd_loss, hinge_discriminator, hinge_generator, launches, lerp_

GUIDANCE, EMA_DECAY, IDA_LAM = 3.0, 0.99, 0.97
# Relative, 2-norm. Of one step's numbers: fp32, summed in another order. Of the weights after all steps: Adam divides
# by the size of the gradient, so where one is near 0 a last bit of it moves a weight by a visible part of lr.
ALLOWED = {"losses": 1e-5, "gradients of step 1": 1e-5, "student": 1e-4, "ema": 1e-4, "fake": 1e-4, "heads": 1e-4}


class Velocity(nn.Module):
    """v(x_t, sigma, condition): x_t [B, 4, 8, 8], sigma [B], condition [B, 4] -> [B, 4, 8, 8]."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.inside, self.mid, self.outside = (
            nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        )  # fmt: skip
        self.condition = nn.Linear(5, width)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        shift = self.condition(torch.cat([sigma[:, None], condition], 1))[:, :, None, None]
        h = F.silu(self.inside(x) + shift)
        return self.outside(F.silu(self.mid(h)))


class Heads(nn.Module):
    """A discriminator of three heads: logits [B, 1, 8, 8], [B, 1, 4, 4] and [B, 1, 2, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(4, 1, 3, stride=stride, padding=1) for stride in (1, 2, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self.heads]


class Run:
    """Networks, optimizers and records of one run. All runs of a seed start alike."""

    def __init__(self, device: torch.device):
        torch.manual_seed(0)
        self.student, self.teacher, self.heads = (
            Velocity().to(device), Velocity().to(device).requires_grad_(False), Heads().to(device)
        )  # fmt: skip
        self.fake, self.ema = copy.deepcopy(self.student), copy.deepcopy(self.student).requires_grad_(False)
        self.opt = torch.optim.AdamW(self.student.parameters(), lr=1e-3)
        self.opt_fake = torch.optim.AdamW(self.fake.parameters(), lr=1e-3)
        self.opt_heads = torch.optim.AdamW(self.heads.parameters(), lr=1e-3)
        self.losses: list[Tensor] = []
        self.first_grads: list[Tensor] = []


def noised(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.view(-1, 1, 1, 1)
    return (1 - s) * x + s * noise


# -- before: what is found in such projects ------------------------------------------------------------------------


def dmd_before(x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
    """Guidance, x0 in fp64, the normaliser, a pseudo-target and an mse: 28 kernels on a GPU, forward and backward."""
    with torch.no_grad():
        s = sigma.view(-1, 1, 1, 1).double()
        real = uncond + GUIDANCE * (cond - uncond)
        p_real = x - (x_t.double() - s * real.double())
        p_fake = x - (x_t.double() - s * fake.double())
        grad = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True))
    return 0.5 * F.mse_loss(x.float(), (x - grad).detach().float())


def hinge_d_before(real: list[Tensor], fake: list[Tensor], weight: Tensor) -> Tensor:
    r, f = (torch.cat([t.flatten(1) for t in heads], 1) for heads in (real, fake))
    return (F.relu(1 - r).mean(1) * weight).mean() + (F.relu(1 + f).mean(1) * weight).mean()


def hinge_g_before(fake: list[Tensor], weight: Tensor) -> Tensor:
    return (-torch.cat([t.flatten(1) for t in fake], 1).mean(1) * weight).mean()


@torch.no_grad()
def average_before(slow: nn.Module, fast: nn.Module, decay: float) -> None:
    for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
        p.mul_(decay).add_(q, alpha=1 - decay)


# -- after: three lines --------------------------------------------------------------------------------------------


def dmd_after(x: Tensor, x_t: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
    guidance = torch.full_like(sigma, GUIDANCE)
    return dmd_loss(x, x_t, fake, cond, uncond, sigma=sigma, guidance=guidance).loss


def hinge_d_after(real: list[Tensor], fake: list[Tensor], weight: Tensor) -> Tensor:
    return hinge_discriminator(real, fake, weight).loss


def average_after(slow: nn.Module, fast: nn.Module, decay: float) -> None:
    lerp_(list(slow.parameters()), list(fast.parameters()), decay)


BEFORE = dmd_before, hinge_d_before, hinge_g_before, average_before
AFTER = dmd_after, hinge_d_after, hinge_generator, average_after


# -- the loop ------------------------------------------------------------------------------------------------------


def train(steps: int, device: torch.device, forms: tuple) -> Run:
    """The loop, with the forms of before or of after."""
    dmd, hinge_d, hinge_g, average = forms
    run, batch = Run(device), 8
    random = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(batch, 4, 8, 8, generator=random).to(device)

    nothing = torch.zeros(batch, 4, device=device)
    for _ in range(steps):
        condition = torch.randn(batch, 4, generator=random).to(device)
        sigma = (0.05 + 0.9 * torch.rand(batch, generator=random)).to(device)
        start, noise, fake_noise = normal(), normal(), normal()
        data = condition[:, :, None, None] + 0.1 * normal()
        weight = (1 - sigma) ** 2

        # the student: one step from pure noise, judged by teacher, fake network and heads
        x = start - run.student(start, torch.ones_like(sigma), condition)
        x_t = noised(x.detach(), noise, sigma)
        with torch.no_grad():
            fake = run.fake(x_t, sigma, condition)
            cond, uncond = run.teacher(x_t, sigma, condition), run.teacher(x_t, sigma, nothing)
        loss = dmd(x, x_t, fake, cond, uncond, sigma) + 0.1 * hinge_g(run.heads(x), weight)
        run.opt.zero_grad()
        loss.backward()
        if not run.first_grads:
            run.first_grads = [p.grad.clone() for p in run.student.parameters() if p.grad is not None]
        run.opt.step()
        average(run.ema, run.student, EMA_DECAY)
        average(run.fake, run.student, IDA_LAM)

        # the fake network: denoises the student's samples
        x = x.detach()
        loss_fake = F.mse_loss(run.fake(noised(x, fake_noise, sigma), sigma, condition), fake_noise - x)
        run.opt_fake.zero_grad()
        loss_fake.backward()
        run.opt_fake.step()

        # the discriminator
        loss_d = hinge_d(run.heads(data), run.heads(x), weight)
        run.opt_heads.zero_grad()
        loss_d.backward()
        run.opt_heads.step()
        run.losses.append(torch.stack([loss.detach(), loss_fake.detach(), loss_d.detach()]))
    return run


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b| in the 2-norm over all tensors."""
    first, second = (torch.cat([t.detach().double().flatten() for t in some]) for some in (a, b))
    return ((first - second).norm() / second.norm()).item()


def compare(before: Run, after: Run) -> dict[str, float]:
    found = {
        "losses": difference(after.losses, before.losses),
        "gradients of step 1": difference(after.first_grads, before.first_grads),
    }
    for name in ("student", "ema", "fake", "heads"):
        nets = getattr(after, name), getattr(before, name)
        found[name] = difference(*(list(net.parameters()) for net in nets))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="iterations of each loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    # TF32 would turn a last bit into a thousandth wherever it decides how an activation is rounded.
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    before, after = train(args.steps, device, BEFORE), train(args.steps, device, AFTER)
    ran = f"{launches.total()} fused launches" if launches else "torch path, no fused kernel"
    print(f"{args.steps} steps on {device}, after: {ran}\n")
    print(f"{'before and after':<22} {'difference':>10} {'allowed':>8}")
    found = compare(before, after)
    for name, value in found.items():
        print(f"{name:<22} {value:>10.1e} {ALLOWED[name]:>8.0e}{'' if value <= ALLOWED[name] else '  TOO LARGE'}")
    return int(not all(value <= ALLOWED[name] for name, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
