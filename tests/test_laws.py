"""What each preset draws, against the published laws (paper.md 1.1 to 1.7, 3): t of every loss, guidance, t_mid; and
noise, targets and x0 of each family against diffusers' schedulers in fp64."""

from types import SimpleNamespace

import pytest
import torch

from senseflow import steps
from senseflow.algo.isg import ErrorCurve
from senseflow.data.batches import Batch
from senseflow.draws import Draws
from senseflow.fields import replace
from senseflow.flow import DiffusionSchedule, FlowSchedule, add_noise, euler_step, omega, prediction_to_x0
from senseflow.models.adapter import Condition
from senseflow.presets import PRESETS
from senseflow.steps import Parts, Step, fake_loss, generator_losses, student_forward

pytest.importorskip("diffusers")
N = 4096
KS = 1.95 / N**0.5  # Kolmogorov's bound on the distance of two laws, at a level of .001; the draws are fixed

# preset: (lowest and highest sigma of L_DMD, where published; its guidance; ISG's guidance; margin of t_mid, its space)
PUBLISHED = {
    "sd35-large": ((0.0605, 0.9936), (3, 10), (5, 5), (0.05, "index")),
    "sd35-medium": ((0.0605, 0.9936), (2, 8), (2, 4), (0.05, "index")),
    "flux-dev": (None, (1, 8), (1, 8), (0.02, "sigma")),
    "sdxl": (None, (8, 8), (3, 15), (0.02, "index")),
}


def schedule_of(cfg):
    return DiffusionSchedule() if cfg.model.family == "sdxl" else FlowSchedule(cfg.model.shift, cfg.model.shift_kind)


def parts_of(cfg, predict):
    schedule = schedule_of(cfg)
    adapter = SimpleNamespace(
        schedule=schedule, parameterization=schedule.parameterization, latent_shape=(1, 1, 1), predict=predict,
        uncond=lambda n: None,
    )  # fmt: skip
    net = torch.nn.Identity()
    anchors = schedule.anchors(4, cfg.model.anchors == "released")
    return Parts(adapter, net, net, net, None, None, anchors, Draws(0))  # type: ignore[arg-type]


def batch_of(n=N):
    x = Draws(1).normal(0, torch.arange(n), "x", (1, 1, 1))
    return Batch(x, x, Condition(torch.zeros(n, 1, 1), torch.zeros(n, 1)), torch.arange(n))


def drawn(preset, monkeypatch, curve=None, **changes):
    """(config, schedule, what the losses get: sigma and guidance of L_DMD; guidance, t_mid, tau and tau_prev of L_ISG;
    sigma of the fake's loss)."""
    cfg, seen = replace(PRESETS[preset](), changes), SimpleNamespace()

    def dmd(adapter, x0, noise, sigma, cond, fake, teacher, guidance, uncond, **_):
        seen.sigma, seen.guidance = sigma, guidance
        return SimpleNamespace(loss=x0.sum(), normaliser=torch.ones(1), grad_rms=torch.ones(1))

    def isg(adapter, x, pred, tau, prev, mid, cond, student, teacher, guidance, uncond, **_):
        seen.tau, seen.prev, seen.mid, seen.isg_guidance = tau, prev, mid, guidance
        return x.sum()

    def predict(net, x, sigma, cond, guidance=None):
        seen.last = sigma
        return x

    monkeypatch.setattr(steps, "dmd_term", dmd)
    monkeypatch.setattr(steps, "isg_term", isg)
    parts = parts_of(cfg, predict)
    parts.curve = curve
    batch = batch_of()
    anchors = torch.tensor([*parts.anchors, 0.0])
    index = torch.arange(N) % 4
    step = Step(0, batch, batch.latents, anchors[index], anchors[index + 1], batch.latents, batch.latents)
    generator_losses(parts, cfg, step, None)
    fake_loss(parts, cfg, step)
    seen.fake = seen.last
    return cfg, parts.adapter.schedule, seen


def distance(values, law):
    """sup |F_empirical - F|, law: the distribution function."""
    ordered = values.double().sort().values
    want = law(ordered)
    steps_ = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return max((steps_ - want).abs().max().item(), (steps_ - 1 / len(ordered) - want).abs().max().item())


