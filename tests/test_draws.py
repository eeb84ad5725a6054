"""Draws: numbers belong to samples, and they have the laws they claim."""

import math

import torch

from senseflow.draws import Draws

IDS = torch.arange(64)


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
