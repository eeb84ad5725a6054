"""The terms of the method on toy networks whose answers are known."""

import torch
from torch import nn

from senseflow.algo.dmd import dmd_term, teacher_predictions
from senseflow.algo.ida import AdaptiveLambda, ida_update
from senseflow.algo.isg import (
    ErrorCurve,
    adaptive_midpoint,
    isg_term,
    measure_error_curve,
    midpoint_range,
    uniform_midpoint,
)
from senseflow.algo.rollout import backward_simulation, sample_euler, sample_renoise
from senseflow.flow import DiffusionSchedule, FlowSchedule, add_noise
from senseflow.models.adapter import Condition

COND = Condition(torch.ones(3, 1, 1), torch.ones(3, 1))
UNCOND = Condition(torch.zeros(3, 1, 1), torch.zeros(3, 1))
SHAPE = (3, 2, 4, 4)


class Toy:
    """Adapter whose networks are plain functions net(x, sigma [B, 1, 1, 1], text [B, 1, 1, 1])."""

    latent_shape = SHAPE[1:]

    def __init__(self, schedule=None):
        self.schedule = schedule or FlowSchedule(3.0)
        self.parameterization = self.schedule.parameterization
        self.calls = []

    def predict(self, net, x, sigma, cond, guidance=None):
        self.calls.append((sigma.clone(), cond.pooled.flatten().clone()))
        return net(x, sigma.view(-1, 1, 1, 1), cond.pooled.view(-1, 1, 1, 1))


class Scale(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, sigma, text):
        return self.value * x + text


def test_guidance_is_one_teacher_call_ordered_uncond_cond():
    toy = Toy()
    sigma = torch.tensor([0.2, 0.5, 0.9])
    x = torch.randn(SHAPE)
    cond, uncond = teacher_predictions(toy, lambda x, s, c: x * c, x, sigma, COND, torch.ones(3), UNCOND)
    assert len(toy.calls) == 1
    torch.testing.assert_close(toy.calls[0][0], torch.cat([sigma, sigma]))
    assert toy.calls[0][1].tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(cond, x)
    torch.testing.assert_close(uncond, torch.zeros_like(x))


def test_dmd_gradient_reaches_x0_alone():
    toy, fake, teacher = Toy(), Scale(0.5), Scale(-0.3)
    x0 = torch.randn(SHAPE, requires_grad=True)
    noise, sigma, w = torch.randn(SHAPE), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1.0, 2.0, 3.0])
    out = dmd_term(toy, x0, noise, sigma, COND, fake, teacher, w, UNCOND)
    out.loss.backward()
    assert fake.value.grad is None and teacher.value.grad is None
    s, wv = sigma.view(-1, 1, 1, 1).double(), w.view(-1, 1, 1, 1).double()
    x = x0.detach().double()
    x_t = (1 - s) * x + s * noise.double()
    guided = -0.3 * x_t + wv * 1.0  # uncond -0.3 x_t, cond that + 1
    real, faked = x_t - s * guided, x_t - s * (0.5 * x_t + 1)
    g = (faked - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x0.grad.double(), g / g.numel(), rtol=1e-5, atol=1e-8)


