"""Forward-equivalents: hooks against calls counted by hand and against torch's FLOP counter; the document's tables."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import forwards
from bench.forwards import PUBLISHED, counting, kinds, mean_counts
from bench.released import ReleasedLoop
from senseflow.presets import PRESETS
from senseflow.train import iterate
from senseflow.updates import Updates


@pytest.fixture
def made(tmp_path):
    with forwards.small_run("tiny", tmp_path) as run:
        yield run


def test_kinds_are_all_there_is():
    found = list(kinds(4, 5, 8, 0.5))
    assert sum(p for p, *_ in found) == pytest.approx(1, abs=1e-12)
    assert sum(p for p, is_gen, *_ in found if is_gen) == pytest.approx(1 / 5)
    assert sum(p for p, _, j, _ in found if j == 2) == pytest.approx(0.5 / 4)


def test_counts_by_hand(made):
    """A generator's iteration with a rollout of two steps, then a critic's by forward noising."""
    cfg, parts, data = made
    updates, batch = Updates(cfg, parts), data.batch(0, 2)
    parts.draws.length, parts.draws.anchor = 2, 0.99
    with counting(parts) as counts:
        iterate(cfg, parts, updates, batch, 1)
    # student: rollout 2, forward and backward 3, ISG's half-step 1; teacher: DMD's and ISG's guidance, two each; fake:
    # DMD 1, its own step 3; backbone: the fake's picture there and back, D's real picture; r's features are kept
    per = {"student": 6, "teacher": 4, "fake": 4, "backbone": 3}
    assert {k: v / 2 for k, v in counts.items()} == per
    parts.draws.length = None
    with counting(parts) as counts:
        iterate(cfg, parts, updates, batch, 0)
    assert {k: v / 2 for k, v in counts.items()} == {"student": 1, "fake": 3, "backbone": 2}
    with counting(parts) as counts:
        iterate(replace(cfg, disc=replace(cfg.disc, keep_reference=False)), parts, updates, batch, 0)
    assert {k: v / 2 for k, v in counts.items()} == {"student": 1, "fake": 3, "backbone": 3}
    loop = ReleasedLoop(cfg, parts, PUBLISHED)
    with counting(parts) as counts:
        loop.iterate(batch, 0)
    # D looks three times at a picture with r beside it; prompt and empty prompt
    assert {k: v / 2 for k, v in counts.items()} == {"student": 1, "fake": 3, "backbone": 6, "text": 2}


def test_equivalents_are_flops(made):
    """torch counts the FLOPs of the fake's step: three forwards, but for the first layers, whose inputs need no
    gradient, and for attention's backward, which computes the scores anew: within 15 %."""
    cfg, parts, data = made
    updates, batch = Updates(cfg, parts), data.batch(0, 2)
    parts.draws.length, parts.draws.anchor = None, 0.0  # silent: no backbone, no D
    with FlopCounterMode(display=False) as whole:
        iterate(cfg, parts, updates, batch, 0)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        parts.adapter.predict(parts.student, batch.latents, torch.ones(2), batch.cond)
    assert whole.get_total_flops() / one.get_total_flops() == pytest.approx(1 + 3, rel=0.15)


def test_mean_is_over_the_presets_law(made):
    cfg, parts, data = made
    updates, law = Updates(cfg, parts), PRESETS["tiny"]()
    found = mean_counts(cfg, parts, data, lambda b, i: iterate(cfg, parts, updates, b, i), law)
    rollout = law.rollout.backward_prob * (0 + 1 + 2 + 3) / 4
    assert found["student"] == pytest.approx(rollout + 1 + (2 + 1) / law.train.gen_every)
    assert found["teacher"] == pytest.approx(4 / law.train.gen_every)
    assert found["fake"] == pytest.approx(3 + 1 / law.train.gen_every)
    loud = 1 - (law.rollout.backward_prob / 4 + (1 - law.rollout.backward_prob) * 4.0**-law.data.batch)
    assert found["backbone"] == pytest.approx(loud * (2 + 1 / law.train.gen_every))
