"""Algorithm 1 of SenseFlow, one iteration: what the student sees, its step, the fake's step, D's step.

Everything random comes from `Draws`, keyed by (seed, iteration, global sample index, stream). Only the coin and
the rollout length are known to the host; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from senseflow.algo.augment import AUGMENT_DRAWS, diff_augment
from senseflow.algo.discriminator import softplus_discriminator, softplus_generator
from senseflow.algo.dmd import dmd_term
from senseflow.algo.isg import ErrorCurve, adaptive_midpoint, isg_term, midpoint_range
from senseflow.algo.rollout import backward_simulation
from senseflow.config import Config, UserError
from senseflow.data.batches import Batch
from senseflow.dist import World
from senseflow.draws import Draws
from senseflow.flow import add_noise, constants, omega, prediction_to_x0
from senseflow.models import vae as autoencoder
from senseflow.models.adapter import Adapter, Condition, in_dtype
from senseflow.profiling import Profiler
from senseflow_kernels import hinge_discriminator, hinge_generator

KEPT_BYTES, LOOKS = 256 << 20, 4  # of r's taps, of all pictures together; at each picture, for that to be worth it


@dataclass
class Parts:
    """The networks of a run. `vfm` is the frozen backbone, `disc` the trained heads (None: no discriminator)."""

    adapter: Adapter
    student: nn.Module
    fake: nn.Module
    teacher: nn.Module
    disc: nn.Module | None
    vfm: nn.Module | None
    anchors: list[float]  # descending sigmas of the student
    draws: Draws
    curve: ErrorCurve | None = None  # xi(t), for isg.midpoint = adaptive
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext  # the profiler's, under --profile
    moves: Callable[[str, Callable[[], float]], None] = lambda _phase, _bytes: None  # bytes of a phase; the same
    world: World = field(default_factory=World)
    skeleton: nn.Module | None = None  # the student without numbers, where it is sharded: its form to save
    shown: Condition | None = None  # the picture grid's prompts, encoded while text encoders were there; embedded: None


@dataclass
class Step:
    """What one iteration hands from the student's forward to the losses."""

    iteration: int
    batch: Batch
    x_tau: Tensor  # [B, C, H, W] the student's input
    sigma: Tensor  # fp32 [B], its anchor
    sigma_prev: Tensor  # fp32 [B], the next lower anchor, 0 after the last
    pred: Tensor  # [B, C, H, W] the student's prediction
    x0: Tensor  # [B, C, H, W] what it means as x0
    silent: bool = False  # omega is 0 for every sample of the global batch: no adversarial term, as the host knows
    fake_taps: list[Tensor] | None = None  # backbone taps of x0, where the generator's step made them
    reference: list[Tensor] | None = None  # backbone taps of r, where they are needed
    metrics: dict[str, Tensor] = field(default_factory=dict)


