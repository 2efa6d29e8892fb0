"""A small canvas that writes SVG: scales with round ticks, axes with units, labels that keep out of one another's way.

Colours come as a pair for light and dark backgrounds and are set as the CSS variables --l and --d of a group; the style
sheet (`STYLE`) picks one by prefers-color-scheme, so one picture reads on both.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

# Room for one line of text, and the width of a digit: of the largest size that the style sheet sets (on phones), in a
# wide font.
LINE = 16.0
LETTER = 9.0
_NARROW, _WIDE = frozenset("ijlftr.,:;|'()[]- "), frozenset("mwMW%@")
# A figure of the page; two stand side by side where there is room.
WIDTH, HEIGHT = 440.0, 300.0
# The most room that a model's name gets.
LABEL_WIDTH = 165.0

STYLE = (resources.files("e88.report") / "figure.css").read_text(encoding="utf-8")


def text_width(text: str) -> float:
    """About how wide a text is drawn, in user units, on the safe side."""
    return LETTER * sum(map(_share, text))


def _share(char: str) -> float:
    if char in _NARROW:
        return 0.65
    if char in _WIDE:
        return 1.55
    return 1.9 if unicodedata.east_asian_width(char) in "WF" else 1.0


def shorten(text: str, width: float) -> str:
    """The text; where it would be wider than `width`, with an ellipsis for its middle: names differ at the end."""
    kept = len(text)
    short = text
    while text_width(short) > width and kept > 1:
        kept -= 1
        head = (kept + 1) // 2
        short = text[:head] + "…" + text[len(text) - (kept - head) :]
    return short


@dataclass(frozen=True)
class Figure:
    """One picture of the page: its title, the SVG, and what a reader must know to read it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Scale:
    """Maps data in [low, high] to user units in [start, end], linearly or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value, kept within a page's length of the range so that no file holds absurd numbers."""
        if self.log:
            share = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, -4.0), 5.0) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, wanted: int = 6) -> list[float]:
        """Round values inside the range."""
        if self.log and self.high / self.low > 6:
            return self._log_ticks(wanted)
        step = _round_step((self.high - self.low) / wanted)
        if len(self._multiples(step)) < 3:
            step = _round_step(step * 0.45)
        return self._multiples(step)

    def _multiples(self, step: float) -> list[float]:
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [digit * 10.0**decade for decade in decades for digit in digits]
            ticks = [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(ticks) <= wanted + 1:
                return ticks
        return ticks[:: math.ceil(len(ticks) / wanted)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= step * 0.999)


def tick_texts(ticks: Sequence[float], log: bool = False) -> list[str]:
    """Labels of ticks, with K, M or B where large, 2e15 where huge: a logarithmic axis picks the unit for each, a
    linear one for all."""
    if log:
        return [_with_unit(tick, abs(tick), 1e3, None) for tick in ticks]
    top = max((abs(tick) for tick in ticks), default=0.0)
    gaps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    return [_with_unit(tick, top, 1e4, min(gaps, default=None)) for tick in ticks]


def _with_unit(tick: float, size: float, threshold: float, step: float | None) -> str:
    if tick == 0:
        return "0"
    if size >= 1e12:
        return f"{tick:.3g}".replace("e+", "e")
    units = ((1e9, "B"), (1e6, "M"), (1e3, "K"))
    scale, unit = next(((s, u) for s, u in units if size >= max(s, threshold)), (1.0, ""))
    if step is None:
        return f"{tick / scale:g}{unit}"
    step /= scale
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    # A step such as 0.25 needs one decimal more than its size tells.
    decimals += round(step, decimals) != round(step, decimals + 1)
    return f"{tick / scale:.{decimals}f}{unit}"


@dataclass(frozen=True)
class Box:
    """A rectangle in user units."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


class Canvas:
    """Collects SVG elements of a picture of `width` by `height` user units. Every text is escaped here."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def add(self, element: str) -> None:
        self.parts.append(element)

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", css: str = "", full: str = "") -> None:
        """A line of text with its middle at height y; `full` is told on hovering, where the text was shortened."""
        hover = f"<title>{html.escape(full)}</title>" if full and full != text else ""
        self.add(
            f'<text x="{x:.1f}" y="{y:.1f}" dy=".33em" text-anchor="{anchor}" class="{css}">'
            f"{html.escape(text)}{hover}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str, extra: str = "") -> None:
        self.add(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"{extra}/>')

    def path(self, points: Iterable[tuple[float, float]], css: str, dash: str = "", closed: bool = False) -> None:
        """A line through points in user units, or the area within."""
        told = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.add(f'<path d="M{told}{"Z" if closed else ""}" class="{css}"{dashed}/>')

    def group(self, light: str, dark: str, title: str) -> None:
        """Open a group in one model's colours; `end` closes it."""
        self.add(f'<g class="s" style="--l:{light};--d:{dark}"><title>{html.escape(title)}</title>')

    def clip(self, box: Box) -> None:
        """Open a window that hides what is drawn outside `box`; `end_clip` closes it."""
        width, height = box.right - box.left, box.bottom - box.top
        self.add(
            f'<svg x="{box.left:.1f}" y="{box.top:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'viewBox="{box.left:.1f} {box.top:.1f} {width:.1f} {height:.1f}" overflow="hidden">'
        )

    def end(self) -> None:
        self.add("</g>")

    def end_clip(self) -> None:
        self.add("</svg>")

    def axes(
        self, box: Box, x: Scale, y: Scale | None, x_title: str, y_title: str = "", at: Sequence[float] = ()
    ) -> None:
        """Grid, tick labels and titles; without y only the x axis, its grid lines the full height.

        at: where the ticks of x shall be, if their labels find room there.
        """
        ticks = x.ticks(max(3, int((box.right - box.left) / 62)))
        widths = [text_width(told) for told in tick_texts(at, log=True)]
        if at and all(x(b) - x(a) > w for a, b, w in zip(at, at[1:], widths[1:], strict=False)):
            ticks = list(at)
        for tick, told in zip(ticks, tick_texts(ticks, x.log), strict=True):
            self.line(x(tick), box.top, x(tick), box.bottom, "grid")
            self.text(x(tick), box.bottom + 13, told, anchor="middle", css="soft")
        self.line(box.left, box.bottom, box.right, box.bottom, "axis")
        self.text((box.left + box.right) / 2, box.bottom + 32, x_title, anchor="middle")
        if y is None:
            return
        ticks = y.ticks()
        for tick, told in zip(ticks, tick_texts(ticks, y.log), strict=True):
            self.line(box.left, y(tick), box.right, y(tick), "grid")
            self.text(box.left - 7, y(tick), told, anchor="end", css="soft")
        self.text(max(2.0, box.left - 46), box.top - 15, y_title)

    def markup(self, *, standalone: bool = False, caption: str = "") -> str:
        """The <svg> element; standalone, with its namespace, style sheet and a background of its own."""
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        start = f'<svg class="fig" role="img" aria-label="{html.escape(self.label)}" {size}'
        if not standalone:
            return f"{start}>{''.join(self.parts)}</svg>"
        return (
            f'{start} xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}" height="{self.height:.0f}">'
            f"<desc>{html.escape(caption)}</desc><style>{STYLE}</style>"
            f'<rect class="backdrop" width="100%" height="100%" rx="8"/>{"".join(self.parts)}</svg>\n'
        )


def spread_labels(wanted: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Heights near the wanted ones, in their order, at least `gap` apart within [low, high] (as many as fit)."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for rank, i in enumerate(order):
        ceiling = high - gap * (len(order) - 1 - rank)
        placed[i] = max(floor, min(wanted[i], ceiling))
        floor = placed[i] + gap
    # The sweep only pushes down; pull each back up towards its place as far as the one before it allows.
    for _ in range(len(order)):
        for rank, i in enumerate(order):
            above = placed[order[rank - 1]] + gap if rank else low
            below = placed[order[rank + 1]] - gap if rank + 1 < len(order) else high
            placed[i] = max(above, min(below, (placed[i] + wanted[i]) / 2))
    return placed
