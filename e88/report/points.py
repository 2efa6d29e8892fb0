"""Figures of one mark for each model: scores with intervals, speeds as bars, scores against state size and speed."""

from __future__ import annotations

from collections.abc import Sequence

from e88.report.compare import Comparison, Group, count, dig, pair
from e88.report.style import Style, draw_marker
from e88.report.svg import HEIGHT, LABEL_WIDTH, LINE, WIDTH, Box, Canvas, Figure, Scale, shorten, text_width
from e88.report.tables import SPEED
from e88.study.frontier import Place, Point, frontier
from e88.study.statistics import Estimate, median_spread

ROW = 24.0
SCORE = "held-out bits per byte (lower is better)"
# Where a label may stand around its point, best first: direction across and down, with the text's anchor.
_PLACES = ((1, 0, "start"), (-1, 0, "end"), (0, -1, "middle"), (0, 1, "middle"),
           (1, -1, "start"), (1, 1, "start"), (-1, -1, "end"), (-1, 1, "end"))  # fmt: skip
_FAR = (1.0, 2.2)
_LABELS = 20
_X_TITLES = {
    "state": "state per layer, elements",
    "speed": "training tokens per second (median of steady steps)",
}
# Of more models the best are drawn, in figures with a row for each and with a point for each.
_MOST_ROWS, _MOST_POINTS = 40, 300


def interval_figure(comparison: Comparison, look: dict[str, Style]) -> Figure | None:
    """Held-out bits per byte of each model, best first: every seed, the mean, its 95 % interval."""
    scores = {group.label: group.bpb for group in comparison.ranked}
    if not scores:
        return None
    groups = comparison.groups[:_MOST_ROWS]
    low, high = _score_range([score for group in groups if (score := scores.get(group.label))])
    canvas, box = _rows_canvas("Held-out bits per byte of each model", groups, right=64)
    x = Scale(low, high, box.left, box.right)
    canvas.axes(box, x, None, SCORE)
    for row, group in enumerate(groups):
        y = box.top + ROW * (row + 0.5)
        _row_label(canvas, box, y, group)
        score = scores.get(group.label)
        if score is None:
            canvas.text((box.left + box.right) / 2, y, group.status, anchor="middle", css="soft halo")
            continue
        style = look[group.label]
        canvas.group(style.light, style.dark, group.label)
        if score.low is not None and score.high is not None:
            _interval(canvas, x, y, score.low, score.high)
        if score.n > 1:
            for value in group.by_seed("results", "heldout_bpb").values():
                draw_marker(canvas, style, x(value), y, 3, "hollow")
        draw_marker(canvas, style, x(score.mean), y, 5)
        canvas.end()
        canvas.text(box.right + 8, y, f"{score.mean:.4f}")
    several = any(score.n > 1 for score in scores.values() if score)
    single = any(score.n == 1 for score in scores.values() if score)
    notes = ["Filled: mean over seeds; hollow: each seed; line: 95 % interval over seeds."] if several else []
    if single:
        notes.append("With one seed the line is the interval over held-out windows, which says nothing of other seeds.")
    return Figure("Held-out bits per byte", canvas.markup(), " ".join(notes + _left_out(comparison)))


def _interval(canvas: Canvas, x: Scale, y: float, low: float, high: float) -> None:
    left, right = max(x(low), x.start), min(x(high), x.end)
    canvas.line(left, y, right, y, "line")
    for at, inside, way in ((left, x.holds(low), -1), (right, x.holds(high), 1)):
        if inside:
            canvas.line(at, y - 4, at, y + 4, "line")
        else:
            canvas.path([(at - 5 * way, y - 4), (at, y), (at - 5 * way, y + 4)], "line")