class PhasedAdapter:
    """An adapter that times every network by name. A call inside another phase (the rollout) belongs to that one."""

    def __init__(self, adapter: Any, profiler: Profiler, names: dict[int, str]):
        self.adapter, self.profiler, self.names = adapter, profiler, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def predict(
        self, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition, guidance: Tensor | None = None
    ) -> Tensor:
        if self.profiler.inside:
            self.profiler.call()
            return self.adapter.predict(net, x, sigma, cond, guidance)
        with self.profiler.phase(self.names[id(net)]):
            return self.adapter.predict(net, x, sigma, cond, guidance)

    def features(self, net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        with self.profiler.phase("D features"):
            return self.adapter.features(net, x, sigma, cond)

    def decode(self, latents: Tensor) -> Tensor:
        with self.profiler.phase("decode"):
            return self.adapter.decode(latents)


def phased(parts: Parts, profiler: Profiler) -> None:
    """Makes `parts` report its phases to the profiler."""
    names = {id(parts.student): "student", id(parts.fake): "fake", id(parts.teacher): "teacher"}
    adapter: Any = PhasedAdapter(parts.adapter, profiler, names)
    parts.adapter = adapter
    parts.phase, parts.moves = profiler.phase, profiler.moves


def range_of(u: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """U(low, high) from u in [0, 1)."""
    return low + (high - low) * u


def encoded(parts: Parts, batch: Batch, iteration: int) -> Batch:
    """The batch with the latents of its pixels, or of the posterior it carries; the posterior's noise is drawn like
    everything else, and is the same either way. Pixels may have any aspect (buckets)."""
    a = parts.adapter
    if batch.encoded:
        return batch
    if batch.mean is not None:
        shape = tuple(batch.mean.shape[1:])
    else:
        down = autoencoder.downsampling(a.vae) if a.vae is not None else 1
        shape = (a.latent_shape[0], *(side // down for side in batch.pixels.shape[2:]))
    noise = parts.draws.normal(iteration, batch.samples, "posterior", shape)
    if batch.mean is not None:
        batch.latents = autoencoder.sample(a.vae, batch.mean, batch.logvar, noise)
    else:
        batch.latents = a.encode(batch.pixels, noise)
    batch.encoded = True
    return batch


def student_input(parts: Parts, cfg: Config, batch: Batch, iteration: int):
    """(x_tau, sigma, sigma_prev): by the coin either backward simulation or forward noising (paper.md 2, 2-5).

    Backward simulation: all samples share the anchor at which the rollout stops (it decides control flow).
    Forward noising: each sample of real data has its own anchor.
    """
    d, ids = parts.draws, batch.samples
    shape = tuple(batch.latents.shape[1:])
    anchors = constants((*parts.anchors, 0.0), batch.latents.device)
    if d.coin(iteration, cfg.rollout.backward_prob):
        j = d.integer(iteration, len(parts.anchors))
        noises = [d.normal(iteration, ids, f"rollout{i}", shape) for i in range(j + 1)]
        with parts.phase("rollout") if j else nullcontext():
            x_tau = backward_simulation(parts.adapter, parts.student, noises, parts.anchors, j, batch.cond)
        index = torch.full_like(ids, j)
    else:
        u = d.uniform(iteration, ids, "anchor")
        index = (u * len(parts.anchors)).long()
        noise = d.normal(iteration, ids, "forward", shape)
        sigma = anchors[index]
        x_tau = add_noise(batch.latents, noise, sigma, parts.adapter.schedule.alpha(sigma))
    return x_tau, anchors[index], anchors[index + 1]


def is_silent(parts: Parts, cfg: Config, iteration: int) -> bool:
    """Whether omega(tau) is exactly 0 for every sample of the global batch, told on the host from the same draws that
    `student_input` makes on the device. Then the adversarial terms of G and D, and all their gradients, are 0: with
    omega = alpha^2 that is the pure-noise anchor, in 1 of 8 iterations by backward simulation alone."""
    if cfg.disc.kind != "vfm" or not cfg.disc.skip_silent:
        return False
    weights = omega(torch.tensor(parts.anchors), cfg.disc.omega, parts.adapter.schedule)
    zero = [w == 0 for w in weights.tolist()]
    d = parts.draws.on_host()
    if not any(zero) or d.coin(iteration, cfg.rollout.backward_prob):
        return any(zero) and zero[d.integer(iteration, len(zero))]
    ids = torch.arange(iteration * cfg.data.batch, (iteration + 1) * cfg.data.batch)
    return all(zero[k] for k in (d.uniform(iteration, ids, "anchor") * len(zero)).long().tolist())


def student_forward(parts: Parts, cfg: Config, batch: Batch, iteration: int, with_grad: bool) -> Step:
    """The student at its anchor; with gradients on generator iterations alone."""
    x_tau, sigma, sigma_prev = student_input(parts, cfg, batch, iteration)
    with torch.set_grad_enabled(with_grad):
        pred = parts.adapter.predict(parts.student, x_tau, sigma, batch.cond)
        alpha = parts.adapter.schedule.alpha(sigma)
        x0 = prediction_to_x0(x_tau, pred, sigma, alpha, parts.adapter.parameterization)
    return Step(iteration, batch, x_tau, sigma, sigma_prev, pred, x0, is_silent(parts, cfg, iteration))


def law_to_sigma(parts: Parts, u: Tensor, dense: str, low: float, high: float, shifted: bool) -> Tensor:
    """sigma fp32 [B] from u in [0, 1): uniform in [low, high], or logit-normal with mean low and std high; then the
    schedule's shift, unless it is turned off (FLUX as released)."""
    if dense == "uniform":
        index = range_of(u, low, high)
    else:
        index = torch.sigmoid(low + high * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    return parts.adapter.schedule.sigma(index).float() if shifted else index


def generator_losses(parts: Parts, cfg: Config, step: Step, real_features) -> Tensor:
    """L_G = w_dmd L_DMD + lambda_G omega(tau) L_adv + lambda_ISG L_ISG (paper.md 1.7). Returns the scalar."""
    a, d, it = parts.adapter, parts.draws, step.iteration
    ids, cond = step.batch.samples, step.batch.cond
    uncond = a.uncond(len(ids))
    u = d.uniform(it, ids, "dmd.t")
    if cfg.dmd.t_law == "uniform":
        sigma = law_to_sigma(parts, u, "uniform", cfg.dmd.t_min, cfg.dmd.t_max, cfg.dmd.t_shift)
    else:
        sigma = law_to_sigma(parts, u, "logit-normal", 0.0, 1.0, cfg.dmd.t_shift)
    guidance = range_of(d.uniform(it, ids, "dmd.guidance"), cfg.dmd.guidance_min, cfg.dmd.guidance_max)
    noise = d.normal(it, ids, "dmd.noise", tuple(step.x0.shape[1:]))
    dmd = dmd_term(
        a, step.x0, noise, sigma, cond, parts.fake, parts.teacher, guidance, uncond,
        normaliser=cfg.dmd.normaliser, eps=cfg.dmd.eps,
    )  # fmt: skip
    loss = cfg.dmd.weight * dmd.loss
    step.metrics |= {
        "dmd": dmd.loss.detach(),
        "normaliser": dmd.normaliser.mean(),
        "fake_real_gap": dmd.grad_rms.mean(),
    }
    if cfg.isg.weight > 0:
        isg = isg_loss(parts, cfg, step, uncond)
        loss = loss + cfg.isg.weight * isg
        step.metrics["isg"] = isg.detach()
    if parts.disc is not None and not step.silent:
        adv = adversarial_generator(parts, cfg, step, real_features)
        loss = loss + cfg.disc.weight * adv
        step.metrics["adv"] = adv.detach()
    return loss


def isg_loss(parts: Parts, cfg: Config, step: Step, uncond: Condition | None) -> Tensor:
    """Intra-segment guidance (Eq. 12) with the midpoint law of the config."""
    d, it, ids = parts.draws, step.iteration, step.batch.samples
    u = d.uniform(it, ids, "isg.mid")
    schedule, space = parts.adapter.schedule, cfg.isg.margin_space
    low, high = midpoint_range(schedule, step.sigma, step.sigma_prev, cfg.isg.margin / 1000, space)
    if cfg.isg.midpoint == "adaptive":
        assert parts.curve is not None, "isg.midpoint=adaptive needs the measured curve"
        if space == "index":
            low, high = schedule.sigma(low), schedule.sigma(high)
        mid = adaptive_midpoint(u, low, high, parts.curve)
    else:
        mid = range_of(u, low, high)
        mid = schedule.sigma(mid) if space == "index" else mid
    guidance = range_of(d.uniform(it, ids, "isg.guidance"), cfg.isg.guidance_min, cfg.isg.guidance_max)
    return isg_term(
        parts.adapter, step.x_tau, step.pred, step.sigma, step.sigma_prev, mid, step.batch.cond,
        parts.student, parts.teacher, guidance, uncond, loss=cfg.isg.loss,
    )  # fmt: skip


def d_dtype(cfg: Config, x: Tensor) -> AbstractContextManager[object]:
    """Autocast, where model.dtype is bf16, of the backbone and D's heads, as released (paper.md 4); not of decoding."""
    return in_dtype(x, torch.bfloat16 if cfg.model.dtype == "bf16" else torch.float32)


def vfm_features(parts: Parts, cfg: Config, pixels: Tensor, step: Step | None, stream: str | None):
    """Backbone taps of pixels; augmented by the numbers of `stream` (x), or as they are (r, stream None)."""
    assert parts.vfm is not None
    if step is not None and stream and cfg.disc.augment:
        rand = parts.draws.uniform(step.iteration, step.batch.samples, stream, (AUGMENT_DRAWS,))
        pixels = diff_augment(pixels, rand)
    vfm: Any = parts.vfm
    with parts.phase("VFM backbone"), d_dtype(cfg, pixels):
        return vfm.features(pixels, cfg.disc.taps, cfg.disc.size)


def reference_features(parts: Parts, cfg: Config, step: Step):
    """Taps of r, the sample's own real image: once an iteration, shared by every D term. None where nothing asks."""
    if parts.disc is None or cfg.disc.kind != "vfm" or (step.silent and cfg.disc.omega_on_d):
        return None
    if step.batch.reference is not None and cfg.disc.keep_reference:
        return step.batch.reference
    with torch.no_grad():
        return vfm_features(parts, cfg, step.batch.pixels, step, None)


def keep_reference(parts: Parts, cfg: Config, data: Any) -> None:
    """Has the embedded data bring r's taps along in its batches: where the run looks at each picture LOOKS times or
    more, and where all of them take no more than KEPT_BYTES."""
    if parts.vfm is None or not cfg.disc.keep_reference or not hasattr(data, "keep_taps"):
        return
    pictures = data.images.shape[0] * data.images.shape[1]
    if LOOKS * pictures <= cfg.train.iterations * cfg.data.batch:
        data.keep_taps(lambda pixels: vfm_features(parts, cfg, pixels, None, None), KEPT_BYTES)


def noised(parts: Parts, x: Tensor, step: Step, stream: str) -> tuple[Tensor, Tensor]:
    """(x_t, sigma) at a uniform dense t: what DMD2's classifier sees."""
    d, ids = parts.draws, step.batch.samples
    sigma = parts.adapter.schedule.sigma(d.uniform(step.iteration, ids, stream + ".t")).float()
    noise = d.normal(step.iteration, ids, stream + ".noise", tuple(x.shape[1:]))
    return add_noise(x, noise, sigma, parts.adapter.schedule.alpha(sigma)), sigma


def fake_feature_logits(parts: Parts, x: Tensor, step: Step, stream: str) -> Tensor:
    """Logits [B, 1] of DMD2's classifier on the fake network's bottleneck over noised latents."""
    assert parts.disc is not None
    x_t, sigma = noised(parts, x, step, stream)
    return parts.disc(parts.adapter.features(parts.fake, x_t, sigma, step.batch.cond))


def text_vector(adapter: Any, kind: str, cond: Condition) -> Tensor:
    """What D knows of the prompt, [B, P]: by disc.text. Raises UserError for `clip-l` where the family's conditioning
    holds no vector of CLIP ViT-L/14."""
    if kind == "pooled":
        return cond.pooled
    if not hasattr(adapter, "clip_l"):
        raise UserError(
            "disc.text = 'clip-l': this family's conditioning has no CLIP ViT-L/14 vector; allowed is pooled"
        )
    return adapter.clip_l(cond)


def step_weight(parts: Parts, cfg: Config, step: Step) -> Tensor:
    """omega(tau) fp32 [B] at the student's anchor."""
    return omega(step.sigma, cfg.disc.omega, parts.adapter.schedule)


def adversarial_generator(parts: Parts, cfg: Config, step: Step, real_features) -> Tensor:
    """-omega E D(x_fake, c, r) over all logits, or DMD2's softplus(-D). D's parameters get no gradient:
    the caller differentiates with respect to the student's parameters alone."""
    assert parts.disc is not None
    if cfg.disc.kind == "fake_features":
        return softplus_generator(fake_feature_logits(parts, step.x0, step, "adv.g"))
    pixels = parts.adapter.decode(step.x0)
    taps = vfm_features(parts, cfg, pixels, step, "augment.fake")
    step.fake_taps = [t.detach() for t in taps]  # D's own step looks at the same picture
    with parts.phase("D heads"), d_dtype(cfg, pixels):
        logits = parts.disc(taps, text_vector(parts.adapter, cfg.disc.text, step.batch.cond), real_features)
    return hinge_generator(logits, step_weight(parts, cfg, step))


def discriminator_loss(parts: Parts, cfg: Config, step: Step, real_features) -> Tensor:
    """L_D on the real image and the detached x0 of this iteration (paper.md 1.6). Returns the scalar."""
    assert parts.disc is not None
    x0 = step.x0.detach()
    if cfg.disc.kind == "fake_features":
        real = fake_feature_logits(parts, step.batch.latents, step, "adv.real")
        fake = fake_feature_logits(parts, x0, step, "adv.fake")
        step.metrics["d_accuracy"] = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return softplus_discriminator(real, fake)
    with torch.no_grad():
        f_real = vfm_features(parts, cfg, step.batch.pixels, step, "augment.real")
        f_fake = step.fake_taps or vfm_features(parts, cfg, parts.adapter.decode(x0), step, "augment.fake")
    text = text_vector(parts.adapter, cfg.disc.text, step.batch.cond)
    disc: Any = parts.disc
    with parts.phase("D heads"), d_dtype(cfg, x0):
        condition = disc.conditioning(text, real_features)  # one pass of the reference tower for both
        taps = [torch.cat(both) for both in zip(f_real, f_fake, strict=True)]
        logits = [x.chunk(2) for x in disc.logits(taps, [torch.cat([c, c]) for c in condition])]
        real, fake = [x[0] for x in logits], [x[1] for x in logits]
    weight = step_weight(parts, cfg, step) if cfg.disc.omega_on_d else None
    out = hinge_discriminator(real, fake, weight)
    step.metrics |= {
        "d_real": out.real_mean,
        "d_fake": out.fake_mean,
        "d_accuracy": out.accuracy,
    }
    return out.loss


def fake_loss(parts: Parts, cfg: Config, step: Step) -> Tensor:
    """Denoising loss of the fake score on the detached x0 (paper.md 1.2): E || pred - target ||^2, a scalar."""
    a, d, ids = parts.adapter, parts.draws, step.batch.samples
    x0 = step.x0.detach()
    u = d.uniform(step.iteration, ids, "fake.t")
    if cfg.fake.t_law == "uniform":
        sigma = law_to_sigma(parts, u, "uniform", 0.0, 1.0, cfg.fake.t_shift)
    else:
        sigma = law_to_sigma(parts, u, "logit-normal", cfg.fake.logit_mean, cfg.fake.logit_std, cfg.fake.t_shift)
    noise = d.normal(step.iteration, ids, "fake.noise", tuple(x0.shape[1:]))
    x_t = add_noise(x0, noise, sigma, a.schedule.alpha(sigma))
    pred = a.predict(parts.fake, x_t, sigma, step.batch.cond)
    target = noise - x0 if a.parameterization == "flow" else noise
    return torch.nn.functional.mse_loss(pred.float(), target.float())


def saturation(x0: Tensor) -> Tensor:
    """Share of values outside [-1.05, 1.05] in pixel space: rises when a student over-saturates."""
    return (x0.detach().abs() > 1.05).float().mean()


__all__ = [
    "Parts",
    "Step",
    "discriminator_loss",
    "encoded",
    "fake_loss",
    "generator_losses",
    "keep_reference",
    "phased",
    "reference_features",
    "saturation",
    "student_forward",
    "text_vector",
]
