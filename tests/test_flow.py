"""Schedules against diffusers' own tables and the values of paper.md."""

import pytest
import torch

from senseflow.flow import (
    DiffusionSchedule,
    FlowSchedule,
    add_noise,
    eps_to_x0,
    omega,
    prediction_to_x0,
    velocity_to_x0,
)

SD3, FLUX, SDXL = FlowSchedule(3.0), FlowSchedule(1.15, "exponential"), DiffusionSchedule()


def test_sd3_table_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].double()  # descending
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(SD3.sigma(u), table, rtol=2e-6, atol=0)  # their table is fp32
    assert SD3.anchors(4) == pytest.approx([1.0, 0.9, 0.75, 0.5], rel=1e-12)


def test_flux_anchors_are_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    assert FLUX.anchors(4) == pytest.approx(scheduler.sigmas[:4].tolist(), rel=1e-6)
    assert FLUX.anchors(4) == pytest.approx([1.0, 0.9045, 0.7595, 0.5128], abs=5e-5)
    assert FLUX.anchors(4, released=True) == [1.0, 0.904, 0.759, 0.512]


def test_sdxl_alphas_are_diffusers():
    from diffusers import DDIMScheduler

    table = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    ).alphas_cumprod.double()
    anchors = torch.tensor(SDXL.anchors(4), dtype=torch.float64)
    # 1 - alpha_bar cancels where it is small; their fp32 cumulative product of 1000 factors is good to 1e-5
    torch.testing.assert_close(SDXL.alpha(anchors) ** 2, table[[999, 749, 499, 249]], rtol=2e-5, atol=0)
    assert SDXL.timestep(anchors.float()).tolist() == [999, 749, 499, 249]
    # Euler's sigma is sqrt((1 - alpha_bar) / alpha_bar): ours over alpha, on the whole table
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    every = torch.arange(1000)
    sigma = SDXL.sigma((every.double() + 0.5) / 1000)
    # their fp32 alpha_bar near 1 loses 6e-8 / (1 - alpha_bar) = 7e-5 at the first entry
    torch.testing.assert_close(sigma / SDXL.alpha(sigma), euler.sigmas[:1000].flip(0).double(), rtol=1e-4, atol=0)
    assert torch.equal(SDXL.timestep(sigma.float()), every)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_anchors_of_every_length_descend_from_one(steps):
    anchors = SD3.anchors(steps)
    assert len(anchors) == steps and anchors[0] == 1.0 and anchors == sorted(anchors, reverse=True)
    with pytest.raises(ValueError, match="steps must be one of"):
        SD3.anchors(3)


def test_round_trips_in_fp64():
    x0, eps = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind(0)
    sigma = torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64)
    x_t = add_noise(x0, eps, sigma)
    torch.testing.assert_close(velocity_to_x0(x_t, eps - x0, sigma), x0, rtol=1e-12, atol=1e-12)
    alpha = SDXL.alpha(sigma)
    x_t = add_noise(x0, eps, sigma, alpha)
    torch.testing.assert_close(eps_to_x0(x_t, eps, sigma, alpha), x0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prediction_to_x0(x_t, eps, sigma, alpha, "epsilon"), x0, rtol=1e-11, atol=1e-11)


def test_omega_of_every_law():
    sigma = torch.tensor([0.5, 0.75, 0.9, 1.0])
    torch.testing.assert_close(omega(sigma, "paper", SD3), torch.tensor([0.25, 0.0625, 0.01, 0.0]))
    # the released look-up itself: its indices into diffusers' descending table
    from diffusers import FlowMatchEulerDiscreteScheduler

    released = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[[249, 499, 749, 999]].square()
    assert released.tolist() == pytest.approx([0.811, 0.564, 0.251, 9e-6], rel=5e-3)  # paper.md's rounded values
    exact = omega(sigma.double(), "released-sd35", SD3).float()
    torch.testing.assert_close(exact, released, rtol=5e-6, atol=0)
    # fp32: 1 - u + .001 carries an error of 2^-24 x 2, a ten-thousandth of .001 at the last anchor, squared
    torch.testing.assert_close(omega(sigma, "released-sd35", SD3), released, rtol=3e-4, atol=0)
    flux = torch.tensor([0.512, 0.759, 0.904, 1.0])
    expected = torch.tensor([0.238, 0.058, 0.0092, 0.0])
    torch.testing.assert_close(omega(flux, "paper", FLUX), expected, rtol=5e-3, atol=2e-4)
    s = torch.tensor(SDXL.anchors(4))
    torch.testing.assert_close(omega(s, "released-sdxl", SDXL).square() + s.square(), torch.ones(4))
    with pytest.raises(ValueError, match="omega law"):
        omega(sigma, "other", SD3)
    with pytest.raises(ValueError, match="released-sd35"):
        omega(s, "released-sd35", SDXL)


@pytest.mark.parametrize("schedule", [SD3, FLUX, FlowSchedule(1.0)])
def test_unshift_inverts_sigma(schedule):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.unshift(schedule.sigma(u)), u, rtol=1e-14, atol=1e-15)
