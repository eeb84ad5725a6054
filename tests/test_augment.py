"""The discriminator's augmentation against its formulas and pixel by pixel."""

import pytest
import torch
from torch import Tensor

from senseflow.algo.augment import AUGMENT_DRAWS, diff_augment

EPS32 = torch.finfo(torch.float32).eps
FAR = 1 - 2**-24  # the largest fp32 under 1


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(batch: int = 2, **columns: float) -> Tensor:
    """Draws of 1/2, which change nothing but the cut box; others by name."""
    out = torch.full((batch, AUGMENT_DRAWS), 0.5)
    for name, value in columns.items():
        out[:, ("b", "s", "c", "ty", "tx", "cy", "cx").index(name)] = value
    return out


def inside_cut(side: int, u: float) -> range:
    box = int(side * 0.5 + 0.5)
    centre = int(u * (side + 1 - box % 2))
    return range(max(centre - box // 2, 0), min(centre - box // 2 + box, side))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_is_the_identity_outside_the_box(dtype):
    x = torch.rand(2, 3, 16, 16).mul(2).sub(1).to(dtype)
    y = diff_augment(x, rand())
    cut = (y == 0).all(1, keepdim=True)
    assert y.dtype == dtype and cut.sum() == 2 * 64
    want = torch.where(cut, 0.0, x)
    torch.testing.assert_close(y, want, rtol=0, atol=4 * EPS32 if dtype == torch.float32 else 2**-8)


def test_colours_are_the_formula():
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    draws = torch.rand(3, AUGMENT_DRAWS, dtype=torch.float64)
    draws[:, 3:5] = 0.5
    y = diff_augment(x, draws)
    for n in range(3):
        b, s, c = draws[n, :3].tolist()
        img = x[n] + b - 0.5
        grey = (img[0] + img[1] + img[2]) / 3
        img = torch.stack([grey + 2 * s * (plane - grey) for plane in img])
        mean = img.sum() / img.numel()
        img = mean + (c + 0.5) * (img - mean)
        kept = y[n] != 0
        assert kept.float().mean() > 0.5
        torch.testing.assert_close(y[n][kept], img[kept], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("u, k", [(0.0, -2), (0.39, -1), (0.5, 0), (0.61, 1), (FAR, 2)])
@pytest.mark.parametrize("axis", ["ty", "tx"])
def test_translation_moves_whole_pixels(u, k, axis):
    """16 pixels: shifts of -2..2 in five equal parts of [0, 1); what comes in is zero."""
    x = torch.rand(2, 3, 16, 16) + 0.5
    still = diff_augment(x, rand(cy=0.0, cx=0.0))
    y = diff_augment(x, rand(cy=0.0, cx=0.0, **{axis: u}))
    want = torch.zeros_like(x)
    d = 2 if axis == "ty" else 3
    n = 16 - abs(k)
    want.narrow(d, max(k, 0), n).copy_(x.narrow(d, max(-k, 0), n))
    want[:, :, :4, :4] = 0  # the box is cut after the shift
    torch.testing.assert_close(y, want, rtol=0, atol=8 * EPS32)
    assert (y == 0).sum() == (want == 0).sum() and (still == 0).sum() == 2 * 3 * 16


@pytest.mark.parametrize("height, width", [(16, 16), (17, 12), (56, 56), (3, 2)])
def test_cutout_box(height, width):
    for cy, cx in [(0.0, 0.0), (0.5, 0.25), (FAR, FAR), (0.3, FAR)]:
        x = torch.full((1, 3, height, width), 0.75)
        y = diff_augment(x, rand(1, cy=cy, cx=cx))
        want = x.clone()
        rows, cols = inside_cut(height, cy), inside_cut(width, cx)
        want[:, :, rows.start : rows.stop, cols.start : cols.stop] = 0
        torch.testing.assert_close(y, want, rtol=0, atol=4 * EPS32)
    side = height // 2 + height % 2
    assert len(inside_cut(height, 0.5)) == side or height < 4


def test_augment_is_per_sample():
    x, draws = torch.randn(6, 3, 20, 20), torch.rand(6, AUGMENT_DRAWS)
    whole = diff_augment(x, draws)
    assert not torch.equal(whole[0] == 0, whole[1] == 0)
    parts = torch.cat([diff_augment(x[:1], draws[:1]), diff_augment(x[1:], draws[1:])])
    assert torch.equal(whole, parts)


def test_augment_gradients():
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    draws = torch.rand(2, AUGMENT_DRAWS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: diff_augment(t, draws), x)


def test_augment_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"rand \[B, 7\]"):
        diff_augment(torch.zeros(2, 3, 8, 8), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="diff_augment takes"):
        diff_augment(torch.zeros(3, 8, 8), torch.zeros(3, 7))