def normal_of_logit(u):
    return torch.special.ndtr(torch.logit(u))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_guidance_and_t_follow_the_published_laws(preset, monkeypatch):
    ends, dmd, isg, _ = PUBLISHED[preset]
    cfg, schedule, seen = drawn(preset, monkeypatch)
    for values, (a, b) in ((seen.guidance, dmd), (seen.isg_guidance, isg)):
        if a == b:
            assert values.eq(a).all()
        else:
            assert values.min() >= a and values.max() < b
            assert distance(values, lambda w, a=a, b=b: (w - a) / (b - a)) < KS
    assert seen.guidance.ne(seen.isg_guidance).any()  # a fresh number each
    if preset == "flux-dev":  # logit-normal, unshifted, for both
        assert distance(seen.sigma, normal_of_logit) < KS and distance(seen.fake, normal_of_logit) < KS
        return
    if preset == "sdxl":  # integers: uniform on 20 ... 980, and on 0 ... 999
        for sigma, (first, last) in ((seen.sigma, (20, 980)), (seen.fake, (0, 999))):
            t = schedule.timestep(sigma)
            assert t.min() == first and t.max() == last
            count = last + 1 - first
            assert distance(t, lambda t, first=first, count=count: (t + 1 - first) / count) < KS + 1 / count + 0.002
        return
    span = schedule.sigma(torch.tensor([cfg.dmd.t_min, cfg.dmd.t_max])).tolist()
    assert span == pytest.approx(ends, abs=5e-5) and span[0] <= seen.sigma.min() and seen.sigma.max() <= span[1]
    assert distance(schedule.unshift(seen.sigma), lambda u: (u - 0.021) / 0.96) < KS
    assert distance(schedule.unshift(seen.fake), normal_of_logit) < KS


@pytest.mark.parametrize("preset", PUBLISHED)
def test_midpoints_keep_the_published_margin(preset, monkeypatch):
    """Uniform in [tau_prev + m, tau - m] of every segment, m = 50 or 20 thousandths, of the index or of sigma."""
    margin, space = PUBLISHED[preset][3]
    _, schedule, seen = drawn(preset, monkeypatch)
    for k in range(4):
        tau, prev, mid = (t[k::4] for t in (seen.tau, seen.prev, seen.mid))
        if space == "index":
            tau, prev, mid = schedule.unshift(tau), schedule.unshift(prev), schedule.unshift(mid)
        a, b = (prev + margin).double(), (tau - margin).double()
        slack = 1e-3 if preset == "sdxl" else 1e-6  # whole indices there
        assert (mid >= a - slack).all() and (mid <= b + slack).all()
        assert distance(mid, lambda t, a=a, b=b: (t - a[0]) / (b[0] - a[0])) < 2 * KS + 2 * slack  # a quarter of them


@pytest.mark.parametrize("preset", ["sd35-large", "flux-dev"])
def test_adaptive_midpoints_follow_the_curve_within_the_margin(preset, monkeypatch):
    """xi = sigma: on a segment [a, b], its ends by the margin in its own space, the law (t^2 - a^2) / (b^2 - a^2)."""
    margin, space = PUBLISHED[preset][3]
    grid = torch.linspace(0, 1, 65)
    _, schedule, seen = drawn(preset, monkeypatch, ErrorCurve(grid, grid), **{"isg.midpoint": "adaptive"})
    for k in range(4):
        tau, prev, mid = (t[k::4].double() for t in (seen.tau, seen.prev, seen.mid))
        if space == "index":
            a, b = schedule.sigma(schedule.unshift(prev) + margin)[0], schedule.sigma(schedule.unshift(tau) - margin)[0]
        else:
            a, b = prev[0] + margin, tau[0] - margin
        assert (mid > a - 1e-6).all() and (mid < b + 1e-6).all()
        law = distance(mid, lambda t, a=a, b=b: ((t.square() - a.square()) / (b.square() - a.square())).clamp(0, 1))
        assert law < 2 * KS  # a quarter of the draws


@pytest.mark.parametrize("preset", PUBLISHED)
def test_anchors_and_their_noise(preset):
    """Forward noising of the released run: each sample at an anchor of its own, uniform over the four."""
    cfg = PRESETS[preset]()
    published = {
        "sd35-large": [1.0, 0.9, 0.75, 0.5], "sd35-medium": [1.0, 0.9, 0.75, 0.5],
        "flux-dev": [1.0, 0.9045, 0.7595, 0.5128],
    }  # fmt: skip
    parts = parts_of(cfg, lambda net, x, sigma, cond, guidance=None: x)
    if preset == "sdxl":
        assert parts.adapter.schedule.timestep(torch.tensor(parts.anchors)).tolist() == [999, 749, 499, 249]
    else:
        assert parts.anchors == pytest.approx(published[preset], abs=5e-5)
    iteration = next(i for i in range(99) if not parts.draws.coin(i, cfg.rollout.backward_prob))
    step = student_forward(parts, cfg, batch_of(), iteration, with_grad=False)
    counts = [(step.sigma == torch.tensor(a)).sum().item() for a in parts.anchors]
    assert sum(counts) == N and max(abs(c / N - 0.25) for c in counts) < 0.03
    x, sigma, alpha = step.batch.latents, step.sigma, parts.adapter.schedule.alpha(step.sigma)
    noise = (step.x_tau - alpha.view(-1, 1, 1, 1) * x) / sigma.view(-1, 1, 1, 1)
    assert abs(noise.mean()) < 4 / N**0.5 and abs(noise.var() - 1) < 4 * (2 / N) ** 0.5
    coins = sum(parts.draws.coin(i, cfg.rollout.backward_prob) for i in range(N))
    assert abs(coins / N - 0.5) < 2 / N**0.5  # paper.md 2: one half


