"""IDA's line against its closed form."""

import pytest
import torch

from senseflow_kernels import lerp_


def test_closed_form_after_n_steps():
    """phi_n = lam^n phi_0 + (1 - lam^n) theta for a fixed theta; each step rounds once, so n fp32 ulps at most."""
    phi0 = [torch.randn(5, 7), torch.randn(11)]
    theta = [torch.randn(5, 7), torch.randn(11)]
    phi, lam, n = [p.clone() for p in phi0], 0.97, 100
    for _ in range(n):
        lerp_(phi, theta, lam)
    for p, p0, t in zip(phi, phi0, theta, strict=True):
        expected = lam**n * p0.double() + (1 - lam**n) * t.double()
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=n * 2**-23 * 4)


def test_bf16_rounds_once():
    phi, theta = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    expected = (0.9 * phi.double() + 0.1 * theta.double()).float()
    lerp_([phi], [theta], 0.9)
    error = (phi.double() - expected.double()).abs()
    # half an ulp of bf16 (8 significant bits), plus fp32 arithmetic where terms cancel
    assert (error <= expected.double().abs() * 2**-8 + 1e-6).all()


def test_lam_one_changes_nothing_and_tensors_work():
    phi, theta = [torch.randn(9)], [torch.randn(9)]
    before = phi[0].clone()
    lerp_(phi, theta, 1.0)
    assert torch.equal(phi[0], before)
    lerp_(phi, theta, torch.tensor(0.0))
    torch.testing.assert_close(phi[0], theta[0])
    with pytest.raises(ValueError, match="tensor 0"):
        lerp_([torch.zeros(2)], [torch.zeros(3)], 0.5)
