"""Power laws of loss against parameters, tokens and compute, with uncertainty. No torch.

    L(x) = E + A x^-a              x: parameters, tokens or FLOPs
    L(N, D) = E + A N^-a + B D^-b  N parameters, D tokens (Hoffmann et al., 2022, "Training compute-optimal large
                                   language models", approach 3)

For given exponents the rest is linear, so the exponents are searched on a grid and the rest is solved exactly.
Intervals are 95 % percentiles over refits to resampled residuals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from e88.study.statistics import Estimate

EXPONENTS = np.geomspace(0.01, 3.0, 300)
JOINT_EXPONENTS = np.geomspace(0.02, 2.0, 48)
DRAWS = 200
BAND_POINTS = 24
# Of more runs than this a random part is used: the rest would only cost time.
MOST_POINTS = 400
# How far the refined searches reach, as a factor: about a step of the coarser grid each.
REACHES = (1.1, 1.01)
# Distinct values that a fit needs for each power term, with a floor and without.
FOR_FLOOR, FOR_POWER = 4, 3
# A variable that spans less than this factor carries no law.
LEAST_RANGE = 2.0

Array = np.ndarray
Grid = Sequence[tuple[float, ...]]


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + sum of scale (x / centre)^-exponent over the variables. Estimates: n is the number of points.

    floor is None where there were too few distinct x to tell one; `at_edge` where an exponent ran into the end of the
    searched range, so that the data do not determine it. error: root mean square residual. band: of a law over one
    variable, (x, low, y, high) from its smallest to its largest x, with the 95 % interval of y.
    """

    variables: tuple[str, ...]
    centres: tuple[float, ...]
    floor: Estimate | None
    scales: tuple[Estimate, ...]
    exponents: tuple[Estimate, ...]
    error: float
    at_edge: bool
    band: tuple[tuple[float, float, float, float], ...] = ()

    def predict(self, *x: float) -> float:
        """The fitted value at x, one for each variable."""
        total = self.floor.mean if self.floor else 0.0
        for value, centre, scale, exponent in zip(x, self.centres, self.scales, self.exponents, strict=True):
            total += scale.mean * (value / centre) ** -exponent.mean
        return total


