"""nvidia-modelopt's and FastGen's DMD2 beside ours, where they are installed: the same losses on the same numbers."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import embedded_teacher, few_pictures

from bench import fastgen
from bench.modelopt import FLAGS, ModeloptLoop, check_fits
from bench.step import own_copy
from senseflow import train
from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.steps import encoded
from senseflow.train import build, iterate
from senseflow.updates import Updates


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_variants", few_pictures)
    flags = [
        "--teacher",
        str(embedded_teacher(tmp_path)),
        "--data.images",
        "pictures",
        "--data.batch",
        "3",
        "--train.gen_every",
        "2",
        *FLAGS,
    ]
    cfg = parse(flags, "").config
    return cfg, *build(cfg, torch.device("cpu"))


def test_losses_and_work(made):
    """Six iterations on our draws. The first fake loss is on the very same weights: fp32 rounding alone (theirs goes
    through fp64 and x0, 1e-4). A student update of lr 3.6e-5 lies between their picture and ours then: 2 %."""
    pytest.importorskip("modelopt.torch.fastgen")
    cfg, parts, data = made
    ours, counts = own_copy(parts)
    theirs, their_counts = own_copy(parts)
    updates, loop = Updates(cfg, ours), ModeloptLoop(cfg, theirs, told=6)
    for i in range(6):
        batch = encoded(ours, data.batch(i, 3), i)
        mine, found = iterate(cfg, ours, updates, batch, i), loop.iterate(batch, i)
        assert ("dmd" in found) == (i % 2 == 1)
        for key, value in found.items():
            assert float(mine[key]) == pytest.approx(float(value), rel=1e-4 if i == 0 else 2e-2), (i, key)
    assert counts["teacher"] == their_counts["teacher"] == 2 * 3 * 3  # guidance: pictures with and without text
    assert counts["fake"] == their_counts["fake"]
    assert their_counts["student"] > counts["student"]  # a second rollout and picture where the student is updated


def test_fastgens_losses_and_work(made):
    """As above; FastGen's student starts from noised pictures, at t = 0.999 in place of 1."""
    pytest.importorskip("fastgen.methods")
    cfg, parts, data = made
    cfg = replace(cfg, rollout=replace(cfg.rollout, backward_prob=0.0))
    parts.anchors = [min(a, fastgen.LAST_T) for a in parts.anchors]
    ours, counts = own_copy(parts)
    theirs, their_counts = own_copy(parts)
    updates, loop = Updates(cfg, ours), fastgen.FastGenLoop(cfg, theirs, told=6)
    for i in range(6):
        batch = encoded(ours, data.batch(i, 3), i)
        mine, found = iterate(cfg, ours, updates, batch, i), loop.iterate(batch, i)
        assert ("dmd" in found) == (i % 2 == 1)
        for key, value in found.items():
            assert float(mine[key]) == pytest.approx(float(value), rel=1e-4 if i == 0 else 5e-2), (i, key)
    assert counts["teacher"] == their_counts["teacher"] == 2 * 3 * 3
    assert counts["fake"] == their_counts["fake"]
    assert their_counts["student"] == counts["student"] + 3 * 3  # the picture anew after each student update


def test_what_does_not_fit_is_refused(made):
    cfg, parts, _ = made
    check_fits(cfg, parts)
    with pytest.raises(UserError, match=r"rollout.backward_prob = 1.0: allowed is 0.0 beside FastGen"):
        fastgen.FastGenLoop(cfg, parts)
    for flag, text in (
        ("--isg.weight=1", "isg.weight = 1.0: allowed is 0.0"),
        ("--dmd.guidance_max=9", "one guidance"),
    ):
        with pytest.raises(UserError, match=text):
            check_fits(parse([*FLAGS, flag], "").config, parts)
