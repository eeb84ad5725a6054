"""The published order, written plainly in bench/released.py, and ours: the same losses and the same weights."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import embedded_teacher, few_pictures

from bench.released import ReleasedLoop, Switches
from bench.step import LEAN, own_copy
from senseflow import steps, train
from senseflow.algo.discriminator import FakeFeatureDiscriminator
from senseflow.cli import parse
from senseflow.fields import replace as changed
from senseflow.flow import add_noise
from senseflow.steps import (
    discriminator_loss,
    encoded,
    keep_reference,
    reference_features,
    student_forward,
    vfm_features,
)
from senseflow.train import build, iterate
from senseflow.updates import Updates

FLAGS = [
    "--data.images", "pictures", "--data.batch", "3", "--train.gen_every", "2", "--disc.taps", "-1,2",
    "--disc.width", "8",
    "--disc.size", "28",
    "--dmd.guidance_max", "3", "--isg.guidance_max", "2", "--seed", "5", "--train.eps", "1e-4",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = embedded_teacher(tmp_path_factory.mktemp("teacher"))
    cfg = parse(["--teacher", str(folder), *FLAGS], "").config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_variants", few_pictures)
        return cfg, *build(cfg, torch.device("cpu"))


@pytest.mark.parametrize(
    "switches", [Switches(), LEAN, Switches(batched_cfg=False)], ids=["published", "lean", "two calls"]
)
def test_ours_and_the_published_order_train_alike(made, switches):
    """Six iterations: silent ones, rollouts and forward noising among them. Losses agree to fp32 rounding (1e-3 of a
    loss: sums over up to 1e5 terms that cancel in adv and disc). train.eps 1e-4 keeps Adam from turning the signs of
    rounding into whole steps, so student and fake agree to 1e-4 of the way they have gone; D's steps are then near the
    last place of its largest weights, hence 2 %."""
    cfg, parts, data = made
    ours, counts = own_copy(parts)
    theirs, their_counts = own_copy(parts)
    updates, loop = Updates(cfg, ours), ReleasedLoop(cfg, theirs, switches)
    for iteration in range(6):
        batch = encoded(ours, data.batch(iteration, 3), iteration)
        mine, published = iterate(cfg, ours, updates, batch, iteration), loop.iterate(batch, iteration)
        if switches.read_back:
            assert published.keys() - {"adv"} <= mine.keys() | {"disc"} and ("dmd" in published) == (iteration % 2 == 1)
            for key in published.keys() & mine.keys():
                assert float(mine[key]) == pytest.approx(published[key], rel=1e-3, abs=1e-4), (iteration, key)
    start = dict(student=parts.student, fake=parts.fake, disc=parts.disc)
    for name, before in start.items():
        a, b, c = (torch.cat([p.flatten() for p in net.parameters()]).double() for net in
                   (before, getattr(ours, name), getattr(theirs, name)))  # fmt: skip
        assert (b - a).norm() > 0
        assert (b - c).norm() < (2e-2 if name == "disc" else 1e-4) * (b - a).norm(), name
    assert updates.ema is not None
    for mine, published in zip(updates.ema.shadow, loop.ema, strict=True):
        torch.testing.assert_close(mine, published, rtol=1e-4, atol=2e-6)
    per = {k: v / (6 * 3) for k, v in their_counts.items()}
    assert counts["student"] == their_counts["student"] and counts["teacher"] == their_counts["teacher"]
    if switches == Switches():
        assert per["backbone"] == 6 > counts["backbone"] / (6 * 3)
    elif switches == LEAN:  # r's features come with the batch on both sides; ours leaves silent iterations out besides
        assert their_counts["backbone"] == 2 * 6 * 3 > counts["backbone"]


def an_iteration(cfg, parts, data, backward):
    """(its number, the student's step): the first whose coin says so and that is not silent."""
    for iteration in range(99):
        if parts.draws.coin(iteration, cfg.rollout.backward_prob) == backward:
            batch = encoded(parts, data.batch(iteration, 3), iteration)
            step = student_forward(parts, cfg, batch, iteration, with_grad=False)
            if not step.silent:
                return iteration, step
    raise AssertionError


def test_omega_weighs_ds_own_loss_as_released_or_not_at_all(made):
    """disc.omega_on_d true: omega(tau) of each sample on its hinge terms; false, as in the paper's text: their mean."""
    cfg, parts, data = made
    _, step = an_iteration(cfg, parts, data, backward=False)
    assert len(set(step.sigma.tolist())) > 1
    real = reference_features(parts, cfg, step)
    with torch.no_grad():
        condition = parts.disc.conditioning(step.batch.cond.pooled, real)
        taps = [vfm_features(parts, cfg, x, step, f"augment.{name}")
                for name, x in (("real", step.batch.pixels), ("fake", parts.adapter.decode(step.x0)))]  # fmt: skip
        d_real, d_fake = (torch.cat(parts.disc.logits(t, condition), 1).double() for t in taps)
    each = (1 - d_real).relu().mean(1) + (1 + d_fake).relu().mean(1)
    weight = (1 - step.sigma.double()).square()
    for on, expected in ((True, (weight * each).mean()), (False, each.mean())):
        loss = discriminator_loss(parts, changed(cfg, {"disc.omega_on_d": on}), step, real)
        torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)


