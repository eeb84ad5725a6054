"""Where the gradients of a generator step go, on every family: from D through the VAE decoder to the student alone."""

from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import few_pictures, write_flux, write_klein, write_sd3, write_sdxl

from senseflow.cli import parse
from senseflow.data.batches import Batch
from senseflow.data.emoji import to_float
from senseflow.draws import Draws
from senseflow.fields import replace
from senseflow.models.families import make_adapter
from senseflow.models.lora import lora_pair, trainable
from senseflow.steps import (
    Parts,
    discriminator_loss,
    encoded,
    fake_loss,
    generator_losses,
    reference_features,
    student_forward,
)
from senseflow.train import build_discriminator
from senseflow.updates import Updates

pytest.importorskip("diffusers")
WRITE = {"sd35-medium": lambda f: write_sd3(f, medium=True), "flux-dev": write_flux,
         "sdxl": write_sdxl, "flux2-klein": write_klein}  # fmt: skip
SMALL = [f"--{setting}" for setting in (
    "model.side=64", "model.text_length=16", "model.dtype=fp32", "data.batch=2", "train.lr=1e-3", "train.fake_lr=1e-3",
    "disc.taps=-1,2", "disc.size=28", "disc.width=8", "disc.downsample=1", "disc.backbone=", "disc.omega=one",
    "rollout.backward_prob=0", "lora.rank=4", "train.precision=fp32",
)]  # fmt: skip
CPU = torch.device("cpu")


def parts_of(preset, tmp_path, *flags):
    """(config, parts, step): the student's forward of a batch of two pictures."""
    if preset == "embedded":
        argv, preset = [], "tiny"
    else:
        argv = ["--teacher", str(WRITE[preset](tmp_path / preset))]
    small = [f for f in SMALL if preset != "tiny" or not f.startswith(("--model.side", "--model.text_length"))]
    cfg = parse([preset, *argv, *small, *flags], "").config
    adapter = make_adapter(cfg.model, CPU)
    teacher = adapter.load_network(torch.float32)
    if cfg.model.variant == "lora":
        student, fake = lora_pair(adapter, teacher, cfg.lora, 0)
    else:
        student, fake = adapter.student_of(teacher), adapter.student_of(teacher)
    pictures = few_pictures(canvas=cfg.model.side)
    cond = adapter.encode_prompts(pictures.captions[:2])
    disc, vfm = build_discriminator(cfg, adapter, fake, cond, CPU)
    anchors = adapter.schedule.anchors(4)
    parts = Parts(adapter, student, fake, teacher, disc, vfm, anchors, Draws(0))
    pixels = to_float(pictures.images[:2, 0])
    batch = encoded(parts, Batch(pixels, pixels, cond, torch.arange(2)), 0)
    return cfg, parts, student_forward(parts, cfg, batch, 0, with_grad=True)


def without_gradient(*modules):
    return all(p.grad is None for m in modules if m is not None for p in m.parameters())


@pytest.mark.parametrize("preset", [*WRITE, "embedded"])
def test_a_generator_step_reaches_the_student_alone(preset, tmp_path):
    """All three terms, an unrestricted backward: nothing but the student and D's heads; the step itself names the
    student, so that not even the heads get one, and changes no other weight."""
    cfg, parts, step = parts_of(preset, tmp_path)
    loss = generator_losses(parts, cfg, step, reference_features(parts, cfg, step))
    loss.backward(retain_graph=True)
    frozen = (parts.teacher, parts.vfm, parts.adapter.vae)
    assert without_gradient(parts.fake, *frozen)
    assert not any(p.requires_grad for m in frozen if m is not None for p in m.parameters())
    heads, net = list(parts.disc.parameters()), trainable(parts.student)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)
    reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net]
    assert sum(reached) > 0.9 * len(reached)
    for p in [*heads, *net]:
        p.grad = None
    before = [p.clone() for m in (parts.fake, parts.disc, *frozen) if m is not None for p in m.parameters()]
    seen = []  # the gradients that the optimizer's step would have been given
    updates = Updates(cfg, parts)
    step_of = updates.optimizers["student"].step
    updates.optimizers["student"].step = lambda *a, **k: (
        seen.append([p.grad is not None for p in heads] + [without_gradient(parts.fake, *frozen)]),
        step_of(*a, **k),
    )[1]
    start = [p.clone() for p in net]
    updates.step(loss, 0, "student")
    assert seen == [[False] * len(heads) + [True]]
    after = [p for m in (parts.fake, parts.disc, *frozen) if m is not None for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sum(not torch.equal(a, b) for a, b in zip(start, net, strict=True)) > 0.9 * len(net)


@pytest.mark.parametrize("preset", WRITE)
def test_the_adversarial_gradient_goes_through_the_decoder(preset, tmp_path, monkeypatch):
    """d L_adv / d x0 is the VAE decoder's vector-Jacobian product of d L_adv / d pixels, and it is the student's whole
    gradient: chain rule by hand from pixels to weights."""
    cfg, parts, step = parts_of(preset, tmp_path, "--dmd.weight", "0", "--isg.weight", "0")
    seen, decode = SimpleNamespace(), parts.adapter.decode

    def caught(latents):
        seen.pixels = decode(latents)
        return seen.pixels

    monkeypatch.setattr(parts.adapter, "decode", caught)
    loss = generator_losses(parts, cfg, step, reference_features(parts, cfg, step))
    net = trainable(parts.student)
    to_pixels, to_x0, *to_net = torch.autograd.grad(
        loss, [seen.pixels, step.x0, *net], retain_graph=True, allow_unused=True
    )
    assert to_pixels.shape == step.batch.pixels.shape and to_pixels.abs().max() > 0
    x0 = step.x0.detach().requires_grad_()
    (by_hand,) = torch.autograd.grad(decode(x0), x0, to_pixels)
    assert (by_hand - to_x0).norm() <= 1e-5 * to_x0.norm() and to_x0.norm() > 0
    rest = torch.autograd.grad(step.x0, net, to_x0, allow_unused=True)
    for a, b in zip(to_net, rest, strict=True):
        assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-5 * a.norm() + 1e-12)
    assert without_gradient(parts.adapter.vae, parts.vfm, parts.disc)


