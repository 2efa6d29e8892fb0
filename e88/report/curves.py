"""Curves of a comparison as data: smoothed, averaged over seeds, with the range of axes that shows what matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e88.report.compare import Comparison, Group, Record, dig, number

Array = NDArray[np.float64]
# Where the axes start, as a share of the shortest run: what lies before is the first noisy steps.
START = 0.05
# Of more models the best are drawn: each takes kilobytes, and more lines show nothing.
MOST_LINES = 40
GRID = 240


@dataclass(frozen=True)
class Curve:
    """A line x -> y, with the range [low, high] over seeds where it is the mean of several."""

    group: Group
    x: Array
    y: Array
    low: Array
    high: Array
    seeds: int
    diverged: bool = False


@dataclass(frozen=True)
class Measure:
    """What a curve shows. source: the record's list of points; key: its y; factor: what a run's y is multiplied by."""

    source: str
    key: str
    title: str
    factor: Callable[[Record], float] = lambda run: 1.0


def _bits_per_byte(run: Record) -> float:
    return 1 / (math.log(2) * (number(run, "data", "bytes_per_token") or 1.0))


LOSS = Measure("curve", "loss", "training loss, nats per token")
LOSS_BPB = Measure("curve", "loss", "training loss, bits per byte", _bits_per_byte)
HELDOUT = Measure("heldout_curve", "bpb", "held-out bits per byte")
BY_POSITION = Measure("heldout_by_position", "bpb", "held-out bits per byte")


def has_heldout_curves(comparison: Comparison) -> bool:
    """Whether some run was evaluated on the way, and not only at its end."""
    return any(len(dig(run, "heldout_curve") or ()) > 1 for run in comparison.runs)


def comparison_curves(comparison: Comparison, measure: Measure, x_key: str) -> list[Curve]:
    """For each group the mean curve of the seeds that are done, then each diverged run's own curve.

    x_key: a key of the points of a curve, or "flops": training compute up to there. Of many groups the best are taken.
    """
    curves = []
    for group in comparison.groups[:MOST_LINES]:
        points = [line for run in group.done if len((line := _points(run, measure, x_key))[0])]
        if points:
            curves.append(_mean_curve(group, points))
        for run in group.runs:
            if run.get("status") == "diverged":
                x, y = _points(run, measure, x_key)
                if len(x):
                    curves.append(Curve(group, x, y, y, y, 1, diverged=True))
    return curves


def _points(run: Record, measure: Measure, x_key: str) -> tuple[Array, Array]:
    # Where the FLOPs of a token are not known nothing is left of a curve against compute.
    key, unit = ("tokens", number(run, "model", "flops_per_token") or 0.0) if x_key == "flops" else (x_key, 1.0)
    points = (dig(run, measure.source) or ()) if unit > 0 else ()
    rows = [(number(point, key), number(point, measure.key)) for point in points]
    kept = sorted((x, y) for x, y in rows if x is not None and y is not None and x > 0)
    x, y = np.array([row[0] for row in kept]) * unit, np.array([row[1] for row in kept]) * measure.factor(run)
    return x, smooth(y, len(y) // 40) if measure.source == "curve" else y


def smooth(y: Array, half: int) -> Array:
    """The mean over up to `half` neighbours on either side; as many before as after near the start, so that a steep
    first fall stays in place."""
    if half < 1:
        return y
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    first, last = np.maximum(i - half, 0), np.minimum(np.minimum(i + half, 2 * i) + 1, len(y))
    return np.asarray((total[last] - total[first]) / (last - first))


def _mean_curve(group: Group, lines: Sequence[tuple[Array, Array]]) -> Curve:
    if len(lines) == 1:
        x, y = lines[0]
        return Curve(group, x, y, y, y, 1)
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    # Seeds cover about the same range, but for single points, which stand for themselves.
    x = np.geomspace(start, end, GRID) if start < end else np.array([float(np.mean([x[-1] for x, _ in lines]))])
    if max(len(line) for line, _ in lines) <= GRID // 4 and start < end:
        x = np.unique(np.clip(np.concatenate([line for line, _ in lines]), start, end))
    every = np.array([np.interp(x, line, y) for line, y in lines])
    return Curve(group, x, every.mean(0), every.min(0), every.max(0), len(lines))


def axis_ranges(curves: Sequence[Curve]) -> tuple[tuple[float, float], tuple[float, float]]:
    """(low, high) of x, for a logarithmic axis, and of y.

    Both leave out the first steps: x starts at 5 % of the shortest finished run (or at the first point there is), and y
    ends where the curves are by 10 %. A diverged run is drawn but decides neither.
    """
    ruling = [curve for curve in curves if not curve.diverged] or list(curves)
    high = max(float(curve.x[-1]) for curve in ruling)
    shortest = min(float(curve.x[-1]) for curve in ruling)
    low = max(START * shortest, min(float(curve.x[0]) for curve in ruling))
    if high / low < 1.2:
        low, high = low / 1.5, high * 1.5
    tops = [float(np.interp(2 * START * curve.x[-1], curve.x, curve.high)) for curve in ruling]
    tops += [float(curve.high[-1]) for curve in ruling]
    bottom = min(float(curve.low.min()) for curve in ruling)
    top = max(max(tops), bottom)
    if all(curve.diverged for curve in ruling):
        # Nothing but blown-up curves: show where they started from.
        top = bottom + 2 * max(float(np.median(curve.y)) - bottom for curve in ruling)
    pad = 0.04 * (top - bottom) or 0.02 * abs(bottom) or 1.0
    return (low, high), (bottom - pad, top + pad)