def test_the_baselines_losses_by_hand(made):
    """DMD2's classifier: softplus of logits at noised x0 and real latents, lambda_G on the student, d_weight on D and
    the fake network, which learn together."""
    base, full, data = made
    flags = {"disc.kind": "fake_features", "disc.weight": 0.25, "disc.d_weight": 0.5, "ida.lam": 1.0, "isg.weight": 0.0}
    cfg = changed(base, flags)
    parts, _ = own_copy(full)
    batch = encoded(parts, data.batch(1, 3), 1)
    with torch.no_grad():
        width = parts.adapter.features(parts.fake, batch.latents, torch.ones(3), batch.cond).shape[2]
    parts.vfm, parts.disc = None, FakeFeatureDiscriminator(width)
    step = student_forward(parts, cfg, batch, 1, with_grad=False)

    @torch.no_grad()
    def logits(x, stream):
        u = parts.draws.uniform(1, batch.samples, stream + ".t")
        sigma = 3 * u / (1 + 2 * u)
        x_t = add_noise(x, parts.draws.normal(1, batch.samples, stream + ".noise", tuple(x.shape[1:])), sigma)
        return parts.disc(parts.adapter.features(parts.fake, x_t, sigma, batch.cond)).double()

    adv = (1 + (-logits(step.x0, "adv.g")).exp()).log().mean()
    disc = (1 + (-logits(batch.latents, "adv.real")).exp()).log().mean()
    disc = disc + (1 + logits(step.x0, "adv.fake").exp()).log().mean()
    updates, seen = Updates(cfg, parts), {}
    whole = updates.step_parts

    def watched(losses, iteration, *names, **kwargs):
        pairs = list(losses)
        seen[names] = pairs[0][0].item()
        return whole(pairs, iteration, *names, **kwargs)

    updates.step_parts = watched
    metrics = iterate(cfg, parts, updates, batch, 1)
    assert metrics["adv"].item() == pytest.approx(adv.item(), rel=1e-5)
    assert metrics["disc"].item() == pytest.approx(disc.item(), rel=1e-5)
    assert seen == {
        ("student",): pytest.approx(metrics["dmd"].item() + 0.25 * adv.item(), rel=1e-5),
        ("fake", "disc"): pytest.approx(metrics["fake"].item() + 0.5 * disc.item(), rel=1e-5),
    }


def test_kept_features_are_the_backbones(made, monkeypatch):
    """To fp32 rounding: in other company the same picture's sums may go in another order."""
    cfg, parts, data = made
    for iteration in (0, 7):
        batch = data.batch(iteration, 3)
        fresh = parts.vfm.features(batch.pixels, cfg.disc.taps, cfg.disc.size)
        for kept, tap in zip(batch.reference, fresh, strict=True):
            torch.testing.assert_close(kept, tap, rtol=0, atol=1e-5 * tap.abs().max().item())
    size = 64 * 4 * 384 * 2 * 4  # 64 pictures, 2 x 2 places, 2 taps, fp32
    short = replace(cfg, train=replace(cfg.train, iterations=85))  # of 3: not 4 looks at each
    for config, most in ((short, size), (replace(cfg, disc=replace(cfg.disc, keep_reference=False)), size),
                         (cfg, size - 1), (replace(short, train=replace(cfg.train, iterations=86)), size)):  # fmt: skip
        monkeypatch.setattr(steps, "KEPT_BYTES", most)
        monkeypatch.setattr(data, "taps", None)
        keep_reference(parts, config, data)
        assert (data.batch(0, 3).reference is not None) == (config.train.iterations == 86)
