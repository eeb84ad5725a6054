"""Running the student: backward simulation in training, and the two samplers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from senseflow.algo.dmd import teacher_predictions
from senseflow.algo.isg import move
from senseflow.flow import add_noise, cfg, prediction_to_x0
from senseflow.models.adapter import Adapter, Condition


def predict_x0(adapter: Adapter, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
    """The network's x0 at (x, sigma fp32 [B])."""
    pred = adapter.predict(net, x, sigma, cond)
    return prediction_to_x0(x, pred, sigma, adapter.schedule.alpha(sigma), adapter.parameterization)


def _at(adapter: Adapter, sigma: float, x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
    return s, adapter.schedule.alpha(s)


@torch.no_grad()
def backward_simulation(
    adapter: Adapter, student: nn.Module, noises: Sequence[Tensor], anchors: Sequence[float],
    steps: int, cond: Condition,
) -> Tensor:  # fmt: skip
    """x_tau at anchors[steps]: from pure noise through the first `steps` anchors, fresh noise after each
    (paper.md 2, step 4). noises: steps + 1 tensors [B, C, H, W]; anchors: descending sigmas."""
    x = noises[0]
    for k in range(steps):
        sigma, _ = _at(adapter, anchors[k], x)
        x0 = predict_x0(adapter, student, x, sigma, cond)
        x = add_noise(x0, noises[k + 1], *_at(adapter, anchors[k + 1], x))
    return x


@torch.no_grad()
def sample_renoise(
    adapter: Adapter, net: nn.Module, noises: Sequence[Tensor], anchors: Sequence[float], cond: Condition
) -> Tensor:  # fmt: skip
    """Stochastic re-noise sampler, the way the student is trained: x0 at each anchor, then fresh noise at the next.
    noises: one [B, C, H, W] per anchor. Returns the last x0."""
    last = len(anchors) - 1
    x = backward_simulation(adapter, net, noises, anchors, last, cond)
    return predict_x0(adapter, net, x, _at(adapter, anchors[last], x)[0], cond)


@torch.no_grad()
def sample_euler(
    adapter: Adapter, net: nn.Module, noise: Tensor, sigmas: Sequence[float], cond: Condition,
    guidance: Tensor | None = None, uncond: Condition | None = None,
) -> Tensor:  # fmt: skip
    """Deterministic sampler from sigmas[0] = 1 down to sigmas[-1] = 0: Euler for flow, DDIM for epsilon (whose first
    sigma is the schedule's largest); with classifier-free guidance when uncond is given."""
    x = noise
    for here, there in pairwise(sigmas):
        sigma, _ = _at(adapter, here, x)
        v_cond, v_uncond = teacher_predictions(adapter, net, x, sigma, cond, guidance, uncond)
        if v_uncond is not None:
            assert guidance is not None
            v_cond = cfg(v_cond, v_uncond, guidance)
        x = move(adapter, x, v_cond, sigma, _at(adapter, there, x)[0])
    return x