def fit_power_law(variable: str, x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> PowerLaw | None:
    """The law of y over one variable.

    None where x has fewer than three distinct values or spans less than a factor of two, or y does not fall with it.
    """
    if not _carries(x):
        return None
    grid = [(a,) for a in EXPONENTS]
    return _fit((variable,), np.array([x], float), np.array(y, float), grid, len(set(x)) >= FOR_FLOOR, seed)


def fit_joint(
    variables: tuple[str, str], first: Sequence[float], second: Sequence[float], y: Sequence[float], *, seed: int = 0
) -> PowerLaw | None:
    """The law of y over two variables; None where either is too few or too narrow, as above, or there are fewer
    than six points, or y does not fall."""
    if not _carries(first) or not _carries(second) or len(y) < 6:
        return None
    grid = [(a, b) for a in JOINT_EXPONENTS for b in JOINT_EXPONENTS]
    return _fit(variables, np.array([first, second], float), np.array(y, float), grid, True, seed)


def _carries(x: Sequence[float]) -> bool:
    return len(set(x)) >= FOR_POWER and max(x) >= LEAST_RANGE * min(x)


def _fit(variables: tuple[str, ...], x: Array, y: Array, grid: Grid, floor: bool, seed: int) -> PowerLaw | None:
    """x: [variables, n]. y: [n]. None where y does not fall with x."""
    rng = np.random.default_rng(seed)
    if len(y) > MOST_POINTS:
        chosen = rng.choice(len(y), MOST_POINTS, replace=False)
        x, y = x[:, chosen], y[chosen]
    centres = np.exp(np.log(x).mean(1))
    relative = x / centres[:, None]
    (best,), (parts,) = _search(relative, y[None], grid, floor)
    if not parts[1:].any():
        return None
    exponent = grid[best]
    # Closer than the grid: two finer ones around its best place.
    for reach in REACHES:
        steps = [np.geomspace(value / reach, value * reach, 21) for value in exponent]
        fine = list(itertools.product(*steps))
        (closest,), (parts,) = _search(relative, y[None], fine, floor)
        exponent = fine[closest]
    residuals = y - _predict(relative, np.array(exponent), parts)
    if (residuals**2).sum() >= ((y - y.mean()) ** 2).sum():
        return None
    # Residuals of a fit are smaller than the noise by the parameters it has used up.
    used = int(floor) + 2 * len(variables)
    spread = residuals * np.sqrt(len(y) / max(len(y) - used, 1))
    drawn = (y - residuals) + rng.choice(spread - spread.mean(), size=(DRAWS, len(y)))
    places, drawn_parts = _search(relative, drawn, grid, floor)
    falling = drawn_parts[:, 1:].any(1)
    exponents, drawn_parts = np.array([grid[i] for i in places])[falling], drawn_parts[falling]

    def estimate(value: float, draws: Array) -> Estimate:
        low, high = np.percentile(draws, [2.5, 97.5])
        return Estimate(float(value), len(y), float(low), float(high), "resampling")

    return PowerLaw(
        variables,
        tuple(float(c) for c in centres),
        estimate(parts[0], drawn_parts[:, 0]) if floor else None,
        tuple(estimate(parts[i + 1], drawn_parts[:, i + 1]) for i in range(len(variables))),
        tuple(estimate(exponent[i], exponents[:, i]) for i in range(len(variables))),
        float(np.sqrt(np.mean(residuals**2))),
        any(value in (grid[0][i], grid[-1][i]) for i, value in enumerate(grid[best])),
        _band(relative[0], centres[0], parts, exponent[0], drawn_parts, exponents[:, 0]) if len(variables) == 1 else (),
    )


def _band(
    relative: Array, centre: float, parts: Array, exponent: float, drawn_parts: Array, exponents: Array
) -> tuple[tuple[float, float, float, float], ...]:
    at = np.geomspace(relative.min(), relative.max(), BAND_POINTS)
    drawn = drawn_parts[:, :1] + drawn_parts[:, 1:] * at ** -exponents[:, None]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    fitted = parts[0] + parts[1] * at**-exponent
    return tuple(zip((at * centre).tolist(), low.tolist(), fitted.tolist(), high.tolist(), strict=True))


def _search(x: Array, y: Array, grid: Grid, floor: bool) -> tuple[Array, Array]:
    """For each row of y [draws, n]: the place in the grid with the least squared error, and [floor, scales] there."""
    draws, n = y.shape
    least = np.full(draws, np.inf)
    places = np.zeros(draws, int)
    parts = np.zeros((draws, len(x) + 1))
    y = y.astype(float)
    total = (y**2).sum(1)
    for place, exponents in enumerate(grid):
        terms = x ** -np.array(exponents)[:, None]
        for with_floor in (True, False) if floor else (False,):
            design = np.vstack([np.ones((1, n)), terms]) if with_floor else terms
            q, r = np.linalg.qr(design.T)
            along = q.T @ y.T
            # What the design does not explain; the difference of squares is exact enough for a comparison.
            errors = total - (along**2).sum(0)
            solved = np.linalg.solve(r, along)
            # Loss falls with size and never below zero: what breaks that is no solution.
            better = (errors < least) & (solved >= 0).all(0)
            least[better], places[better] = errors[better], place
            parts[better, 0] = solved[0, better] if with_floor else 0.0
            parts[np.ix_(better, range(1, len(x) + 1))] = solved[-len(x) :, better].T
    return places, parts


def _predict(x: Array, exponents: Array, parts: Array) -> Array:
    return parts[0] + (parts[1:, None] * x ** -exponents[:, None]).sum(0)
