"""The trainer's optimizers: one pass against torch's sweeps, 16-bit storage, host states, steps in the backward."""

import dataclasses
import sys
import time
from typing import Any, ClassVar

import pytest
import torch
from tiny_pipelines import write_sd3

from senseflow import checkpoint, train
from senseflow.cli import parse
from senseflow.config import UserError
from senseflow.data.emoji import default_names, load_variants
from senseflow.optim import make_optimizer
from senseflow.presets import PRESETS
from senseflow.shipping import student_for_use
from senseflow.steps import encoded
from senseflow.train import build, drift, iterate
from senseflow.updates import Updates
from senseflow_kernels import HostAdamW

SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "data.batch=2", "train.gen_every=1", "disc.kind=none", "train.lr=1e-4",
    "train.fake_lr=1e-4", "ema.decay=0.9", "train.clip=0.3", "isg.weight=0",
)]  # fmt: skip
PLAIN = ("--model.dtype", "fp32", "--train.precision", "fp32")
SPLIT = ("--train.precision", "split")


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch):
    monkeypatch.setattr(train, "load_variants", lambda canvas: load_variants(default_names()[:6], canvas))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("pipeline") / "sd35-large")


class Run:
    """A training without files: iterations one after another. What is frozen is built once for each arithmetic."""

    built: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder, *flags):
        self.cfg = parse(["sd35-large", "--teacher", str(folder), *SMALL, *flags], "").config
        key = self.cfg.model.dtype
        if key not in self.built:
            self.built[key] = build(self.cfg, torch.device("cpu"))
        parts, self.data = self.built[key]
        dtype = torch.float32 if self.cfg.train.precision == "fp32" else torch.bfloat16
        student, fake = (parts.adapter.student_of(parts.teacher, dtype) for _ in range(2))
        self.parts = dataclasses.replace(parts, student=student, fake=fake)
        self.updates = Updates(self.cfg, self.parts)
        self.rows = []

    def go(self, first, last):
        for i in range(first, last):
            batch = encoded(self.parts, self.data.batch(i, self.cfg.data.batch), i)
            self.rows.append(iterate(self.cfg, self.parts, self.updates, batch, i))
        return self

    def tensors(self):
        """Everything that a resume must have: weights, moments, counts, EMA; fp32."""
        found = []

        def collect(value):
            for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
                collect(v)
            if isinstance(value, torch.Tensor):
                found.append(value.detach().float().clone())

        collect(self.updates.state())
        return found


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_pass_is_torchs_three_sweeps_within_rounding(folder):
    """3 iterations in fp32: the losses agree to 1e-4 and the weights to 1 % of the move of an Adam step, whose sign and
    size no rounding of a gradient well above eps turns; phi follows the new theta, and the EMA."""
    ours, torchs = (Run(folder, *PLAIN, "--optim.name", name).go(0, 3) for name in ("senseflow", "torch"))
    for mine, theirs in zip(ours.rows, torchs.rows, strict=True):
        for name in ("dmd", "fake", "student_grad_norm"):
            assert mine[name].item() == pytest.approx(theirs[name].item(), rel=1e-4), name
    assert ours.rows[0]["student_grad_norm"] > 0.3, "clipped"
    assert drift(ours.updates).item() == pytest.approx(drift(torchs.updates).item(), rel=1e-3)
    for name in ("student", "fake"):
        for p, q in zip(ours.updates.params[name], torchs.updates.params[name], strict=True):
            far = ((p - q).abs() > 1e-6).float().mean()
            assert (p - q).abs().mean() <= 1e-6 and far <= 0.01
    for p, q in zip(ours.updates.ema.shadow, torchs.updates.ema.shadow, strict=True):
        assert (p - q).abs().mean() <= 1e-6


@pytest.mark.parametrize("flags", [
    SPLIT, ("--train.precision", "stochastic", "--train.moments", "8bit", "--disc.moments", "8bit"),
    (*SPLIT, "--optim.in_backward", "true"), (*SPLIT, "--optim.host", "true", "--train.moments", "bf16"),
], ids=" ".join)  # fmt: skip
def test_a_resumed_run_has_the_bits_of_a_whole_one(flags, folder, tmp_path):
    """2 iterations, a checkpoint, 1 more: weights, halves, moments, EMA. Weights are bf16, and every one moved."""
    whole, first, second = (Run(folder, *flags) for _ in range(3))
    begin = whole.tensors()
    whole.go(0, 3), first.go(0, 2)
    checkpoint.save(tmp_path, 2, dict(updates=first.updates.state()), 1)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    second.updates.load(found[1]["updates"])
    assert equal(second.tensors(), first.tensors())
    assert equal(second.go(2, 3).tensors(), whole.tensors())
    assert not equal(whole.tensors(), begin)
    assert {p.dtype for p in Run.built["bf16"][0].student.parameters()} == {torch.bfloat16}  # of a preset, as built
    assert {p.dtype for name in ("student", "fake") for p in whole.updates.params[name]} == {torch.bfloat16}
    assert all(row["student_skipped"] == row["fake_skipped"] == 0 for row in whole.rows)


