"""The parity check of an export: the model card's own code against our sampler, from the same noise."""

from __future__ import annotations

import ast
import functools
import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from senseflow.algo.rollout import sample_euler, sample_renoise
from senseflow.config import UserError
from senseflow.model_card import FENCE, PLACES
from senseflow.models.flux import unpack
from senseflow.models.loading import first_line

# Bound of |ours - theirs| / |theirs|. fp32: some thousand roundings of 6e-8 that add up like a random walk, times the
# 15 by which SDXL's x0 at its last timestep magnifies them, and room. Half dtypes: the two round at other places
# (autocast here, half weights there), 2^-8 or 2^-11 a layer, some ten layers deep; a wrong sigma costs more than .1.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Parity:
    """How far the two are apart: largest |difference| of the latents, and its norm relative to theirs."""

    sampler: str
    max_abs: float
    relative: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.bound  # False for NaN

    def __str__(self) -> str:
        return (
            f"{self.sampler}: max abs latent difference {self.max_abs:.3g}, relative {self.relative:.2g} "
            f"({'within' if self.passed else 'ABOVE'} {self.bound:g})"
        )


@dataclass
class Outcome:
    """What a card's block did: the normal numbers it drew, in order, its last latents, and its pictures."""

    sampler: str
    prompts: list[str]
    noises: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None
    images: Any = None


class _Recorder(TorchFunctionMode):
    """Keeps every tensor of normal numbers that torch draws, and changes none."""

    def __init__(self, into: list[Tensor]):
        super().__init__()
        self.into = into

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            self.into.append(out.detach().clone())
        return out


def _watch(scheduler: Any, outcome: Outcome) -> None:
    """Keeps the sample of each step, the last one's in the end. The wrapper shows the step's own signature, which
    pipelines look at."""
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        outcome.latents = (result[0] if isinstance(result, tuple) else result.prev_sample).detach().clone()
        return result

    scheduler.step = watched


def _execute(statements: list[ast.stmt], namespace: dict[str, Any]) -> None:
    """Raises UserError for whatever the card's code raises: a user of the card would meet the same."""
    try:
        exec(compile(ast.Module(statements, []), "model card", "exec"), namespace)
    except Exception as error:
        line = next((f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "model card"), 0)
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the model card's code fails in line {line} of its block: {why}") from error


def run_card(card: str, where: str) -> list[Outcome]:
    """Executes the two blocks of a card (re-noise, Euler) in one namespace. where: the line that replaces the card's
    own line of places; not one other character is changed."""
    blocks = [PLACES.sub(lambda _: where, block) for block in FENCE.findall(card)]
    assert len(blocks) == 2 and where in blocks[0], "a card has two code blocks, and names its places in the first"
    namespace: dict[str, Any] = {"__name__": "model_card"}
    outcomes = []
    for sampler, block in zip(("renoise", "euler"), blocks, strict=True):
        *setup, call = ast.parse(block).body
        _execute(setup, namespace)
        pipe = namespace.get("pipe")
        outcome = Outcome(sampler, list(namespace["prompts"]))
        _watch(namespace["scheduler"] if pipe is None else pipe.scheduler, outcome)
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)
        with _Recorder(outcome.noises):
            _execute([call], namespace)
        outcome.images = namespace.get("images")
        outcomes.append(outcome)
    return outcomes


def _as_latents(x: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, C, H, W] = [B, *shape]; a pipeline that packs hands its scheduler tokens, of one pixel or of 2x2."""
    if x.dim() != 3:
        return x
    return x.mT.unflatten(2, tuple(shape[1:])) if x.shape[2] == shape[0] else unpack(x, *shape[1:])


@torch.no_grad()
def compare(adapter: Any, net: nn.Module, anchors: Sequence[float], outcome: Outcome, bound: float) -> Parity:
    """Our sampler on the card's noise and prompts, against the card's latents."""
    assert outcome.latents is not None
    shape = adapter.latent_shape
    noises = [_as_latents(n, shape).to(adapter.device, torch.float32) for n in outcome.noises]
    cond = adapter.encode_prompts(outcome.prompts)
    if outcome.sampler == "renoise":
        ours = sample_renoise(adapter, net, noises[: len(anchors)], list(anchors), cond)
    else:
        ours = sample_euler(adapter, net, noises[0], [*anchors, 0.0], cond)
    theirs = _as_latents(outcome.latents, shape).to(ours.device).double()
    gap = ours.double() - theirs
    return Parity(outcome.sampler, gap.abs().max().item(), (gap.norm() / theirs.norm()).item(), bound)


def check(
    card: str, where: str, ours: Callable[[], tuple[Any, nn.Module]], anchors: Sequence[float], dtype: torch.dtype
) -> tuple[list[Parity], list[Any]]:
    """Both samplers, and the card's pictures. ours: (adapter, network) of the student as the run has it, called when
    the card's pipeline is gone, so that one network is in memory at a time."""
    outcomes = run_card(card, where)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    adapter, net = ours()
    results = [compare(adapter, net, anchors, outcome, BOUND[dtype]) for outcome in outcomes]
    return results, [outcome.images for outcome in outcomes]
