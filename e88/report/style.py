"""How each model is drawn: a colour and a marker for its kind, a tint and a dash for its place among that kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from e88.report.compare import Group
from e88.report.svg import Canvas

# Okabe and Ito's hues (told apart with any colour blindness), deepened for white paper and lifted for a dark one.
# E88 is always vermilion.
_COLOURS = {
    "e88": ("#c8500a", "#ff8a45"),
    "gated_deltanet": ("#0067a5", "#56b4e9"),
    "mamba2": ("#007d5c", "#2fcf9f"),
    "attention": ("#9c4079", "#e590c0"),
}
_OTHER = ("#59636e", "#aab4bf")
_MARKERS = {"e88": "circle", "gated_deltanet": "square", "mamba2": "triangle", "attention": "diamond"}
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_BACKDROPS = ("#ffffff", "#0f141b")
_PALEST = 0.5


@dataclass(frozen=True)
class Style:
    """Colours on a light and on a dark background, the dash pattern of lines, the shape of markers."""

    light: str
    dark: str
    dash: str
    marker: str


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """The style of each group, by label. Among several of a kind the best keeps the full colour and a solid line."""
    result = {}
    for kind in {group.kind for group in groups}:
        same = [group for group in groups if group.kind == kind]
        for rank, group in enumerate(same):
            tint = _PALEST * rank / (len(same) - 1) if len(same) > 1 else 0.0
            light, dark = (
                _mix(colour, backdrop, tint)
                for colour, backdrop in zip(_COLOURS.get(kind, _OTHER), _BACKDROPS, strict=True)
            )
            result[group.label] = Style(light, dark, _DASHES[rank % len(_DASHES)], _MARKERS.get(kind, "plus"))
    return result


def kind_styles(kinds: Iterable[str]) -> dict[str, Style]:
    """The style that stands for all models of a kind of mixer, by kind."""
    return {kind: Style(*_COLOURS.get(kind, _OTHER), "", _MARKERS.get(kind, "plus")) for kind in kinds}


def _mix(colour: str, other: str, share: float) -> str:
    channels = ((int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in channels)


def draw_marker(canvas: Canvas, style: Style, x: float, y: float, size: float = 4.5, css: str = "mark") -> None:
    """A marker of the style's shape with its centre at (x, y)."""
    if style.marker == "circle":
        canvas.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{css}"/>')
        return
    corners = {
        "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "triangle": ((0, -1.15), (1.1, 0.8), (-1.1, 0.8)),
        "diamond": ((0, -1.25), (1.1, 0), (0, 1.25), (-1.1, 0)),
        "plus": ((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
                 (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    }[style.marker]  # fmt: skip
    canvas.path([(x + size * dx, y + size * dy) for dx, dy in corners], css, closed=True)
