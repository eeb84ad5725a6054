"""One iteration of Algorithm 1 on this rank's rows of the batch, in one part or several (train.accumulate)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from senseflow.config import Config
from senseflow.data.batches import Batch, split
from senseflow.steps import (
    Parts,
    Step,
    discriminator_loss,
    fake_loss,
    generator_losses,
    reference_features,
    saturation,
    student_forward,
)
from senseflow.updates import Updates

Losses = Iterator[tuple[Tensor, Tensor | None]]


def mean_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over the parts of a batch, which are equally large; of one part, itself."""
    if len(rows) == 1:
        return dict(rows[0])
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def iterate(cfg: Config, parts: Parts, updates: Updates, batch: Batch, iteration: int) -> dict[str, Tensor]:
    """Student forward, its step and IDA on every f-th, then fake, then D: each step once, on the gradients of all parts
    of the batch, so that f counts updates whatever train.accumulate. Returns this rank's metrics."""
    turn = iteration - cfg.train.fake_warmup
    is_gen = turn >= 0 and (turn + 1) % cfg.train.gen_every == 0
    steps: list[Step] = []
    n = cfg.train.accumulate

    def forward(part: Batch) -> Step:
        updates.ready("student")
        step = student_forward(parts, cfg, part, iteration, with_grad=is_gen)
        updates.ready("fake", "disc")
        step.reference = reference_features(parts, cfg, step)
        steps.append(step)
        return step

    def student_losses() -> Losses:
        for part in split(batch, n):
            step = forward(part)
            yield generator_losses(parts, cfg, step, step.reference), step.x0
            step.x0, step.pred = step.x0.detach(), step.pred.detach()  # its graph has been used

    def fake_losses() -> Losses:
        for step in steps:
            loss = fake_loss(parts, cfg, step)
            step.metrics["fake"] = loss.detach()
            if cfg.disc.kind == "fake_features":  # DMD2: the classifier and the features it reads learn together
                adversarial = discriminator_loss(parts, cfg, step, step.reference)
                step.metrics["disc"] = adversarial.detach()
                loss = loss + cfg.disc.d_weight * adversarial
            yield loss, None

    def disc_losses() -> Losses:
        for step in steps:
            loss = discriminator_loss(parts, cfg, step, step.reference)
            step.metrics["disc"] = loss.detach()
            yield loss, None

    updated: dict[str, Tensor] = {}
    if is_gen:

        def lam() -> float | Tensor:
            return updates.lam(mean_of([step.metrics for step in steps]))

        updated |= updates.step_parts(student_losses(), iteration, "student", lam=lam, parts=n)
        updates.ready("fake")  # which IDA has moved
    else:
        for part in split(batch, n):
            forward(part)
    names = ("fake", "disc") if cfg.disc.kind == "fake_features" else ("fake",)
    updated |= updates.step_parts(fake_losses(), iteration, *names, parts=n)
    if cfg.disc.kind == "vfm":
        if steps[0].silent and cfg.disc.omega_on_d:
            updated |= updates.coast(iteration, "disc")
        else:
            updated |= updates.step_parts(disc_losses(), iteration, "disc", parts=n)
        parts.disc.update_spectral_norm()  # type: ignore[operator, union-attr]
    for step in steps:
        step.metrics["saturation"] = saturation(step.x0)
    return mean_of([step.metrics for step in steps]) | updated
