"""The picture of a hardware profile: time per token against n_state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from e88.report.svg import Box, Canvas, Scale, shorten, spread_labels

WIDTH, HEIGHT = 760.0, 420.0
# Light and dark, as in the other figures: E88's vermilion, and a blue.
LINES = {
    "forward_backward_ns": ("forward + backward", "#c8500a", "#ff8a45"),
    "forward_ns": ("forward", "#0067a5", "#56b4e9"),
}
BAND = ("#59636e", "#aab4bf")


def profile_figure(profile: Mapping[str, Any], recommended: tuple[int, int]) -> str:
    """A standalone SVG for light and dark themes: nanoseconds per token of one layer against n_state, as if every
    n_state filled d_inner whole, with the recommended n_state marked."""
    rows = [row for row in profile["rows"] if row["skipped"] is None]
    lines = {key: [row[key] * profile["d_inner"] / row["d_inner"] for row in rows] for key in LINES}
    states = [row["n_state"] for row in rows]
    canvas = Canvas(WIDTH, HEIGHT, "Time of the recurrence per token against n_state")
    canvas.text(16, 26, "Time of the recurrence against the size of its state", css="title")
    told = (
        f"{profile['device']}, {profile['dtype']}, {profile['batch_size']} × {profile['window']} tokens, one layer of "
        f"d_inner {profile['d_inner']:,}, {profile['date'][:10]}"
    )
    canvas.text(16, 48, shorten(told, WIDTH - 32), css="soft")
    box = Box(66, 96, WIDTH - 148, HEIGHT - 50)
    x = Scale(0, max(states) * 1.04, box.left, box.right)
    y = Scale(0, max(max(times) for times in lines.values()) * 1.06, box.bottom, box.top)
    _band(canvas, box, x, recommended)
    canvas.axes(box, x, y, "n_state (rows of a head's state; heads × n_state stays the same)", "ns per token and layer")
    heights = spread_labels([y(times[-1]) for times in lines.values()], box.top, box.bottom)
    for (key, (name, light, dark)), height in zip(LINES.items(), heights, strict=True):
        canvas.group(light, dark, name)
        canvas.path([(x(n), y(time)) for n, time in zip(states, lines[key], strict=True)], "line")
        for n, time in zip(states, lines[key], strict=True):
            canvas.add(f'<circle cx="{x(n):.1f}" cy="{y(time):.1f}" r="3.5" class="mark"/>')
        canvas.end()
        canvas.text(box.right + 10, height, name)
    return canvas.markup(standalone=True, caption=_caption(states, lines["forward_backward_ns"], recommended))


def _band(canvas: Canvas, box: Box, x: Scale, recommended: tuple[int, int]) -> None:
    low, high = recommended
    left, right = x(low) - 6, x(high) + 6
    name = f"best n_state {low}" if low == high else f"best n_state {low} to {high}"
    canvas.group(*BAND, name)
    canvas.path([(left, box.top), (right, box.top), (right, box.bottom), (left, box.bottom)], "band", closed=True)
    canvas.end()
    beside, anchor = (right + 6, "start") if right < (box.left + box.right) / 2 else (left - 6, "end")
    canvas.text(beside, box.top + 10, name, anchor=anchor, css="soft halo")


def _caption(states: Sequence[int], times: Sequence[float], recommended: tuple[int, int]) -> str:
    told = "; ".join(f"n_state {n}: {time:.1f} ns" for n, time in zip(states, times, strict=True))
    return f"Forward and backward per token and layer: {told}. Recommended: {recommended[0]} to {recommended[1]}."
