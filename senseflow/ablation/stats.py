"""What a handful of seeds can say: means with confidence bands, paired differences with a test."""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.05


def t_quantile(p: float, dof: int) -> float:
    """Quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(p, dof))


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of the 95 % confidence interval of the mean: Student's t). One value: infinite width."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, t_quantile(1 - ALPHA / 2, n - 1) * deviation / math.sqrt(n)


@dataclass(frozen=True)
class Difference:
    """A row minus its base over the seeds that both have: mean, half width of its 95 % interval, p of a two-sided
    paired t-test, and that p after Holm's correction over the rows of the group. p is None for fewer than 2 seeds,
    and where all differ by the same."""

    mean: float
    half: float
    seeds: int
    p: float | None
    adjusted: float | None = None

    @property
    def significant(self) -> bool:
        return self.adjusted is not None and self.adjusted < ALPHA


def paired(row: dict[int, float], base: dict[int, float]) -> Difference | None:
    """row, base: seed -> score. A seed gives both the same data order and noises, so pairs share much of their chance.
    None without a common seed."""
    from scipy.stats import t

    seeds = sorted(set(row) & set(base))
    if not seeds:
        return None
    gaps = [row[s] - base[s] for s in seeds]
    mean, half = mean_and_half_width(gaps)
    if len(gaps) < 2:
        return Difference(mean, half, 1, None)
    error = half / t_quantile(1 - ALPHA / 2, len(gaps) - 1)
    if error == 0:  # the same difference in every seed, as of a score in coarse steps: no spread to test it by
        return Difference(mean, half, len(gaps), 1.0 if mean == 0 else None)
    p = float(2 * t.sf(abs(mean) / error, len(gaps) - 1))
    return Difference(mean, half, len(gaps), p)


def holm(differences: dict[str, Difference | None]) -> dict[str, Difference | None]:
    """The same with `adjusted`: Holm's step-down p, which bounds the chance of any false claim in the group."""
    tested = sorted((d.p, name) for name, d in differences.items() if d is not None and d.p is not None)
    found, worst = dict(differences), 0.0
    for k, (p, name) in enumerate(tested):
        worst = max(worst, min(p * (len(tested) - k), 1.0))
        d = differences[name]
        assert d is not None
        found[name] = Difference(d.mean, d.half, d.seeds, d.p, worst)
    return found
