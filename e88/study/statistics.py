"""Means with 95 % intervals over seeds, paired differences, medians with spread. No dependency."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

LEVEL = 0.95
MOST_SEEDS = 200


@dataclass(frozen=True)
class Estimate:
    """A mean and, where one can be had, its 95 % interval.

    n: how many seeds the mean is over. over: what the interval spans: "seeds" (Student's t over n >= 2 seeds),
    "windows" (of one seed over its held-out windows: it says nothing about other seeds), "exact" (counted, not
    measured), "resampling" (refits to resampled residuals) or "" (no interval).
    """

    mean: float
    n: int
    low: float | None = None
    high: float | None = None
    over: str = ""

    @property
    def excludes_zero(self) -> bool:
        """Whether an interval over seeds lies wholly on one side of zero: what a claimed difference needs."""
        return self.over == "seeds" and self.low is not None and self.high is not None and self.low * self.high > 0


@dataclass(frozen=True)
class Spread:
    """A median with the lowest and the highest value around it, over n values."""

    median: float
    low: float
    high: float
    n: int


@cache
def t_quantile(level: float, dof: int) -> float:
    """The t with P(|T| < t) = `level` for Student's T with `dof` degrees of freedom, to about 1e-12.

    The probability has a finite series in theta = atan(t / sqrt(dof)) (Abramowitz and Stegun, 26.7.3 and 26.7.4), which
    is inverted by bisection.
    """
    if not 0 < level < 1 or dof < 1:
        raise ValueError(f"level must lie between 0 and 1 and dof be at least 1, got {level} and {dof}")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _central_probability(middle, dof) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(dof) * math.tan(middle)


def _central_probability(theta: float, dof: int) -> float:
    cosine_squared = math.cos(theta) ** 2
    odd = dof % 2 == 1
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(dof // 2):
        total += term
        term *= cosine_squared * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return (theta + math.sin(theta) * total) * 2 / math.pi if odd else math.sin(theta) * total


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean of one value per seed, with its t-interval (95 % unless told) from two values on."""
    n = len(values)
    if n == 0:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 1)
    # statistics.stdev is exact in fractions, and twenty times slower.
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(level, n - 1) * spread / math.sqrt(n)
    return Estimate(mean, n, mean - half, mean + half, "seeds")


def seeds_to_decide(values: Sequence[float], threshold: float, level: float = LEVEL) -> int | None:
    """How many seeds in all would set the mean apart from `threshold`, if mean and spread stay as they are.

    None where there is no spread to go by (fewer than two values), or where `MOST_SEEDS` would not do.
    """
    if len(values) < 2:
        return None
    distance, spread = abs(math.fsum(values) / len(values) - threshold), statistics.stdev(values)
    return next(
        (n for n in range(2, MOST_SEEDS + 1) if t_quantile(level, n - 1) * spread < distance * math.sqrt(n)), None
    )


def heldout_estimate(values: Sequence[float], window_interval: Sequence[float] | None) -> Estimate:
    """As `mean_interval`; one seed takes the interval over that run's held-out windows, [low, high], and says so."""
    estimate = mean_interval(values)
    if estimate.n > 1 or window_interval is None:
        return estimate
    low, high = window_interval
    return Estimate(estimate.mean, 1, low, high, "windows")


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """first - second at every seed that both have, of values by seed.

    Runs of one seed draw the same data, so what they share cancels.
    """
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """The mean of `paired` differences with its 95 % interval from two such seeds on; None where none is shared."""
    differences = paired(first, second)
    return mean_interval(differences) if differences else None


def median_spread(values: Sequence[float], ranges: Sequence[Sequence[float]] = ()) -> Spread:
    """The median of one value per seed; the spread runs over the values and over each seed's own [low, high]."""
    ends = [*values, *(end for pair in ranges for end in pair)]
    return Spread(statistics.median(values), min(ends), max(ends), len(values))
