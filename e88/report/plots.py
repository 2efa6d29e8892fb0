"""The figures of a comparison: curves against time, tokens, FLOPs and position, and the one picture of it all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e88.errors import UserError
from e88.files import write_text
from e88.report.compare import Comparison, Record, comparisons
from e88.report.curves import (
    BY_POSITION,
    HELDOUT,
    LOSS,
    LOSS_BPB,
    MOST_LINES,
    Curve,
    Measure,
    axis_ranges,
    comparison_curves,
    has_heldout_curves,
)
from e88.report.headline import headline
from e88.report.points import interval_figure, scatter_figure, throughput_figure
from e88.report.style import Style, draw_marker, styles
from e88.report.svg import HEIGHT, LABEL_WIDTH, WIDTH, Box, Canvas, Figure, Scale, shorten, spread_labels, text_width

LABELS = 14
X_TITLES = {"seconds": "training time, seconds", "tokens": "training tokens", "flops": "training compute, FLOPs",
            "position": "tokens of the window so far"}  # fmt: skip


def figures(comparison: Comparison, timed: bool = True) -> list[Figure]:
    """Every figure that the records of a comparison can fill, the plainest first.

    timed: whether its runs had their processor to themselves; without, nothing is shown against time or speed.
    """
    look = styles(comparison.groups)
    found = [interval_figure(comparison, look), throughput_figure(comparison, look) if timed else None]
    if has_heldout_curves(comparison):
        key, name = ("seconds", "time") if timed else ("tokens", "tokens")
        found.append(curve_figure(comparison, look, HELDOUT, key, f"Held-out bits per byte against {name}"))
    for key, name in (("seconds", "time"), ("tokens", "tokens"), ("flops", "compute"))[0 if timed else 1 :]:
        found.append(curve_figure(comparison, look, LOSS, key, f"Training loss against {name}"))
    found.append(curve_figure(comparison, look, BY_POSITION, "position", "Held-out bits per byte along the window"))
    found.append(scatter_figure(comparison, look, "state"))
    found.append(scatter_figure(comparison, look, "speed") if timed else None)
    return [figure for figure in found if figure is not None]


def write_figure(records: Sequence[Record], path: str | os.PathLike[str], by: str = "time") -> Path:
    """Write the picture of a comparison as a standalone SVG for light and dark themes: bits per byte against time.

    It shows the largest comparison among the records: held-out bits per byte where the runs were evaluated on the way,
    else those of training. by: `time`, or `position`: held-out bits per byte along the window. Raises UserError where
    there is nothing to draw or the file cannot be written.
    """
    comparison = comparisons(records)[0]
    if by == "position":
        measure, x_key, against = BY_POSITION, "position", "along the window"
    else:
        measure = HELDOUT if has_heldout_curves(comparison) else LOSS_BPB
        x_key, against = "seconds", "against training time"
    curves = comparison_curves(comparison, measure, x_key)
    if not curves:
        raise UserError("no run has a curve to draw; report runs that finished")
    width, height = 860.0, 450.0
    title = f"{measure.title[0].upper()}{measure.title[1:]} {against}"
    canvas = Canvas(width, height, title)
    canvas.text(16, 26, title, css="title")
    fewest, most = min(curve.seeds for curve in curves), max(curve.seeds for curve in curves)
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    told = comparison.title + (f"; mean and range of {seeds}" if most > 1 else "; one seed")
    canvas.text(16, 48, shorten(told, width - 32), css="soft")
    look = styles(comparison.groups)
    draw_curves(canvas, curves, look, Box(62, 92, width - 12, height - 50), X_TITLES[x_key], measure.title)
    return write_text(path, canvas.markup(standalone=True, caption=headline(comparison)))


def curve_figure(
    comparison: Comparison, look: dict[str, Style], measure: Measure, x_key: str, title: str
) -> Figure | None:
    """Lines with a band over seeds and a label at each end."""
    curves = comparison_curves(comparison, measure, x_key)
    if not curves:
        return None
    canvas = Canvas(WIDTH, HEIGHT, title)
    draw_curves(canvas, curves, look, Box(44, 30, WIDTH, HEIGHT - 44), X_TITLES[x_key], measure.title)
    notes = []
    if any(curve.seeds > 1 for curve in curves):
        notes.append("Line: mean over seeds; band: from the lowest to the highest seed.")
    if measure.source == "curve":
        notes.append("Smoothed; the first 5 % is not shown.")
    if measure is BY_POSITION:
        notes.append("Each point: the tokens after the one before it. The first 5 % is not shown.")
    if any(curve.diverged for curve in curves):
        notes.append("Thin line ending in ×: a run that diverged.")
    if len(comparison.groups) > MOST_LINES:
        notes.append(f"The best {MOST_LINES} of {len(comparison.groups)} models.")
    return Figure(title, canvas.markup(), " ".join(notes))


def draw_curves(
    canvas: Canvas, curves: Sequence[Curve], look: dict[str, Style], area: Box, x_title: str, y_title: str
) -> None:
    """Curves with axes and end labels in `area`, whose left edge is the y axis."""
    # Among many models the best have names and decide the range of the axes; the others are drawn thin.
    named = [curve for curve in curves if not curve.diverged][:LABELS]
    known = {curve.group.label for curve in named}
    for curve in curves:
        if curve.group.label not in known and len(named) < LABELS:
            named.append(curve)
            known.add(curve.group.label)
    (x_low, x_high), (y_low, y_high) = axis_ranges(named)
    room = min(LABEL_WIDTH, max(text_width(curve.group.label) for curve in named)) + 30
    box = Box(area.left, area.top, area.right - room, area.bottom)
    x, y = Scale(x_low, x_high, box.left, box.right, log=True), Scale(y_low, y_high, box.bottom, box.top)
    canvas.axes(box, x, y, x_title, y_title)
    for curve in reversed(curves):
        style = look[curve.group.label]
        canvas.group(style.light, style.dark, curve.group.label + (" (diverged)" if curve.diverged else ""))
        _draw_curve(canvas, curve, style, box, x, y, curve.diverged or curve.group.label not in known)
        canvas.end()
    ends = [_end(curve, x, y, box) for curve in named]
    heights = spread_labels([end[1] for end in ends], box.top, box.bottom)
    for curve, end, height in zip(named, ends, heights, strict=True):
        style = look[curve.group.label]
        canvas.group(style.light, style.dark, curve.group.label)
        canvas.path([(end[0] + 6, end[1]), (box.right + 10, end[1]), (box.right + 20, height)], "leader")
        canvas.end()
        label = curve.group.label
        canvas.text(box.right + 24, height, shorten(label, room - 24), full=label)
    if hidden := len({curve.group.label for curve in curves} - known):
        canvas.text(area.right, area.top - 15, f"best {len(named)} named, {hidden} more thin", anchor="end", css="soft")


def _end(curve: Curve, x: Scale, y: Scale, box: Box) -> tuple[float, float]:
    last = len(curve.x) - 1
    # A curve that blew up ends, for the eye, where it leaves the picture for good.
    while curve.diverged and last > 0 and not y.holds(float(curve.y[last - 1])):
        last -= 1
    at, height = x(float(curve.x[last])), y(float(curve.y[last]))
    return min(max(at, box.left), box.right), min(max(height, box.top), box.bottom)


def _draw_curve(canvas: Canvas, curve: Curve, style: Style, box: Box, x: Scale, y: Scale, thin: bool) -> None:
    # One point to the left of the axis is enough for a line that enters there.
    first = max(int(np.searchsorted(curve.x, x.low)) - 1, 0)
    xs = [x(float(value)) for value in curve.x[first:]]
    canvas.clip(box)
    if curve.seeds > 1 and len(xs) > 1 and not thin:
        upper = [(at, y(float(value))) for at, value in zip(xs, curve.high[first:], strict=True)]
        lower = [(at, y(float(value))) for at, value in zip(xs, curve.low[first:], strict=True)]
        canvas.path([*upper, *reversed(lower)], "band", closed=True)
    line = [(at, y(float(value))) for at, value in zip(xs, curve.y[first:], strict=True)]
    if len(line) > 1:
        canvas.path(line, "faint" if thin else "line", "" if thin else style.dash)
    canvas.end_clip()
    at, height = _end(curve, x, y, box)
    if curve.diverged:
        canvas.path([(at - 4, height - 4), (at + 4, height + 4)], "line")
        canvas.path([(at - 4, height + 4), (at + 4, height - 4)], "line")
    elif not thin:
        draw_marker(canvas, style, at, height, 3.5)