def throughput_figure(comparison: Comparison, look: dict[str, Style]) -> Figure | None:
    """Training tokens per second as bars, with the spread of steady steps and the ratio to the fastest."""
    speeds = {}
    groups = comparison.groups[:_MOST_ROWS]
    for group in groups:
        values = _speeds(group)
        if values:
            ranges = [pair(run, "results", "tokens_per_second_spread") for run in group.done]
            speeds[group.label] = median_spread(values, [spread for spread in ranges if spread])
    if not speeds:
        return None
    fastest = max(speed.median for speed in speeds.values())
    canvas, box = _rows_canvas("Training tokens per second of each model", groups, right=104)
    x = Scale(0, max(max(speed.high for speed in speeds.values()), fastest) * 1.02, box.left, box.right)
    canvas.axes(box, x, None, "training tokens per second (median of steady steps)")
    for row, group in enumerate(groups):
        y = box.top + ROW * (row + 0.5)
        _row_label(canvas, box, y, group)
        speed = speeds.get(group.label)
        if speed is None:
            canvas.text(box.left + 8, y, group.status, css="soft halo")
            continue
        style = look[group.label]
        canvas.group(style.light, style.dark, group.label)
        canvas.path(
            [(box.left, y - 7), (x(speed.median), y - 7), (x(speed.median), y + 7), (box.left, y + 7)],
            "bar", closed=True,
        )  # fmt: skip
        canvas.end()
        canvas.line(x(speed.low), y, x(speed.high), y, "whisker")
        canvas.text(box.right + 8, y, f"{count(speed.median)} · {speed.median / fastest:.2f}×")
    notes = ["Line: 10th to 90th percentile of the steps. × is the ratio to the fastest: speeds are ratios on one "
             "machine, not figures for others."]  # fmt: skip
    return Figure("Training speed", canvas.markup(), " ".join(notes + _left_out(comparison)))


def _left_out(comparison: Comparison, most: int = _MOST_ROWS) -> list[str]:
    count = len(comparison.groups)
    return [f"The best {most} of {count} models; the table has all."] if count > most else []


def _speeds(group: Group) -> list[float]:
    return [speed for speed in group.by_seed(*SPEED).values() if speed > 0]


def _rows_canvas(label: str, groups: Sequence[Group], right: float) -> tuple[Canvas, Box]:
    left = 12 + min(LABEL_WIDTH, max(text_width(group.label) for group in groups))
    height = ROW * len(groups)
    return Canvas(WIDTH, height + 54, label), Box(left, 8, WIDTH - right, 8 + height)


def _row_label(canvas: Canvas, box: Box, y: float, group: Group) -> None:
    canvas.text(box.left - 8, y, shorten(group.label, LABEL_WIDTH), anchor="end", full=group.label)


def scatter_figure(comparison: Comparison, look: dict[str, Style], against: str) -> Figure | None:
    """One point for each model with a score; against: "state" (elements per layer) or "speed" (tokens per second)."""
    points: list[tuple[Group, float, Estimate]] = []
    absent = []
    for group in comparison.ranked[:_MOST_POINTS]:
        value, score = _position(group, against), group.bpb
        if value and value > 0 and score:
            points.append((group, value, score))
        else:
            absent.append(group.label)
    # One point relates to nothing.
    if len(points) < 2:
        return None
    title = "Held-out bits per byte against " + ("state size" if against == "state" else "training speed")
    canvas = Canvas(WIDTH, HEIGHT, title)
    box = Box(52, 30, WIDTH - 18, HEIGHT - 44)
    x, y = point_scales([value for _, value, _ in points], [score for _, _, score in points], box)
    canvas.axes(box, x, y, _X_TITLES[against], SCORE)
    places = _frontier(points, against)
    corners = [(x(abs(place.cost)), y(place.loss)) for place in places if place.on_frontier]
    _draw_frontier(canvas, corners, box.top, box.right if against == "state" else box.left)
    certainly_off = {place.name for place in places if not place.on_frontier and place.decided}
    for group, at, score in points:
        style = look[group.label]
        canvas.group(style.light, style.dark, f"{group.label}: {score.mean:.4f} bits per byte")
        if score.low is not None and score.high is not None:
            canvas.clip(box)
            canvas.line(x(at), y(score.low), x(at), y(score.high), "faint")
            canvas.end_clip()
        draw_marker(canvas, style, x(at), y(score.mean), css="hollow" if group.label in certainly_off else "mark")
        canvas.end()
    unnamed = _label_points(canvas, box, [(group, x(at), y(score.mean)) for group, at, score in points])
    less = "a smaller state" if against == "state" else "more speed"
    notes = [f"Line: 95 % interval. Dashed: the frontier, where nothing with {less} is better."]
    if certainly_off:
        notes.append("Hollow: off it for certain (paired 95 % interval over seeds).")
    elif any(not place.on_frontier for place in places):
        notes.append("No model is off it for certain (paired 95 % interval over seeds).")
    if against == "state" and any(_has_attention(group) for group, _, _ in points):
        notes.append("The state of attention is its cache of one window; the others' does not grow.")
    if absent:
        what = "a known state" if against == "state" else "a measured speed"
        notes.append(f"Without {what}, and so not shown: {', '.join(absent)}.")
    if unnamed:
        notes.append("Where labels would overlap, some points go without; point at one for its name.")
    return Figure(title, canvas.markup(), " ".join(notes + _left_out(comparison, _MOST_POINTS)))


