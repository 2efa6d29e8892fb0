"""Figures of one quantity along which models differ: quality or speed against it, and the fitted scaling laws."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from e88.report.compare import Comparison, Group, is_number
from e88.report.points import SCORE, point_scales
from e88.report.style import Style, draw_marker
from e88.report.svg import HEIGHT, LABEL_WIDTH, WIDTH, Box, Canvas, Figure, shorten, spread_labels, text_width
from e88.study.findings import ScalingLaw
from e88.study.statistics import Estimate, mean_interval

# What a sweep may be over, the most telling first, and how much the parameters may differ on the way.
QUANTITIES = {
    "n_state": "n_state (rows of a head's state)",
    "dim": "dim (width of the model)",
    "depth": "depth, layers",
    "n_heads": "heads",
    "params": "parameters",
}
SAME_SIZE = 1.5
FEWEST = 3
SPEED = "training tokens per second"
LAW_TITLES = {"params": "parameters", "tokens": "training tokens", "FLOPs": "training compute, FLOPs"}


@dataclass(frozen=True)
class Sweep:
    """Models of one kind along one quantity, each at a value of its own. speed: judged by throughput, not quality."""

    quantity: str
    members: tuple[tuple[float, Group], ...]
    speed: bool = False


def find_sweeps(comparison: Comparison, sets: Sequence[tuple[Collection[str], bool]]) -> list[Sweep]:
    """The sweeps among sets of models (labels, and whether speed is what matters), each once, without the smaller of
    two that are the same line."""
    found: list[Sweep] = []
    for labels, speed in sets:
        groups = [group for group in comparison.groups if group.label in labels and group.done]
        for kind in dict.fromkeys(group.kind for group in groups):
            sweep = _sweep([group for group in groups if group.kind == kind], speed)
            if sweep and not any(_covers(other, sweep) for other in found):
                found = [other for other in found if not _covers(sweep, other)] + [sweep]
    return found


def _covers(one: Sweep, other: Sweep) -> bool:
    same = one.quantity == other.quantity and one.speed == other.speed
    return same and {group.label for _, group in one.members} >= {group.label for _, group in other.members}


def _sweep(groups: Sequence[Group], speed: bool) -> Sweep | None:
    """Along the first quantity in which the groups differ; None where two of them share a value of it."""
    sizes = [group.mean("model", "params") or 0.0 for group in groups]
    if len(groups) < FEWEST or min(sizes) <= 0:
        return None
    same_size = max(sizes) <= SAME_SIZE * min(sizes)
    for quantity in QUANTITIES if same_size else ("params",):
        values = [_value(group, quantity) for group in groups]
        known = [value for value in values if value is not None and value > 0]
        if len(known) < len(groups) or len(set(known)) == 1:
            continue
        if len(set(known)) < len(groups):
            return None
        return Sweep(quantity, tuple(sorted(zip(known, groups, strict=True), key=lambda pair: pair[0])), speed)
    return None


def _value(group: Group, quantity: str) -> float | None:
    if quantity == "params":
        return group.mean("model", "params")
    model = (group.runs[0].get("config") or {}).get("model") or {}
    value = model.get(quantity, (model.get("mixer") or {}).get(quantity))
    return None if value is None or not is_number(value) else float(value)


def sweep_figure(sweep: Sweep, look: Mapping[str, Style]) -> Figure | None:
    """The mean of each model with its 95 % interval as a band, and every seed."""
    path = ("results", "tokens_per_second") if sweep.speed else ("results", "heldout_bpb")
    rows = [(at, group, group.by_seed(*path)) for at, group in sweep.members]
    points = [(at, group, values, _estimate(group, values, sweep.speed)) for at, group, values in rows if values]
    if len(points) < FEWEST:
        return None
    name = QUANTITIES[sweep.quantity].split(" (")[0].split(",")[0]
    title = f"{'Training speed' if sweep.speed else 'Held-out bits per byte'} against {name}"
    canvas = Canvas(WIDTH, HEIGHT, title)
    box = Box(52, 30, WIDTH - 18, HEIGHT - 44)
    x, y = point_scales([at for at, *_ in points], [estimate for *_, estimate in points], box)
    ticks = [at for at, *_ in points] if sweep.quantity != "params" else ()
    canvas.axes(box, x, y, QUANTITIES[sweep.quantity], f"{SPEED} (median)" if sweep.speed else SCORE, ticks)
    style = look[points[0][1].label]
    canvas.group(style.light, style.dark, title)
    canvas.clip(box)
    band = [(x(at), e.low, e.high) for at, _, _, e in points if e.low is not None and e.high is not None]
    over_seeds = all(len(values) > 1 for _, _, values, _ in points)
    if over_seeds:
        upper, lower = [(at, y(high)) for at, _, high in band], [(at, y(low)) for at, low, _ in band]
        canvas.path([*upper, *reversed(lower)], "band", closed=True)
    canvas.end_clip()
    canvas.path([(x(at), y(estimate.mean)) for at, _, _, estimate in points], "line")
    canvas.end()
    for at, group, values, estimate in points:
        canvas.group(style.light, style.dark, f"{group.label}: {estimate.mean:.5g}")
        for value in values.values() if len(values) > 1 else ():
            draw_marker(canvas, style, x(at), y(value), 3, "hollow")
        draw_marker(canvas, style, x(at), y(estimate.mean))
        canvas.end()
    names = ", ".join(group.label for _, group, *_ in points)
    told = "One seed: no band."
    if over_seeds:
        told = "Line: mean over seeds; band: its 95 % interval, cut where it leaves the figure; hollow: each seed."
    return Figure(title, canvas.markup(), f"{told} Models: {names}.")


def _estimate(group: Group, values: Mapping[int, float], speed: bool) -> Estimate:
    if speed or group.bpb is None:
        return mean_interval(list(values.values()))
    return group.bpb


def law_figure(title: str, laws: Sequence[ScalingLaw], points: Mapping[str, Sequence[tuple[float, float]]],
               look: Mapping[str, Style]) -> Figure:  # fmt: skip
    """Laws over one variable, a line with a 95 % band for each kind of model, among the runs they were fitted to.

    points, look: by kind.
    """
    shown = [point for scaling in laws for point in points[scaling.kind]]
    variable = laws[0].law.variables[0]
    canvas = Canvas(WIDTH, HEIGHT, title)
    room = min(LABEL_WIDTH, max(text_width(scaling.kind) for scaling in laws)) + 24
    box = Box(52, 30, WIDTH - room, HEIGHT - 44)
    estimates = [Estimate(loss, 1) for _, loss in shown]
    x, y = point_scales([at for at, _ in shown], estimates, box)
    canvas.axes(box, x, y, LAW_TITLES[variable], SCORE)
    # Each label beside the end of its line.
    ends = [y(scaling.law.band[-1][2]) for scaling in laws]
    heights = spread_labels([min(max(end, box.top), box.bottom) for end in ends], box.top, box.bottom)
    for scaling, height in zip(laws, heights, strict=True):
        style, band = look[scaling.kind], scaling.law.band
        canvas.group(style.light, style.dark, scaling.kind)
        canvas.clip(box)
        upper, lower = [(x(at), y(high)) for at, _, _, high in band], [(x(at), y(low)) for at, low, _, _ in band]
        canvas.path([*upper, *reversed(lower)], "band", closed=True)
        canvas.path([(x(at), y(mean)) for at, _, mean, _ in band], "line")
        canvas.end_clip()
        for at, loss in points[scaling.kind]:
            draw_marker(canvas, style, x(at), y(loss), 3, "hollow")
        end = min(max(y(band[-1][2]), box.top), box.bottom)
        canvas.path([(x(band[-1][0]) + 4, end), (box.right, end), (box.right + 10, height)], "leader")
        canvas.end()
        canvas.text(box.right + 14, height, shorten(scaling.kind, room - 14), full=scaling.kind)
    return Figure(title, canvas.markup(), "Line: the fitted law; band: 95 % of refits; hollow: each run.")