def test_isg_is_zero_for_constant_velocities_and_ddim_consistent_eps():
    sigma, prev = torch.tensor([1.0, 0.9, 0.5]), torch.tensor([0.9, 0.75, 0.0])
    mid = uniform_midpoint(torch.tensor([0.1, 0.5, 0.9]), sigma, prev, 0.02)
    x = torch.randn(SHAPE)
    v = torch.randn(SHAPE)

    def constant(x, s, c):
        return v.repeat(len(x) // 3, 1, 1, 1)

    toy = Toy()
    loss = isg_term(toy, x, v, sigma, prev, mid, COND, constant, constant, torch.full((3,), 4.0), UNCOND)
    assert loss < 1e-6  # c sqrt(1 + (d / c)^2) - c with d of a few fp32 ulps
    # epsilon family: an ideal network knows eps and x0, so DDIM moves along one path
    ddim = Toy(DiffusionSchedule())
    sigma, prev = torch.tensor([0.99, 0.9, 0.5]), torch.tensor([0.9, 0.5, 0.0])
    mid = (sigma + prev) / 2
    eps, x0 = torch.randn(SHAPE), torch.randn(SHAPE)
    x = add_noise(x0, eps, sigma, ddim.schedule.alpha(sigma))
    loss = isg_term(ddim, x, eps, sigma, prev, mid, COND, lambda *a: eps, lambda *a: eps, None, None, "l2")
    assert loss < 1e-9


def test_isg_value_and_where_its_gradient_goes():
    toy, student, teacher = Toy(), Scale(0.5), Scale(-0.3)
    sigma, prev, mid = torch.full((3,), 0.9), torch.full((3,), 0.5), torch.full((3,), 0.7)
    x = torch.randn(SHAPE)
    pred = torch.randn(SHAPE, requires_grad=True)
    w = torch.tensor([1.0, 2.0, 3.0])
    for kind in ("l2", "charbonnier"):
        pred.grad = None
        loss = isg_term(toy, x, pred, sigma, prev, mid, COND, student, teacher, w, UNCOND, kind)
        loss.backward()
        assert student.value.grad is None and teacher.value.grad is None
        x_mid = x + (0.7 - 0.9) * (-0.3 * x + w.view(-1, 1, 1, 1))
        target = x_mid + (0.5 - 0.7) * (0.5 * x_mid + 1)
        d = x + (0.5 - 0.9) * pred.detach() - target
        expected = d.square() if kind == "l2" else (d.square() + 1e-6).sqrt() - 1e-3
        torch.testing.assert_close(loss.detach(), expected.mean())
        slope = 2 * d if kind == "l2" else d / (d.square() + 1e-6).sqrt()
        torch.testing.assert_close(pred.grad, slope * (0.5 - 0.9) / d.numel(), rtol=1e-4, atol=1e-8)


def test_ida_closed_form_and_adaptive_lambda():
    theta, phi0 = [torch.randn(4, 4)], torch.randn(4, 4)
    phi = [phi0.clone()]
    for _ in range(20):
        ida_update(phi, theta, 0.9)
    expected = 0.9**20 * phi0.double() + (1 - 0.9**20) * theta[0].double()
    torch.testing.assert_close(phi[0].double(), expected, rtol=0, atol=20 * 2**-22)
    adaptive = AdaptiveLambda(0.97)
    for _ in range(AdaptiveLambda.WARM):
        lam = adaptive.update(torch.tensor(1.0))
    torch.testing.assert_close(lam, torch.tensor(0.97))
    restored = AdaptiveLambda(0.97)
    restored.load_state_dict(adaptive.state_dict())
    for _ in range(50):
        lam = adaptive.update(torch.tensor(2.0))
    assert 0.939 < lam < 0.942  # the gap doubled: twice the pull
    assert torch.equal(restored.update(torch.tensor(1.0)), torch.tensor(0.97))
    for gap, expected in ((0.5, 0.985), (1e-3, 0.9925), (1e3, 0.88)):  # half the pull; 1/4 and 4 times it at the most
        for _ in range(300):
            lam = restored.update(torch.tensor(gap))
        torch.testing.assert_close(lam, torch.tensor(expected), rtol=0, atol=1e-4)


def test_adaptive_lambda_survives_gaps_that_are_not_finite():
    clean, hit = AdaptiveLambda(0.97), AdaptiveLambda(0.97)
    for bad in (torch.nan, torch.inf):  # before the first finite one: lam0
        assert torch.equal(hit.update(torch.tensor(bad)), torch.tensor(0.97))
    hit.updates = 0
    for gap in (1.0, 1.5, 2.0, 1.0, 1.0, 3.0, 2.0):
        expected = clean.update(torch.tensor(gap))
        assert torch.equal(hit.update(torch.tensor(gap)), expected)
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert torch.equal(hit.update(torch.tensor(bad)), expected)
    assert torch.equal(hit.update(torch.tensor(2.5)), clean.update(torch.tensor(2.5)))
    late = AdaptiveLambda(0.97)
    for _ in range(AdaptiveLambda.WARM + 1):
        late.update(torch.tensor(torch.nan))
    late.update(torch.tensor(2.0))  # the reference, though the warm-up is over
    assert torch.equal(late.update(torch.tensor(2.0)), torch.tensor(0.97))


def test_rollout_stops_at_the_drawn_anchor():
    anchors = [1.0, 0.9, 0.75, 0.5]
    noises = [torch.randn(SHAPE) for _ in range(4)]
    for j in range(4):
        toy = Toy()
        x = backward_simulation(toy, lambda x, s, c: 0 * x, noises, anchors, j, COND)
        assert [c[0][0].item() for c in toy.calls] == torch.tensor(anchors[:j]).tolist()
        # a zero velocity means x0 = x: the noise of each step adds up by hand
        expected = noises[0]
        for k in range(1, j + 1):
            expected = (1 - anchors[k]) * expected + anchors[k] * noises[k]
        torch.testing.assert_close(x, expected)


def test_samplers_find_x0_exactly_with_a_perfect_network():
    x0 = torch.randn(SHAPE)

    def perfect(x, s, c):
        return (x - x0) / s  # v = (x_t - x0) / sigma

    noises = [torch.randn(SHAPE) for _ in range(4)]
    out = sample_renoise(Toy(), perfect, noises, [1.0, 0.9, 0.75, 0.5], COND)
    torch.testing.assert_close(out, x0, rtol=1e-5, atol=1e-5)
    out = sample_euler(Toy(), perfect, noises[0], [1.0, 0.9, 0.75, 0.5, 0.0], COND)
    torch.testing.assert_close(out, x0, rtol=1e-5, atol=1e-5)


def test_ddim_sampler_finds_x0_of_an_epsilon_model():
    toy, x0, eps = Toy(DiffusionSchedule()), torch.randn(SHAPE), torch.randn(SHAPE)
    anchors = toy.schedule.anchors(4)
    first = torch.full((3,), anchors[0])
    x = add_noise(x0, eps, first, toy.schedule.alpha(first))

    def perfect(x, s, c):  # eps = (x_t - alpha x0) / sigma
        return (x - toy.schedule.alpha(s) * x0.repeat(len(x) // 3, 1, 1, 1)) / s

    out = sample_euler(toy, perfect, x, [*anchors, 0.0], COND)
    # dividing by alpha = .068 at the first anchor magnifies fp32's 2^-23 by 15
    torch.testing.assert_close(out, x0, rtol=0, atol=2e-5)
    assert [c[0][0].item() for c in toy.calls] == torch.tensor(anchors).tolist()
    out = sample_euler(toy, perfect, x, [*anchors, 0.0], COND, torch.full((3,), 3.0), UNCOND)
    torch.testing.assert_close(out, x0, rtol=0, atol=2e-5)


def test_adaptive_midpoint_of_a_linear_curve():
    """xi = s: the distribution on [a, b] inverts to sqrt(a^2 + u (b^2 - a^2))."""
    u = torch.rand(512, dtype=torch.float64).float()
    grid = torch.linspace(0, 1, 33)
    mid = adaptive_midpoint(u, torch.full((512,), 0.15), torch.full((512,), 0.85), ErrorCurve(grid, grid))
    expected = (0.15**2 + u.double() * (0.85**2 - 0.15**2)).sqrt()
    # within a cell of width h = .7 / 63 the law is taken as flat: off by h^2 slope / (8 xi) <= h^2 / (8 x .15)
    torch.testing.assert_close(mid.double(), expected, rtol=0, atol=1.1e-4)


def test_midpoints():
    sigma, prev = torch.tensor([0.9, 0.5, 0.06]), torch.tensor([0.5, 0.0, 0.0])
    low = uniform_midpoint(torch.zeros(3), sigma, prev, 0.05)
    high = uniform_midpoint(torch.ones(3), sigma, prev, 0.05)
    torch.testing.assert_close(low, torch.tensor([0.55, 0.05, 0.03]))
    torch.testing.assert_close(high, torch.tensor([0.85, 0.45, 0.03]))
    u = torch.tensor([0.1, 0.6, 0.3])
    grid = torch.linspace(0, 1, 33)
    flat = adaptive_midpoint(u, low, high, ErrorCurve(grid, torch.ones(33)))
    torch.testing.assert_close(flat, uniform_midpoint(u, sigma, prev, 0.05), rtol=1e-5, atol=1e-6)
    # all error above .7: the median of the first segment's law lies there
    step = ErrorCurve(grid, (grid > 0.7).float())
    assert adaptive_midpoint(torch.full((3,), 0.5), low, high, step)[0] > 0.7


def test_midpoint_ranges_in_both_spaces():
    """SD 3.5 between anchors .75 and .5: indices 500 and 250, so t_mid in [300, 450]; SDXL's top: 999 and 749."""
    sigma, prev = torch.tensor([0.75]), torch.tensor([0.5])
    low, high = midpoint_range(FlowSchedule(3.0), sigma, prev, 0.05, "index")
    torch.testing.assert_close(torch.cat([low, high]), torch.tensor([0.30, 0.45]))
    low, high = midpoint_range(FlowSchedule(3.0), sigma, prev, 0.05, "sigma")
    torch.testing.assert_close(torch.cat([low, high]), torch.tensor([0.55, 0.70]))
    sdxl = DiffusionSchedule()
    top, second = (torch.tensor([a]) for a in sdxl.anchors(4)[:2])
    low, high = midpoint_range(sdxl, top, second, 0.02, "index")
    torch.testing.assert_close(torch.cat([low, high]), torch.tensor([0.769, 0.979]))
    assert sdxl.timestep(sdxl.sigma(torch.cat([low, high]))).tolist() == [769, 979]


def test_error_curve_of_a_known_network():
    """v = 0 gives x0_hat = x_t, so xi = E ((1 - s) x0 + s eps - x0)^2 = s^2 E (eps - x0)^2."""
    x0, noise, sigmas = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.1, 0.5, 1.0])
    curve = measure_error_curve(Toy(), lambda x, s, c: 0 * x, x0, COND, noise, sigmas)
    torch.testing.assert_close(curve.xi, sigmas.square() * (noise - x0).square().mean())
