"""Statistics against published tables, closed forms and simulation."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e88.study.statistics import (
    heldout_estimate,
    mean_interval,
    median_spread,
    paired_difference,
    t_quantile,
)

# Two-sided 95 % and 99 % points of Student's t, from the usual printed table.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 9: (2.262, 3.250),
         10: (2.228, 3.169), 29: (2.045, 2.756), 30: (2.042, 2.750), 120: (1.980, 2.617)}  # fmt: skip


@pytest.mark.parametrize("dof", TABLE)
def test_t_quantile_equals_the_table(dof: int) -> None:
    assert t_quantile(0.95, dof) == pytest.approx(TABLE[dof][0], abs=5.1e-4)
    assert t_quantile(0.99, dof) == pytest.approx(TABLE[dof][1], abs=5.1e-4)


@given(st.floats(0.01, 0.999))
def test_t_quantile_closed_forms(level: float) -> None:
    assert t_quantile(level, 1) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-10)
    assert t_quantile(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-10)
    # Many degrees of freedom: the first two terms of the expansion about the normal quantile.
    z = NormalDist().inv_cdf((1 + level) / 2)
    assert t_quantile(level, 1001) == pytest.approx(z + (z**3 + z) / (4 * 1001), rel=1e-4)


def test_t_quantile_refuses_nonsense() -> None:
    for level, dof in ((0.0, 3), (1.0, 3), (0.95, 0)):
        with pytest.raises(ValueError, match="dof"):
            t_quantile(level, dof)


def test_mean_interval_by_hand() -> None:
    estimate = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (estimate.mean, estimate.n, estimate.over) == (2.0, 3, "seeds")
    assert estimate.low == pytest.approx(2 - half)
    assert estimate.high == pytest.approx(2 + half)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(0)
    trials, hits = 4000, 0
    for _ in range(trials):
        estimate = mean_interval([draw.gauss(5, 2) for _ in range(3)])
        assert estimate.low is not None and estimate.high is not None
        hits += estimate.low <= 5 <= estimate.high
    # Four standard errors of a binomial share; the normal's 1.96 in place of t would cover 81 %.
    assert hits / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


def test_one_seed_takes_the_windows_interval_and_says_so() -> None:
    assert mean_interval([2.0]).low is None
    one = heldout_estimate([2.0], [1.9, 2.2])
    assert (one.mean, one.low, one.high, one.over) == (2.0, 1.9, 2.2, "windows")
    assert not heldout_estimate([2.0], [1.9, 2.2]).excludes_zero
    assert heldout_estimate([2.0, 2.1], [1.9, 2.2]).over == "seeds"
    assert heldout_estimate([2.0], None).over == ""
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_paired_difference_cancels_what_seeds_share() -> None:
    seeds = {0: 10.0, 1: 20.0, 2: 35.0}
    offset = {0: 0.10, 1: 0.11, 2: 0.09}
    better, worse = seeds, {seed: value + offset[seed] for seed, value in seeds.items()}
    gap = paired_difference(worse, better)
    assert gap is not None and gap.mean == pytest.approx(0.1) and gap.n == 3 and gap.excludes_zero
    reverse = paired_difference(better, worse)
    assert reverse is not None and reverse.mean == pytest.approx(-0.1) and reverse.excludes_zero


def test_paired_difference_uses_shared_seeds_only() -> None:
    gap = paired_difference({0: 1.0, 1: 5.0, 7: 100.0}, {1: 4.0, 0: 0.0, 8: -100.0})
    assert gap is not None and (gap.mean, gap.n) == (1.0, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    lone = paired_difference({0: 1.0}, {0: 3.0})
    assert lone is not None and lone.low is None and not lone.excludes_zero


def test_undecided_where_the_interval_includes_zero() -> None:
    gap = paired_difference({0: 1.0, 1: 1.0, 2: 1.0}, {0: 0.9, 1: 1.1, 2: 0.95})
    assert gap is not None and not gap.excludes_zero


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8), st.floats(0.1, 10), st.floats(-1e3, 1e3))
def test_interval_moves_with_the_data(values: list[float], scale: float, shift: float) -> None:
    plain, moved = mean_interval(values), mean_interval([scale * v + shift for v in values])
    assert plain.low is not None and plain.high is not None and moved.low is not None and moved.high is not None
    assert plain.low <= plain.mean <= plain.high
    size = 1e-9 * (scale * max(map(abs, values)) + abs(shift) + 1)
    assert abs(moved.high - moved.low - scale * (plain.high - plain.low)) <= 1e4 * size


def test_median_spread() -> None:
    spread = median_spread([3.0, 1.0, 2.0], [(0.5, 2.5), (1.0, 4.0)])
    assert (spread.median, spread.low, spread.high, spread.n) == (2.0, 0.5, 4.0, 3)