def test_host_states_give_the_same_bits_however_late(folder, monkeypatch):
    update = HostAdamW._update
    monkeypatch.setattr(HostAdamW, "_update", lambda *args: (time.sleep(0.2), update(*args))[1])
    host, device = Run(folder, *SPLIT, "--optim.host", "true"), Run(folder, *SPLIT)
    assert equal(host.go(0, 2).tensors(), device.go(0, 2).tensors())
    shipped, truth = (student_for_use(run.parts, run.updates) for run in (host, device))
    assert equal(list(shipped.parameters()), list(truth.parameters()))


def test_steps_in_the_backward_have_the_same_bits_without_clipping(folder):
    inside, after = (Run(folder, *SPLIT, "--train.clip", "0", *more).go(0, 2) for more in
                     (("--optim.in_backward", "true"), ()))  # fmt: skip
    for name in ("student", "fake"):
        assert equal(list(inside.updates.exact(name)), list(after.updates.exact(name)))
        assert all(p.grad is None for p in inside.updates.params[name])
    assert inside.rows[0]["student_grad_norm"].item() == pytest.approx(after.rows[0]["student_grad_norm"].item(), 1e-5)


@pytest.mark.parametrize("where", ["loss", "dL/dx0"])
@pytest.mark.parametrize("flags", [(), ("--optim.in_backward", "true"), ("--optim.host", "true")], ids=" ".join)
def test_a_step_that_is_not_finite_changes_nothing(flags, where, folder):
    """Neither theta, its states, phi nor the EMA; and it is counted."""
    run = Run(folder, *SPLIT, *flags)
    run.go(0, 1)
    before = run.tensors()
    params = run.updates.params["student"]
    x0 = sum(p.float().sum() for p in params).reshape(1)
    if where == "dL/dx0":
        x0.register_hook(lambda g: g * torch.nan)
    metrics = run.updates.step(x0.sum() * (torch.inf if where == "loss" else 1.0), 1, "student", lam=0.9, x0=x0)
    assert metrics["student_skipped"] == 1
    assert equal(run.tensors()[: len(before)], before)


def test_drift_sees_the_whole_weight(folder):
    """phi is half a bf16 step from theta everywhere: 16 bits alone would show none of it."""
    run = Run(folder, *SPLIT)
    for low in run.updates.optimizers["fake"].lows():
        low.fill_(1 << 14)
    theta = torch.cat([t.flatten().double() for t in run.updates.exact("student")])
    phi = torch.cat([t.flatten().double() for t in run.updates.exact("fake")])
    wanted = ((phi - theta).norm() / theta.norm()).item()
    assert wanted > 1e-4 and drift(run.updates).item() == pytest.approx(wanted, rel=1e-5)


def test_a_missing_package_is_one_line(monkeypatch):
    params = [torch.nn.Parameter(torch.zeros(4))]
    for name, module, said in (("apex", "apex", "NVIDIA's apex"), ("torchao-8bit", "torchao", "torchao does not run")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"optim.name = '{name}': {said}"):
            make_optimizer(parse(["--optim.name", name], "").config, params, 1e-3)


def test_torchao_where_it_is_installed():
    pytest.importorskip("torchao.optim")
    p = torch.nn.Parameter(torch.randn(64, 256))
    optimizer = make_optimizer(parse(["--optim.name", "torchao-8bit"], "").config, [p], 1e-3)
    from senseflow.optim import apply_if_finite

    before, p.grad = p.detach().clone(), torch.randn_like(p)
    apply_if_finite(optimizer, torch.tensor(False))
    assert torch.equal(p, before)
    apply_if_finite(optimizer, torch.tensor(True))
    assert 0.5e-3 < (p - before).abs().mean() < 1.5e-3


def test_presets_keep_big_networks_exactly():
    for name, preset in PRESETS.items():
        cfg = preset()
        big = name.startswith(("sd35", "flux", "sdxl"))
        assert (cfg.train.precision, cfg.optim.name) == ("split" if big else "fp32", "senseflow")
