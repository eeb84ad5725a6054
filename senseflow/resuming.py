"""What a resume checks and reads, and which checkpoints are the best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from senseflow import checkpoint
from senseflow.config import Config, UserError
from senseflow.dist import World
from senseflow.fields import from_dict, to_dict
from senseflow.logs import Diverged
from senseflow.updates import Updates

# Sections whose every field decides what the weights become, and single fields of others.
SECTIONS = ("model", "lora", "data", "dmd", "fake", "isg", "ida", "disc", "rollout", "ema")
FIELDS = ("seed", "train.precision", "train.moments", "optim.name", "optim.in_backward")
# How fast batches come, where they lie, and what is computed twice.
FREE = ("data.path", "data.workers", "data.prefetch", "data.timeout", "model.checkpointing", "disc.checkpointing",
        "disc.keep_reference")  # fmt: skip


def check_config(saved: dict[str, Any], cfg: Config) -> None:
    """Raises UserError naming the first field that matters in which a checkpoint's config differs from this one."""
    was, now = (flat(to_dict(c)) for c in (from_dict(saved), cfg))  # a field of a later version: its default
    for name, value in now.items():
        matters = name in FIELDS or (name.partition(".")[0] in SECTIONS and name not in FREE)
        if matters and was[name] != value:
            raise UserError(f"--resume: {name} was {was[name]!r} in the checkpoint and is {value!r} now")


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by "section.field"."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return found


def read_state(path: Path, updates: Updates) -> dict[str, Any]:
    """The state of a checkpoint, its big tensors read in place of the live ones, sharded on any number of ranks."""
    world = updates.world
    if not (path / checkpoint.MANIFEST).exists():
        if world.sharded:
            raise UserError(f"{path} is of an earlier version: allowed is one process, which saves one for any number")
        return checkpoint.load(path)
    live, _ = checkpoint.split({"updates": updates.state()})
    plain = checkpoint.read_plain(path)
    there = names_of(plain)
    # What a fresh run does not have yet (adaptive lambda's means, a last norm) is made by the reading.
    return checkpoint.read(path, {k: t for k, t in live.items() if k in there}, group=world.host)


def names_of(plain: Any) -> set[str]:
    """Names of the tensors that a checkpoint has."""
    found: set[str] = set()
    stack = [plain]
    while stack:
        value = stack.pop()
        if isinstance(value, dict) and value.keys() == {checkpoint.MARK}:
            found.add(value[checkpoint.MARK])
        elif isinstance(value, dict | list | tuple):
            stack += value.values() if isinstance(value, dict) else value
    return found


def roll_back(folder: Path, updates: Updates, error: Diverged, slower: float, left: int) -> tuple[int, dict[str, Any]]:
    """Puts the newest whole checkpoint of `folder` in place, with lower rates: (its iteration, what else it holds).

    Raises `error` where there is none, or no roll-back is left.
    """
    path, problem = updates.world.attempt(lambda: checkpoint.newest(folder))
    if path is None or problem or left < 1:
        raise error
    state, rate = read_state(path, updates), updates.rate
    updates.load(state.pop("updates"))
    updates.rate = rate * slower
    return checkpoint.iteration_of(path), state


def changed(saved: dict[str, Any], cfg: Config) -> list[str]:
    """The settings of training that a resume may change and this one does: a flag that was forgotten shows here."""
    was, now = (flat(to_dict(c)) for c in (from_dict(saved), cfg))
    names = [name for name in now if name.partition(".")[0] in ("train", "optim") and was[name] != now[name]]
    return [f"{name} was {was[name]!r} and is {now[name]!r}" for name in names]


def resumed(path: Path, world: World, saved: dict[str, Any], cfg: Config) -> str:
    """The line that says from what a run goes on, and with which other settings of training."""
    text = f"resumed from {path}, iteration {checkpoint.iteration_of(path)}"
    if (path / checkpoint.MANIFEST).exists():
        text += f", saved by {checkpoint.manifest(path)['ranks']} rank(s), now {world.size}"
    return "; ".join([text, *changed(saved, cfg)])


def is_best(scores: Mapping[int, float], iteration: int, count: int) -> bool:
    """Whether an iteration's score is among the `count` lowest so far."""
    mine = scores.get(iteration)
    return mine is not None and sum(s < mine for i, s in scores.items() if i != iteration) < count