def test_d_computes_in_bf16_and_the_decoder_in_fp32(tmp_path, monkeypatch):
    """As released: backbone and heads under autocast, decoding not. Logits and gradient stay those of fp32 within
    bf16's 2^-8 a layer, some ten layers deep."""
    cfg, parts, step = parts_of("sd35-medium", tmp_path, "--dmd.weight", "0", "--isg.weight", "0")
    assert cfg.disc.weight > 0
    found, seen = {}, {}

    def watch(name, function):
        def watched(*args, **kwargs):
            seen.setdefault(name, torch.is_autocast_enabled("cpu"))
            return function(*args, **kwargs)

        return watched

    for part, name in ((parts.vfm, "features"), (parts.disc, "logits"), (parts.disc, "conditioning"),
                       (parts.adapter, "decode")):  # fmt: skip
        monkeypatch.setattr(part, name, watch(name, getattr(part, name)))
    monkeypatch.setattr(parts.disc, "forward", watch("forward", parts.disc.forward))
    for dtype in ("fp32", "bf16"):
        one = replace(cfg, {"model.dtype": dtype})
        real = reference_features(parts, one, step)
        loss = generator_losses(parts, one, step, real)
        (grad,) = torch.autograd.grad(loss, step.x0)
        found[dtype] = (loss.item(), discriminator_loss(parts, one, step, real).item(), grad)
        step.fake_taps = None
        asked = {"features", "logits", "conditioning", "forward"}
        assert seen == {name: dtype == "bf16" and name in asked for name in (*asked, "decode")}
        seen.clear()
    (g32, d32, grad32), (g16, d16, grad16) = found["fp32"], found["bf16"]
    assert g16 != g32 and g16 == pytest.approx(g32, abs=0.02 * cfg.disc.weight) and d16 == pytest.approx(d32, rel=0.02)
    assert grad16.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(grad16.flatten(), grad32.flatten(), 0) > 0.95


@pytest.mark.parametrize("preset", ["sd35-medium", "flux-dev"])
def test_lora_steps_reach_one_adapter(preset, tmp_path):
    """Generator step: the student's B; fake step: the fake's B; nothing in the base, A, or the other adapter."""
    cfg, parts, step = parts_of(preset, tmp_path, "--model.variant", "lora")
    generator_losses(parts, cfg, step, reference_features(parts, cfg, step)).backward()
    assert without_gradient(parts.fake, parts.teacher, parts.vfm, parts.adapter.vae)
    assert sum(p.grad is not None for p in parts.student.parameters()) > 0.9 * len(trainable(parts.student))
    for p in parts.student.parameters():
        assert p.grad is None or p.requires_grad
        p.grad = None
    step.x0 = step.x0.detach()
    fake_loss(parts, cfg, step).backward()
    assert without_gradient(parts.student, parts.teacher)
    assert sum(p.grad is not None for p in trainable(parts.fake)) > 0.9 * len(trainable(parts.fake))