def _has_attention(group: Group) -> bool:
    """In all of its blocks, or in some."""
    return "attention" in (dig(group.runs[0], "config", "model", mixer, "kind") for mixer in ("mixer", "hybrid"))


def _frontier(points: Sequence[tuple[Group, float, Estimate]], against: str) -> list[Place]:
    """Costs of speed are its negative: less is better."""
    sign = 1 if against == "state" else -1
    return frontier([Point(group.label, sign * at, group.by_seed("results", "heldout_bpb")) for group, at, _ in points])


def _draw_frontier(canvas: Canvas, corners: Sequence[tuple[float, float]], top: float, costly: float) -> None:
    """A staircase through the corners, cheapest first, from the top of the figure to its costly side."""
    stairs = [(corners[0][0], top)]
    for at, height in corners:
        stairs += [(at, stairs[-1][1]), (at, height)]
    canvas.path([*stairs, (costly, stairs[-1][1])], "frontier")


def _position(group: Group, against: str) -> float | None:
    if against == "state":
        return group.mean("model", "state_per_layer")
    values = _speeds(group)
    return median_spread(values).median if values else None


def point_scales(values: Sequence[float], scores: Sequence[Estimate], box: Box) -> tuple[Scale, Scale]:
    """Scales for points at `values` (logarithmic where they span much) with scores and their intervals, in a box."""
    low, high = min(values), max(values)
    log = high / low > 4
    pad = (high / low) ** 0.12 if log else 0.15 * (high - low)
    if log:
        x = Scale(low / pad, high * pad, box.left, box.right, log=True)
    else:
        pad = pad or 0.2 * high
        x = Scale(max(low - pad, 0.0), high + pad, box.left, box.right)
    return x, Scale(*_score_range(scores), box.bottom, box.top)


def _score_range(scores: Sequence[Estimate]) -> tuple[float, float]:
    """The range of an axis that holds the means and their intervals.

    An interval over two seeds can be wider than all else together. So intervals may widen the axis on either side by as
    much as the means span (or by the narrowest of them), and are cut off beyond.
    """
    low, high = min(s.mean for s in scores), max(s.mean for s in scores)
    intervals = [(s.low, s.high) for s in scores if s.low is not None and s.high is not None]
    narrowest = min((end - start for start, end in intervals), default=0.0)
    reach = max(high - low, narrowest, 0.002 * abs(high))
    lower = max(min([low, *(start for start, _ in intervals)]), low - reach)
    upper = min(max([high, *(end for _, end in intervals)]), high + reach)
    return lower - 0.06 * reach, upper + 0.06 * reach


def _label_points(canvas: Canvas, box: Box, points: Sequence[tuple[Group, float, float]]) -> int:
    """Name each point where there is room, best first, further off with a thin line; the number left unnamed."""
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for _, x, y in points]
    unnamed = len(points[_LABELS:])
    for group, x, y in points[:_LABELS]:
        label = shorten(group.label, LABEL_WIDTH)
        for far, across, down, anchor in ((far, *place) for far in _FAR for place in _PLACES):
            at = (x + across * 10 * far, y + down * 13 * far)
            place = _label_box(*at, text_width(label), anchor)
            if place.inside(box) and not any(place.overlaps(other) for other in taken):
                taken.append(place)
                if far > 1:
                    canvas.line(x, y, at[0] - across, at[1] - down * 7, "axis", ' stroke-opacity=".6"')
                canvas.text(*at, label, anchor=anchor, css="halo", full=group.label)
                break
        else:
            unnamed += 1
    return unnamed


def _label_box(x: float, y: float, width: float, anchor: str) -> Box:
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return Box(left, y - LINE / 2, left + width, y + LINE / 2)
