"""Heads and classifier against their formulas, written out by hand in fp64."""

import math

import pytest
import torch
from torch import Tensor

from senseflow.algo.discriminator import (
    FakeFeatureDiscriminator,
    LocalNorm,
    SpectralConv2d,
    VFMDiscriminator,
    softplus_discriminator,
    softplus_generator,
)

DIMS, TEXT, CMAP = (6, 5), 7, 4
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def heads(downsample: int = 1, width: int | None = None) -> VFMDiscriminator:
    """Small heads with nothing left at its initial 0 or 1, so that every parameter shows."""
    disc = VFMDiscriminator(DIMS, TEXT, cmap=CMAP, width=width, downsample=downsample)
    with torch.no_grad():
        for p in disc.parameters():
            p.add_(0.3 * torch.randn_like(p))
    disc.update_spectral_norm()
    return disc


def taps(batch: int, side: int, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(batch, d, side, side, dtype=dtype) for d in DIMS]


# ------------------------------------------------------------------------------- the formula


def matrix_norm(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight.flatten(1), ord=2)


def conv_by_hand(conv: SpectralConv2d, x: Tensor) -> Tensor:
    """Circular convolution as a sum of rolled maps, weight over its true largest singular value."""
    weight, k = conv.weight / matrix_norm(conv.weight), conv.weight.shape[-1]
    y = torch.zeros(len(x), len(weight), *x.shape[2:], dtype=x.dtype)
    for i in range(k):
        for j in range(k):
            rolled = torch.roll(x, (k // 2 - i, k // 2 - j), (2, 3))
            y += torch.einsum("oc,bchw->bohw", weight[:, :, i, j], rolled)
    s = conv.stride[0]
    return y[:, :, ::s, ::s] + conv.bias[None, :, None, None]


def norm_by_hand(norm: LocalNorm, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    for b in range(len(x)):
        for c in range(x.shape[1]):
            plane = x[b, c]
            mean = plane.sum() / plane.numel()
            var = ((plane - mean) ** 2).sum() / plane.numel()
            y[b, c] = (plane - mean) / torch.sqrt(var + 1e-5) * norm.weight[c] + norm.bias[c]
    return y


def block_by_hand(block, x: Tensor) -> Tensor:
    x = norm_by_hand(block[1], conv_by_hand(block[0], x))
    return torch.where(x > 0, x, 0.2 * x)


def tower_by_hand(tower, x: Tensor, downsample: int) -> Tensor:
    """Pointwise block; 0 -> R, 1 -> S R, 2 -> S R S, 3 -> S R S R S (the paper's); then cls."""
    plan = {0: "R", 1: "SR", 2: "SRS", 3: "SRSRS"}[downsample]
    assert len(tower) == len(plan) + 2
    x = block_by_hand(tower[0], x)
    for kind, layer in zip(plan, tower[1:-1], strict=True):
        if kind == "S":
            assert layer.stride == (2, 2) and layer.kernel_size == (3, 3)
            x = conv_by_hand(layer, x)
        else:
            x = (block_by_hand(layer.f, x) + x) / math.sqrt(2)
    return conv_by_hand(tower[-1], x)


@torch.no_grad()
@pytest.mark.parametrize("downsample, side, width", [(0, 4, None), (1, 4, 3), (2, 5, None), (3, 9, 4)])
def test_logits_are_the_papers_head(downsample, side, width):
    disc = heads(downsample, width).double()
    for _ in range(200):
        disc.update_spectral_norm()
    x, r = taps(2, side, torch.float64), taps(2, side, torch.float64)
    text = torch.randn(2, TEXT, dtype=torch.float64)
    for head, fx, fr, got in zip(disc.heads, x, r, disc(x, text, r), strict=True):
        c = text @ head.cmap.weight.T / math.sqrt(TEXT)
        condition = c[:, :, None, None] + tower_by_hand(head.refmap, fr, downsample)
        want = (tower_by_hand(head.main, fx, downsample) * condition).sum(1) / math.sqrt(CMAP)
        left = -(-side // 2**downsample)
        assert got.shape == (2, left * left)
        # 200 iterations leave the norm's error far under this; a wrong term is of order one.
        torch.testing.assert_close(got, want.flatten(1), rtol=1e-6, atol=1e-6)


def test_eight_taps_of_the_paper_give_800_logits():
    disc = VFMDiscriminator([4] * 8, TEXT, cmap=4)
    maps = [torch.randn(1, 4, 73, 73) for _ in range(8)]
    assert [t.shape[1] for t in disc(maps, torch.randn(1, TEXT), maps)] == [100] * 8


@torch.no_grad()
def test_local_norm_is_per_sample_and_keeps_1x1_maps_finite():
    norm = LocalNorm(3).double()
    norm.weight.copy_(torch.randn(3))
    norm.bias.copy_(torch.randn(3))
    x = 5 + 3 * torch.randn(4, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), norm_by_hand(norm, x), rtol=1e-12, atol=1e-12)
    point = norm(torch.randn(1, 3, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(point.flatten(), norm.bias.data)


# ------------------------------------------------------------------------------- spectral norm


@torch.no_grad()
@pytest.mark.parametrize("channels, out, kernel", [(12, 8, 3), (8, 12, 1), (1, 5, 3)])
def test_spectral_norm_converges_to_one(channels, out, kernel):
    conv = SpectralConv2d(channels, out, kernel)
    conv.weight.copy_(4 * torch.randn_like(conv.weight))
    before = abs(matrix_norm(conv.weight / conv.spectral_norm()).item() - 1)
    for _ in range(300):
        conv.power_iteration()
    after = matrix_norm(conv.weight / conv.spectral_norm()).item()
    assert abs(after - 1) < 32 * EPS32  # a few roundings of sums of up to 108 terms
    assert before > 1e-3


def test_power_iteration_runs_only_when_asked_and_is_saved():
    disc = heads().train()
    x, text, r = taps(2, 4), torch.randn(2, TEXT), taps(2, 4)
    before = {k: v.clone() for k, v in disc.state_dict().items()}
    first = disc(x, text, r)
    sum(t.sum() for t in first).backward()
    assert all(torch.equal(a, b) for a, b in zip(first, disc(x, text, r), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in disc.state_dict().items())
    disc.update_spectral_norm()
    moved = [k for k, v in disc.state_dict().items() if not torch.equal(v, before[k])]
    assert moved and all(k.endswith((".u", ".v")) for k in moved)
    fresh = heads()
    fresh.load_state_dict(disc.state_dict())
    again = zip(fresh(x, text, r), disc(x, text, r), strict=True)
    assert all(torch.equal(a, b) for a, b in again)


def test_moving_the_norm_inside_a_step_is_an_error():
    disc = heads()
    loss = disc(taps(1, 4), torch.randn(1, TEXT), taps(1, 4))[0].sum()
    disc.update_spectral_norm()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
def test_a_zero_or_nan_weight_does_not_stick_in_the_buffers():
    conv = SpectralConv2d(3, 4, 3)
    good = conv.weight.clone()
    for bad in (0.0, math.nan):
        conv.weight.fill_(bad)
        conv.power_iteration()
        assert conv.u.isfinite().all() and conv.u.norm() > 0.9
        conv.weight.copy_(good)
    conv.weight.zero_()
    out = conv(torch.randn(1, 3, 4, 4))
    torch.testing.assert_close(out, conv.bias[None, :, None, None].expand_as(out))


def test_norm_gradient_includes_the_norm_itself():
    """The output ignores the weight's scale, so the gradient is orthogonal to the weight."""
    conv = SpectralConv2d(3, 4, 3).double()
    conv(torch.randn(2, 3, 5, 5, dtype=torch.float64)).square().sum().backward()
    grad, weight = conv.weight.grad, conv.weight.detach()
    assert grad.norm() > 1e-3
    assert abs((grad * weight).sum()) < 1e-10 * grad.norm() * weight.norm()


# ------------------------------------------------------------------------------- the whole D


@torch.no_grad()
@pytest.mark.parametrize("downsample, side", [(1, 4), (3, 17)])
def test_logits_do_not_depend_on_the_split(downsample, side):
    disc = heads(downsample).train()
    x, text, r = taps(6, side), torch.randn(6, TEXT), taps(6, side)
    whole = disc(x, text, r)
    for part in (slice(0, 2), slice(2, 6)):
        logits = disc([t[part] for t in x], text[part], [t[part] for t in r])
        for a, b in zip(whole, logits, strict=True):
            # Only the order of the convolutions' sums may differ.
            torch.testing.assert_close(a[part], b, rtol=0, atol=256 * EPS32 * a.abs().max().item())


@torch.no_grad()
def test_conditioning_switches_the_head():
    disc = heads()
    for head in disc.heads:  # the reference tower gives zero whatever it sees
        head.refmap[-1].weight.zero_()
        head.refmap[-1].bias.zero_()
    x, other, r = taps(2, 4), taps(2, 4), taps(2, 4)
    text = torch.randn(2, TEXT)
    for image in (x, other):  # zero c and zero refmap: no image gets a logit
        assert all((t == 0).all() for t in disc(image, torch.zeros(2, TEXT), r))
    for t, doubled in zip(disc(x, text, r), disc(x, 2 * text, r), strict=True):
        assert t.abs().min() > 0
        torch.testing.assert_close(doubled, 2 * t)  # without r, linear in c
    for a, b in zip(disc(x, text, r), disc(x, text, other), strict=True):
        assert torch.equal(a, b)
    disc = heads()
    for a, b in zip(disc(x, text, r), disc(x, text, other), strict=True):
        assert not torch.allclose(a, b, atol=1e-3)


def test_one_conditioning_serves_real_and_fake():
    disc = heads()
    x, r, text = taps(2, 4), taps(2, 4), torch.randn(2, TEXT)
    shared = disc.conditioning(text, r)
    for image in (x, r):
        for a, b in zip(disc.logits(image, shared), disc(image, text, r), strict=True):
            assert torch.equal(a, b)


def test_gradients_reach_features_and_every_parameter():
    disc = heads()
    x = [t.requires_grad_() for t in taps(2, 4)]
    sum(t.square().sum() for t in disc(x, torch.randn(2, TEXT), taps(2, 4))).backward()
    for name, p in disc.named_parameters():
        # A bias before the norm drops out of the formula; everything else must learn.
        drops_out = name.endswith(("main.0.0.bias", "refmap.0.0.bias", "f.0.bias"))
        assert p.grad is not None and (drops_out or p.grad.abs().max() > 1e-4), name
    for t in x:
        assert t.grad is not None and (t.grad.flatten(1).norm(dim=1) > 1e-4).all()


def test_gradcheck():
    disc = heads().double()
    x, r = taps(1, 3, torch.float64), taps(1, 3, torch.float64)
    text = torch.randn(1, TEXT, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*x, text, *r)]
    assert torch.autograd.gradcheck(lambda a, b, c, d, e: tuple(disc([a, b], c, [d, e])), inputs, fast_mode=True)


@pytest.mark.parametrize("downsample", [0, 1, 3])
def test_1x1_maps_are_allowed(downsample):
    logits = heads(downsample)(taps(1, 1), torch.randn(1, TEXT), taps(1, 1))
    assert all(t.shape == (1, 1) and t.isfinite().all() for t in logits)


@torch.no_grad()
def test_low_precision_features():
    disc = heads()
    x, r, text = taps(2, 4), taps(2, 4), torch.randn(2, TEXT)
    x, r, text = [t.bfloat16() for t in x], [t.bfloat16() for t in r], text.bfloat16()
    want = disc([t.float() for t in x], text.float(), [t.float() for t in r])
    for a, b in zip(disc(x, text, r), want, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(disc(x, text, r), want, strict=True):
            assert a.dtype == torch.float32
            # Six layers, each rounding to 8 bits terms of order one.
            assert (a - b).abs().max() < 16 * 2**-8 * b.abs().max()


def test_wrong_inputs_are_named():
    disc, text = heads(), torch.randn(1, TEXT)
    with pytest.raises(ValueError, match="2 heads need as many taps, got 1"):
        disc(taps(1, 4)[:1], text, taps(1, 4))
    with pytest.raises(ValueError, match="differ"):
        disc(taps(1, 4), text, taps(1, 6))
    for bad in ({"dims": []}, {"dims": [0]}, {"downsample": -1}, {"cmap": 0}):
        with pytest.raises(ValueError, match="VFMDiscriminator needs"):
            VFMDiscriminator(**({"dims": [4], "text_dim": 3} | bad))
    with pytest.raises(ValueError, match="12 tokens make no square grid"):
        FakeFeatureDiscriminator(8)(torch.randn(1, 12, 8))


# ------------------------------------------------------------------------------- DMD2's classifier


@torch.no_grad()
def test_classifier_reads_tokens_as_rows_of_a_grid():
    disc = FakeFeatureDiscriminator(8, width=8, downsample=1).double()
    tokens = torch.randn(3, 16, 8, dtype=torch.float64)
    conv, norm, _ = disc.stages
    torch.nn.init.normal_(norm.weight)
    grid = torch.zeros(3, 8, 6, 6, dtype=torch.float64)  # zero border of one
    for t in range(16):
        grid[:, :, 1 + t // 4, 1 + t % 4] = tokens[:, t]
    y = torch.zeros(3, 8, 2, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            window = grid[:, :, i : i + 3 : 2, j : j + 3 : 2]
            y += torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], window)
    y += conv.bias[:, None, None]
    g = y.view(3, 2, 4 * 4)  # two groups of four channels
    g = (g - g.mean(2, keepdim=True)) / (g.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    y = g.view(3, 8, 2, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]
    y = (y / (1 + torch.exp(-y))).mean((2, 3))
    torch.testing.assert_close(disc(tokens), y @ disc.last.weight.T + disc.last.bias)


@pytest.mark.parametrize("downsample, tokens", [(0, 4), (2, 1), (2, 16), (3, 64)])
def test_classifier_shapes_and_gradients(downsample, tokens):
    disc = FakeFeatureDiscriminator(12, downsample=downsample)
    x = torch.randn(3, tokens, 12, requires_grad=True)
    logits = disc(x)
    assert logits.shape == (3, 1)
    softplus_discriminator(logits[:1], logits[1:]).backward()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is not None for p in disc.parameters())
    disc.update_spectral_norm()  # the loop calls it for every kind
    torch.testing.assert_close(disc(x[1:2]), logits[1:2])


def test_softplus_losses():
    real, fake = torch.randn(5, 1), torch.randn(5, 1)

    def sp(values: Tensor) -> float:
        return sum(math.log1p(math.exp(v)) for v in values.flatten().tolist()) / 5

    assert softplus_generator(fake).item() == pytest.approx(sp(-fake), rel=4 * EPS32)
    assert softplus_discriminator(real, fake).item() == pytest.approx(sp(-real) + sp(fake), rel=4 * EPS32)
    far = torch.tensor([[-1000.0]], requires_grad=True)  # non-saturating: full slope when D is sure
    softplus_generator(far).backward()
    assert far.grad.item() == -1
