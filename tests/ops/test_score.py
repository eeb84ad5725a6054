"""The score gradient against DMD2's formula in fp64 and a Gaussian pair whose scores are known."""

from contextlib import nullcontext

import pytest
import torch

from senseflow_kernels import dmd_loss, score_gradient, torch_path


def inputs(dtype, shape=(3, 4, 5, 6)):
    g = torch.Generator().manual_seed(1)
    x, x_t, fake, cond, uncond = (torch.randn(shape, generator=g).to(dtype) for _ in range(5))
    sigma = torch.tensor([0.2, 0.5, 0.9])
    return x, x_t, fake, cond, uncond, sigma, torch.tensor([1.0, 3.5, 8.0])


def by_definition(x, x_t, fake, cond, uncond, sigma, w, alpha=None):
    """Pseudo-target form, fp64: g = (p_real - p_fake) / mean |p_real|, L = 0.5 mean (x - (x - g))^2."""
    x, x_t, fake, cond, uncond, sigma, w = (t.double() for t in (x, x_t, fake, cond, uncond, sigma, w))
    s, w = sigma.view(-1, 1, 1, 1), w.view(-1, 1, 1, 1)
    a = 1 if alpha is None else alpha.double().view(-1, 1, 1, 1)
    real = (x_t - s * (uncond + w * (cond - uncond))) / a
    p_real, p_fake = x - real, x - (x_t - s * fake) / a
    g = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
    return g, 0.5 * g.square().mean()


@pytest.mark.parametrize("path", [nullcontext, torch_path], ids=["default", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_against_the_definition_in_fp64(dtype, kind, path):
    with path():
        against_the_definition(dtype, kind)


def against_the_definition(dtype, kind):
    *tensors, sigma, w = inputs(dtype)
    alpha = (1 - sigma**2).sqrt() if kind == "epsilon" else None
    g, loss = by_definition(*tensors, sigma, w, alpha)
    out = score_gradient(*tensors, sigma=sigma, guidance=w, alpha=alpha, parameterization=kind)
    assert (out.grad.double() - g).norm() <= 1e-6 * g.norm()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    x = tensors[0].clone().requires_grad_()
    (4 * dmd_loss(x, *tensors[1:], sigma=sigma, guidance=w, alpha=alpha, parameterization=kind).loss).backward()
    assert x.grad is not None
    # one rounding to the dtype of x; fp32 itself keeps 1e-6
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    atol = 6e-8 if dtype == torch.float16 else 1e-9  # half of fp16's smallest subnormal
    torch.testing.assert_close(x.grad.double(), 4 * g / g.numel(), rtol=rtol, atol=atol)


def test_gaussians_in_closed_form():
    """Data N(m, s^2): the best velocity gives x0_hat = m + k (x_t - (1 - sigma) m). Student N(a, s^2) against teacher
    N(b, s^2): x0_fake - x0_real = (1 - k (1 - sigma)) (a - b), towards the teacher's mean whatever x is."""
    a, b, s = 1.5, -0.5, 0.8
    x = a + s * torch.randn(3, 1, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.6, 0.95], dtype=torch.float64)
    sig = sigma.view(-1, 1, 1, 1)
    x_t = (1 - sig) * x + sig * torch.randn_like(x)
    k = (1 - sig) * s**2 / ((1 - sig) ** 2 * s**2 + sig**2)

    def velocity(mean):
        x0 = mean + k * (x_t - (1 - sig) * mean)
        return (x_t - x0) / sig

    out = score_gradient(x, x_t, velocity(a), velocity(b), sigma=sigma)
    shift = (1 - k * (1 - sig)) * (a - b)
    expected = (shift / out.normaliser.view(-1, 1, 1, 1)).expand_as(x)
    torch.testing.assert_close(out.grad, expected, rtol=1e-10, atol=1e-12)
    assert (out.grad > 0).all()  # descent moves x down, from a towards b


def test_zero_over_zero_is_zero_and_infinity_is_finite():
    x = torch.ones(2, 1, 2, 2)
    sigma = torch.tensor([0.5, 0.5])
    cond = torch.zeros_like(x)
    fake = cond.clone()
    fake[1, 0, 0, 0] = -1.0  # sample 1: difference over a zero normaliser
    out = score_gradient(x, x, fake, cond, sigma=sigma)
    assert torch.equal(out.normaliser, torch.zeros(2)) and torch.equal(out.grad[0], torch.zeros(1, 2, 2))
    assert out.grad[1, 0, 0, 0] == torch.finfo(torch.float32).max and out.grad[1, 0, 1, 1] == 0


def test_batch_normaliser_and_eps():
    *tensors, sigma, w = inputs(torch.float32)
    one = score_gradient(*tensors, sigma=sigma, guidance=w)
    whole = score_gradient(*tensors, sigma=sigma, guidance=w, normaliser="batch")
    torch.testing.assert_close(whole.normaliser, one.normaliser.mean().expand(3))
    eps = score_gradient(*tensors, sigma=sigma, guidance=w, eps=0.5)
    scale = (one.normaliser / (one.normaliser + 0.5)).view(-1, 1, 1, 1)
    torch.testing.assert_close(eps.grad, one.grad * scale, rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_named():
    *tensors, sigma, w = inputs(torch.float32)
    for changed, match in (
        (dict(sigma=sigma[:2]), r"sigma must have shape \[3\], got \[2\]"),
        (dict(sigma=sigma.view(3, 1, 1, 1)), r"sigma must have shape \[3\], got \[3, 1, 1, 1\]"),
        (dict(sigma=None), r"sigma must have shape \[3\], got None"),
        (dict(guidance=7.5), r"guidance must have shape \[3\], got 7.5"),
        (dict(guidance=None), "uncond needs guidance"),
        (dict(sigma=torch.tensor([20, 500, 980])), "sigma is torch.int64"),  # timesteps
        (dict(sigma=sigma.to("meta")), "sigma is on meta, x on cpu"),
        (dict(fake=tensors[2].int()), "fake is torch.int32"),
        (dict(x_t=tensors[1].to("meta")), "x_t is on meta, x on cpu"),
        (dict(cond=tensors[3][:, :1]), "cond has shape"),
        (dict(parameterization="v"), "parameterization must be one of"),
        (dict(parameterization="epsilon"), "needs alpha"),
        (dict(normaliser="all"), "normaliser must be one of"),
    ):
        names = ("x", "x_t", "fake", "cond", "uncond")
        kw = dict(zip(names, tensors, strict=True)) | dict(sigma=sigma, guidance=w) | changed
        for op in (score_gradient, dmd_loss):
            with pytest.raises(ValueError, match=match):
                op(**kw)
    for shape in ((3,), (), (0, 4), (3, 0)):
        with pytest.raises(ValueError, match="x must be"):
            score_gradient(*[torch.ones(shape)] * 5, sigma=sigma, guidance=w)


def test_differentiable_once_and_in_x_alone():
    *tensors, sigma, w = (t.requires_grad_() for t in inputs(torch.float32))
    loss = dmd_loss(*tensors, sigma=sigma, guidance=w).loss
    (dx,) = torch.autograd.grad(loss.square(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    dmd_loss(*tensors, sigma=sigma, guidance=w).loss.backward()
    assert all(t.grad is None for t in (*tensors[1:], sigma, w))
    assert not dmd_loss(tensors[0].detach(), *tensors[1:], sigma=sigma, guidance=w).loss.requires_grad
