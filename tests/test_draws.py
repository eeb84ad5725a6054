"""Draws: numbers belong to samples, and they have the laws they claim."""

import math
from zlib import crc32

import torch

from senseflow.draws import Draws

IDS = torch.arange(64)
MASK = (1 << 64) - 1


def splitmix(x):
    """splitmix64's finaliser on Python's own integers."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def word(seed, iteration, sample, stream, element):
    """The 64-bit word of one counter, with nothing vectorised and nothing signed."""
    gamma = 0x9E3779B97F4A7C15
    key = splitmix(splitmix(splitmix(seed + gamma) ^ (iteration * gamma)) + crc32(stream.encode()) * 0xBF58476D1CE4E5B9)
    return splitmix(splitmix(sample * gamma + key) + (element + 1) * gamma)


def test_words_are_splitmix_of_the_counter():
    draws = Draws(2**40 + 5)
    samples = [0, 1, 2**33 + 7]
    u = draws.uniform(10**6, torch.tensor(samples), "dmd.t", (5,))
    expected = [[(word(draws.seed, 10**6, s, "dmd.t", k) >> 40) / 2**24 for k in range(5)] for s in samples]
    assert u.tolist() == expected  # multiples of 2^-24: fp32 holds them exactly
    z = draws.normal(10**6, torch.tensor(samples), "dmd.noise", (2,)).double()
    for row, s in zip(z.tolist(), samples, strict=True):
        w = word(draws.seed, 10**6, s, "dmd.noise", 0)
        radius = math.sqrt(-2 * math.log(((w >> 32) + 1) / 2**32))
        angle = (w & 0xFFFFFFFF) * 2 * math.pi / 2**32
        # fp32: the angle, up to 2 pi, is good to 2^-22; the radius, under 6.7, to a few 2^-24
        assert abs(row[0] - radius * math.cos(angle)) < 7 * 2**-21
        assert abs(row[1] - radius * math.sin(angle)) < 7 * 2**-21


def test_golden_values():
    """A change here changes every run and every checkpoint's continuation."""
    draws, ids = Draws(7), torch.tensor([0, 11])
    words = (draws.uniform(3, ids, "s", (2,)) * 2**24).long()
    assert words.tolist() == [[8605065, 14479728], [13204289, 8248146]]
    expected = torch.tensor([[0.56831282, 0.05005254, 1.00616205], [-0.01305365, -0.66496307, 0.69194633]])
    torch.testing.assert_close(draws.normal(3, ids, "s", (3,)), expected, rtol=0, atol=7 * 2**-21)
    assert [draws.integer(i, 1000) for i in range(4)] == [124, 855, 383, 938]
    assert [draws.coin(i, 0.5) for i in range(8)] == [True, True, True, False, True, True, True, True]


def test_any_split_of_a_batch_gives_the_same_numbers():
    draws = Draws(3)
    whole = draws.normal(5, IDS, "a", (3, 4))
    for cut in (1, 7, 63):
        parts = [draws.normal(5, part, "a", (3, 4)) for part in (IDS[:cut], IDS[cut:])]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(64)
    assert torch.equal(draws.normal(5, IDS[order], "a", (3, 4)), whole[order])


def test_every_part_of_the_counter_matters():
    base = Draws(0).uniform(0, IDS, "a")
    others = [Draws(1).uniform(0, IDS, "a"), Draws(0).uniform(1, IDS, "a"), Draws(0).uniform(0, IDS, "b")]
    others.append(Draws(0).uniform(0, IDS + 64, "a"))
    for other in others:
        assert not (other == base).any()


def test_normals_have_the_moments_and_no_correlation():
    """4 standard errors of each estimate, n = 2^18 numbers."""
    draws, ids = Draws(0), torch.arange(256)
    x = draws.normal(0, ids, "a", (1024,)).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    pairs = (
        (x[1:], x[:-1]),
        (x[:, 1:], x[:, :-1]),
        (x[:, :512], x[:, 512:]),  # the two halves of Box-Muller
        (x, draws.normal(1, ids, "a", (1024,)).double()),
        (x, draws.normal(0, ids, "b", (1024,)).double()),
        (x.square() - 1, draws.normal(0, ids + 256, "a", (1024,)).double().square() - 1),
    )
    for a, b in pairs:
        product = a * b
        assert abs(product.mean()) < 4 * product.std() / math.sqrt(product.numel())


def test_uniforms_are_uniform():
    u = Draws(0).uniform(0, torch.arange(1 << 16), "u")
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1).double()
    chi2 = ((counts - 1024).square() / 1024).sum()
    assert abs(chi2 - 63) < 4 * math.sqrt(2 * 63)


def test_host_numbers():
    draws = Draws(0)
    heads = sum(draws.coin(i, 0.3) for i in range(4096))
    assert abs(heads - 0.3 * 4096) < 4 * math.sqrt(4096 * 0.3 * 0.7)
    counts = torch.bincount(torch.tensor([draws.integer(i, 4) for i in range(4096)]), minlength=4)
    assert len(counts) == 4 and (counts - 1024).abs().max() < 4 * math.sqrt(4096 * 3 / 16)
    assert not any(draws.coin(i, 0.0) for i in range(100)) and all(draws.coin(i, 1.0) for i in range(100))
