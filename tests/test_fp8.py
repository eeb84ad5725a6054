"""The teacher in 8 bits, and an iteration with every switch of the plan."""

import itertools

import pytest
import torch
from plans import Folders, by_part, config_of, planner_of
from tiny_pipelines import few_pictures
from torch import nn
from torch.nn import functional as F

from senseflow import planning, train
from senseflow.config import UserError
from senseflow.fields import replace
from senseflow.iteration import iterate
from senseflow.models import fp8
from senseflow.models.families import make_adapter, make_networks
from senseflow.steps import encoded
from senseflow.train import build
from senseflow.updates import Updates

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp)


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    monkeypatch.setattr(train, "load_variants", few_pictures)


def test_eight_bits_by_arithmetic():
    """A weight is off by at most 1/16 of itself, or 2^-18 of its row's largest; scales are powers of two, and what is
    widened is exact in bf16. Rows of zeros and of one value come back as they are."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=g) * torch.logspace(-6, 3, 64)[:, None]
    weight[0], weight[1] = 0, 3.0
    linear = nn.Linear(128, 64)
    linear.weight.data = weight.clone()
    eight = fp8.Fp8Linear.of(linear)
    wide = eight.widened()
    error = (wide - weight).abs()
    allowed = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) * 2.0**-18)
    assert (error <= allowed).all() and error.max() > 0
    assert torch.equal(wide[:2], weight[:2])
    assert torch.equal(torch.frexp(eight.scale)[0], torch.full((64, 1), 0.5))
    assert torch.equal(wide.bfloat16().float(), wide)
    x = torch.randn(5, 128, generator=g)
    assert torch.equal(eight(x), F.linear(x, wide, linear.bias))
    assert eight.weight.element_size() == 1 and not eight.weight.requires_grad


def test_an_eight_bit_teacher_scores_nearly_as_before(folders):
    """The embedded teacher, trained weights: its score is off by more than nothing and less than 5 % at every sigma;
    student and fake are not touched, and the blocks take a quarter of fp32."""
    from bench.fp8 import score_errors

    cfg = config_of("tiny", folders)
    parts, data = build(cfg, CPU)
    rows = score_errors(cfg, parts, data, 4)
    assert all(1e-4 < row["score"] < 0.05 for row in rows), rows
    eight = replace(cfg, {"model.teacher_dtype": "fp8"})
    teacher, student, fake = make_networks(eight, make_adapter(eight.model, CPU), CPU)
    assert not any(isinstance(m, fp8.Fp8Linear) for net in (student, fake) for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), parts.student.parameters(), strict=True))
    mine, plain = (by_part(planner_of(c).stays(c))["teacher"]["weights"] for c in (eight, cfg))
    assert mine == sum(t.numel() * t.element_size() for t in itertools.chain(teacher.parameters(), teacher.buffers()))
    assert mine < 0.45 * plain
    with pytest.raises(UserError, match=r"model\.teacher_dtype = 'fp8': allowed is model"):
        replace(eight, {"model.variant": "lora"})


def test_an_iteration_with_all_switches(folders):
    """Checkpointing everywhere and an 8-bit teacher, fused and not: the losses of a plain one but for the teacher."""
    preset = "sd35-medium"
    switches = ["--model.checkpointing=full", "--disc.checkpointing=true", "--model.teacher_dtype=fp8"]
    rows = []
    for more in ([], switches[:2], switches):
        cfg = config_of(preset, folders, "--kernels.fuse=true", *more)
        parts, data = build(cfg, CPU)
        number = planning.busy_iteration(cfg, parts)
        batch = encoded(parts, data.batch(number, 2), number)
        metrics = iterate(cfg, parts, Updates(cfg, parts), batch, number)
        rows.append({name: metrics[name].item() for name in ("dmd", "isg", "adv", "fake", "disc")})
    assert rows[0] == rows[1]
    assert all(rows[2][name] == pytest.approx(rows[0][name], rel=0.2) for name in rows[0]) and rows[2] != rows[0]