OMEGA = {  # paper.md 1.6: at the anchors from 1 downwards, published to three digits
    "sd35-large": [9e-6, 0.251, 0.564, 0.811], "sd35-medium": [9e-6, 0.251, 0.564, 0.811],
    "flux-dev": [0.0, 0.0092, 0.058, 0.238],
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_omega_of_each_preset(preset):
    cfg = PRESETS[preset]()
    schedule = schedule_of(cfg)
    anchors = torch.tensor(schedule.anchors(4, released=True), dtype=torch.float64)
    got = omega(anchors, cfg.disc.omega, schedule)
    if preset == "sdxl":  # sqrt(alpha_bar), to the first power
        from diffusers import DDPMScheduler

        table = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
        torch.testing.assert_close(got, table[[999, 749, 499, 249]].double().sqrt(), rtol=1e-5, atol=0)
    else:
        assert got.tolist() == pytest.approx(OMEGA[preset], rel=6e-3, abs=1e-7)


def diffusers_of(preset):
    import diffusers

    if preset == "sdxl":
        return diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
            clip_sample=False, set_alpha_to_one=True,
        )  # fmt: skip
    if preset == "sd35":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    mu = {"flux": dict(max_shift=1.15), "flux2": dict(max_shift=2.29118)}[preset]
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **mu)


@pytest.mark.parametrize("family", ["sd35", "flux", "flux2", "sdxl"])
def test_noise_target_and_x0_are_the_schedulers(family):
    """x_t as `scale_noise` / `add_noise` make it, in fp64; a network that predicts our target gives back x0 in one step
    of the scheduler, and `prediction_to_x0` the same; a step to the next anchor is the scheduler's."""
    theirs = diffusers_of(family)
    kind = {"sd35": (3.0, "linear"), "flux": (1.15, "exponential"), "flux2": (2.29118, "exponential")}
    schedule = DiffusionSchedule() if family == "sdxl" else FlowSchedule(*kind[family])
    if family == "sdxl":
        theirs.set_timesteps(4)
        sigmas = (1 - theirs.alphas_cumprod[theirs.timesteps].double()).sqrt()
    else:
        more = {} if family == "sd35" else dict(mu=schedule.shift)
        theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], **more)
        sigmas = theirs.sigmas[:4].double()
    # their tables are fp32; 1 - alpha_bar carries the error of a product of 1000 factors
    assert sigmas.tolist() == pytest.approx(schedule.anchors(4), rel=2e-5 if family == "sdxl" else 3e-7)
    x0, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64).unbind(0)
    alpha = schedule.alpha(sigmas)
    ours = add_noise(x0, noise, sigmas, alpha)
    target = noise if family == "sdxl" else noise - x0
    found = prediction_to_x0(ours, target, sigmas, alpha, schedule.parameterization)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-12)
    for i, t in enumerate(theirs.timesteps):
        if family == "sdxl":
            want = theirs.add_noise(x0[i : i + 1], noise[i : i + 1], t[None])
        else:
            theirs._begin_index = theirs._step_index = None
            want = theirs.scale_noise(x0[i : i + 1], t[None], noise[i : i + 1])
        torch.testing.assert_close(ours[i : i + 1], want, rtol=0, atol=1e-14 if family != "sdxl" else 1e-12)
        out = theirs.step(target[i : i + 1], t, ours[i : i + 1])
        if family == "sdxl":
            torch.testing.assert_close(out.pred_original_sample, x0[i : i + 1], rtol=0, atol=2e-5)  # alpha .068 in fp32
            continue
        next_ = (*sigmas.tolist(), 0.0)[i + 1]
        stepped = euler_step(ours[i : i + 1], target[i : i + 1], sigmas[i : i + 1], torch.tensor([next_]).double())
        torch.testing.assert_close(stepped, out.prev_sample.double(), rtol=0, atol=4 * 2**-22)  # it steps in fp32
