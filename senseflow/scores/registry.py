"""The metrics by name. Adding one: an extractor (a row of numbers per picture or prompt), a row in METRICS.

A package of its own can add rows through entry points of the group `senseflow.metrics`, each a Metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from senseflow.config import UserError
from senseflow.metrics import frechet_distance, kid, standard_scale
from senseflow.scores.clip import Clip, Hps, PickScore
from senseflow.scores.embedded import Lite0
from senseflow.scores.image_reward import ImageReward
from senseflow.scores.inception import Inception
from senseflow.scores.perceptual import LpipsDiversity
from senseflow.section import near

Against = Literal["", "teacher", "real"]
Make = Callable[[dict[str, str], torch.device], Any]  # (--weights, device) -> pictures, prompts -> rows; .about
EXTRACTORS: dict[str, Make] = {
    "inception": lambda given, device: Inception(given, device, patch=False),
    "inception-patch": lambda given, device: Inception(given, device, patch=True),
    "clip": Clip,
    "hpsv2": lambda given, device: Hps(given, device, "hpsv2"),
    "hpsv2.1": lambda given, device: Hps(given, device, "hpsv2.1"),
    "pickscore": PickScore,
    "imagereward": ImageReward,
    "lpips": LpipsDiversity,
    "lite0": Lite0,
}


@dataclass(frozen=True)
class Result:
    """A metric's value, its standard error over pictures (or prompts) where it is a mean, and over how many."""

    value: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Metric:
    """reduce: (rows [N, D], the reference's rows, pictures per prompt) -> Result.

    against: what it compares with; text: needs prompts; several: needs 2 or more pictures of a prompt; whole: a row is
    made of all pictures of a prompt.
    """

    name: str
    title: str
    extractor: str
    reduce: Callable[[Tensor, Tensor | None, int], Result]
    against: Against = ""
    text: bool = False
    several: bool = False
    whole: bool = False
    digits: int = 4
    better: Literal["lower", "higher"] = "higher"


def distance(rows: Tensor, reference: Tensor | None, images: int) -> Result:
    """Frechet distance, in fp64."""
    assert reference is not None
    return Result(frechet_distance(rows, reference), None, len(rows))


def kernel_distance(rows: Tensor, reference: Tensor | None, images: int) -> Result:
    """1000 x the unbiased KID over all pairs, in fp64."""
    assert reference is not None
    return Result(1000 * kid(rows, reference), None, len(rows))


def standardised(reduce: Callable[[Tensor, Tensor | None, int], Result]) -> Callable[..., Result]:
    """The same on features divided by the reference's deviation."""

    def inner(rows: Tensor, reference: Tensor | None, images: int) -> Result:
        assert reference is not None
        mean, std = standard_scale(reference)
        return reduce((rows - mean) / std, (reference - mean) / std, images)

    return inner


def mean(rows: Tensor, reference: Tensor | None, images: int) -> Result:
    """Mean of the last number of each row, and its standard error."""
    x = rows[:, -1].double()
    error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else None
    return Result(float(x.mean()), error, len(x))


def pairwise_cosine(rows: Tensor, reference: Tensor | None, images: int) -> Result:
    """CLIP diversity: 1 - cosine, mean over all pairs of pictures of a prompt, then over prompts. rows are embeddings
    with a score behind; a prompt's `images` pictures stand together."""
    x = F.normalize(rows[:, :-1].double(), dim=1).unflatten(0, (-1, images))
    gram = x @ x.transpose(1, 2)
    pairs = images * (images - 1)
    per_prompt = 1 - (gram.sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(1)) / pairs
    return mean(per_prompt[:, None], None, images)


def _set_metrics() -> list[Metric]:
    """FD and KID of each feature space, against the teacher's samples of the same prompts (-t) and real pictures."""
    spaces = [  # extractor, prefix and suffix of the name, of the title, what is done to the features
        ("inception", ("", "fid", "kid", ""), ("FID", "KID x1000"), lambda reduce: reduce),
        ("inception-patch", ("patch-", "fid", "kid", ""), ("Patch FID", "Patch KID x1000"), lambda reduce: reduce),
        ("lite0", ("", "fd", "kid", "-lite0"), ("FD-Lite0", "KID-Lite0 x1000"), standardised),
    ]
    found = []
    sides: list[tuple[Against, str]] = [("teacher", "-t"), ("real", "")]
    for extractor, (before, fd, kd, after), titles, wrap in spaces:
        for against, tail in sides:
            for kind, title, reduce in ((fd, titles[0], distance), (kd, titles[1], kernel_distance)):
                word, _, unit = title.partition(" x")
                shown = word + tail.upper() + (f" x{unit}" if unit else "")
                name = f"{before}{kind}{after}{tail}"
                found.append(Metric(name, shown, extractor, wrap(reduce), against, digits=2, better="lower"))
    return found


_ROWS = [
    *_set_metrics(),
    Metric("clip", "CLIP", "clip", mean, text=True),
    Metric("hpsv2", "HPSv2", "hpsv2", mean, text=True),
    Metric("hpsv2.1", "HPSv2.1", "hpsv2.1", mean, text=True),
    Metric("pickscore", "Pick", "pickscore", mean, text=True, digits=2),
    Metric("imagereward", "ImageReward", "imagereward", mean, text=True),
    Metric("lpips", "LPIPS diversity", "lpips", mean, several=True, whole=True),
    Metric("clip-diversity", "CLIP diversity", "clip", pairwise_cosine, several=True),
]
METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}


def find_metrics(names: list[str]) -> list[Metric]:
    """The metrics of these names, in this order; ["all"]: every one. Raises UserError for an unknown name."""
    known = METRICS | {point.name: point.load() for point in entry_points(group="senseflow.metrics")}
    if names == ["all"]:
        return list(known.values())
    for name in names:
        if name not in known:
            raise UserError(f"unknown metric {name!r}{near(name, known)}: allowed are all, {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
