"""The table of results: rows of data, and the same rows for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import html
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e88.report.compare import MISSING, Comparison, Group, Record, comparisons, count, dig, number, pair
from e88.study.statistics import Estimate, Spread, median_spread

if TYPE_CHECKING:
    from rich.table import Table

FULL_LOSS_STEPS = 100
SPEED = ("results", "tokens_per_second")


@dataclass(frozen=True)
class Row:
    """One model of one comparison, over its seeds. None: not known, or the run did not get so far.

    train_loss: nats per token, the mean of the last 100 optimiser steps, of `train_loss_steps` where fewer ran.
    heldout_bpb and to_best (difference from the best model, paired by seed): bits per byte. tokens_per_second: median,
    with p10 to p90. state_per_layer: elements. projection_ratio: H*n / dim; dim_over_inner: dim / (H*n).
    seeds of runs: how many are done, of how many that were started.
    """

    comparison: str
    model: str
    kind: str
    status: str
    train_loss: float | None
    train_loss_steps: int | None
    heldout_bpb: Estimate | None
    to_best: Estimate | None
    steps: float | None
    tokens: float | None
    seconds: float | None
    tokens_per_second: Spread | None
    params: float | None
    state_per_layer: float | None
    projection_ratio: float | None
    dim_over_inner: float | None
    peak_memory_bytes: float | None
    mfu: float | None
    seeds: int
    runs: int
    backend: str
    note: str
    ids: tuple[str, ...]

    @property
    def interval_text(self) -> str:
        """The held-out interval, marked where it is over windows of one run and not over seeds."""
        estimate = self.heldout_bpb
        if estimate is None or estimate.low is None:
            return MISSING
        mark = " (windows)" if estimate.over == "windows" else ""
        return f"{estimate.low:.4f}–{estimate.high:.4f}{mark}"

    @property
    def loss_text(self) -> str:
        if self.train_loss is None:
            return MISSING
        short = self.train_loss_steps is not None and self.train_loss_steps < FULL_LOSS_STEPS
        return f"{self.train_loss:.3f}" + (f" ({self.train_loss_steps} steps)" if short else "")

    @property
    def to_best_text(self) -> str:
        estimate = self.to_best
        if estimate is None:
            return MISSING
        if estimate.low is None or estimate.high is None:
            return f"{estimate.mean:+.4f} (n=1)"
        half = (estimate.high - estimate.low) / 2
        return f"{estimate.mean:+.4f} ± {half:.4f}" + ("" if estimate.excludes_zero else " (undecided)")


@dataclass(frozen=True)
class Column:
    """A column of every rendering. hint: what it means, with its unit. value: what it is sorted by, where numeric."""

    title: str
    hint: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | None] | None = None


def _mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.mean


def _whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def _fixed(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _speed(row: Row) -> float | None:
    return None if row.tokens_per_second is None else row.tokens_per_second.median


def _bpb_text(row: Row) -> str:
    if row.heldout_bpb is not None:
        return f"{row.heldout_bpb.mean:.4f}"
    return row.status if row.status != "done" else MISSING


COLUMNS = (
    Column("Model", "name of the run, with the settings that tell it apart", lambda r: r.model),
    Column("Loss", "training loss, nats per token, mean of the last 100 optimiser steps, or of as many as are given",
           lambda r: r.loss_text, lambda r: r.train_loss),
    Column("Bits/byte", "held-out bits per byte, mean over seeds", _bpb_text, lambda r: _mean(r.heldout_bpb)),
    Column("95 % interval", "of bits per byte, over seeds (Student's t); of one seed, over its held-out windows",
           lambda r: r.interval_text),
    Column("To best", "bits per byte above the best model, mean difference paired by seed ± half its 95 % interval",
           lambda r: r.to_best_text, lambda r: _mean(r.to_best)),
    Column("Steps", "optimiser steps, mean over seeds", lambda r: _whole(r.steps), lambda r: r.steps),
    Column("Tok/s", "training tokens per second, median of steady steps", lambda r: _whole(_speed(r)), _speed),
    Column("Params", "parameters", lambda r: MISSING if r.params is None else count(r.params), lambda r: r.params),
    Column("State/layer", "recurrent state per layer, elements; of attention, its cache of one window",
           lambda r: _whole(r.state_per_layer), lambda r: r.state_per_layer),
    Column("H·n/dim", "projection ratio, heads × state size over model width", lambda r: _fixed(r.projection_ratio),
           lambda r: r.projection_ratio),
    Column("Seeds", "seeds done, of those started",
           lambda r: f"{r.seeds}" if r.seeds == r.runs else f"{r.seeds} of {r.runs}", lambda r: float(r.seeds)),
    Column("Backend", "implementation of the recurrence", lambda r: r.backend or MISSING),
    Column("Note", "pruned, diverged and failed runs, with the reason", lambda r: r.note),
)  # fmt: skip
# What a narrow terminal gives up, first to last.
_EXPENDABLE = ("Backend", "H·n/dim", "95 % interval", "Params", "Seeds", "Steps", "To best")
_UNLIMITED, _MOST_SHOWN = 10_000, 100


def summary_rows(records: Sequence[Record]) -> list[Row]:
    """One row for each model, best held-out bits per byte first within its comparison; UserError without records."""
    return [row for comparison in comparisons(records) for row in comparison_rows(comparison)]


def comparison_rows(comparison: Comparison) -> list[Row]:
    """The rows of one comparison, in its order."""
    return [_row(comparison, group) for group in comparison.groups]


def _row(comparison: Comparison, group: Group) -> Row:
    shown = group.done or group.runs
    loss_steps = [steps for run in shown if (steps := number(run, "results", "train_loss_steps")) is not None]
    speeds = [speed for run in shown if (speed := number(run, *SPEED)) is not None]
    spreads = [spread for run in shown if (spread := pair(run, "results", "tokens_per_second_spread"))]
    backends = {str(name) for run in shown for name in dig(run, "environment", "backends") or ()}
    # A loss that blew up is no result; the run's own details still show it.
    finished = group.status == "done"
    return Row(
        comparison=comparison.title,
        model=group.label,
        kind=group.kind,
        status=group.status,
        train_loss=group.mean("results", "train_loss") if finished else None,
        train_loss_steps=int(min(loss_steps)) if loss_steps and finished else None,
        heldout_bpb=group.bpb,
        to_best=comparison.to_best(group),
        steps=group.mean("results", "steps"),
        tokens=group.mean("results", "tokens"),
        seconds=group.mean("results", "seconds"),
        tokens_per_second=median_spread(speeds, spreads) if speeds else None,
        params=group.mean("model", "params"),
        state_per_layer=group.mean("model", "state_per_layer"),
        projection_ratio=group.mean("model", "projection_ratio"),
        dim_over_inner=group.mean("model", "dim_over_inner"),
        peak_memory_bytes=group.mean("results", "peak_memory_bytes"),
        mfu=group.mean("results", "mfu"),
        seeds=len(group.done),
        runs=len(group.runs),
        backend=", ".join(sorted(backends)),
        note=_note(group),
        ids=tuple(str(run["id"]) for run in group.runs),
    )


def _note(group: Group) -> str:
    notes = []
    for status in ("pruned", "diverged", "failed"):
        if n := group.count(status):
            which = status if n == len(group.runs) == 1 else f"{n} {status}"
            reason = " ".join(group.reason(status).split())
            notes.append(f"{which}: {reason}" if reason else which)
    return "; ".join(notes)


def _sections(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.comparison, []).append(row)
    return list(sections.items())


def render_terminal(rows: Sequence[Row], width: int | None = None) -> str:
    """The table for the terminal. width: characters; by default the terminal's, or as many as needed in a pipe.

    What does not fit is left out column by column, and a line says which, so nothing is ever cut short silently.
    """
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    out = io.StringIO()
    limit = width or (Console().width if is_terminal else _UNLIMITED)
    console = Console(file=out, width=limit, force_terminal=is_terminal, highlight=False)
    unlimited = console.options.update(max_width=_UNLIMITED)
    for title, whole in _sections(rows):
        section = whole[:_MOST_SHOWN]
        columns = [column for column in COLUMNS if column.title != "Note"]
        left_out: list[str] = []
        table = _rich_table(columns, section)
        for expendable in _EXPENDABLE:
            if console.measure(table, options=unlimited).maximum <= limit:
                break
            left_out.append(expendable)
            columns = [column for column in columns if column.title != expendable]
            table = _rich_table(columns, section)
        console.print(_plain(title), markup=False)
        console.print(table)
        notes = [f"{row.model}: {row.note}" for row in section if row.note]
        if left_out:
            notes.append(f"Left out for want of width: {', '.join(left_out)}.")
        if len(whole) > len(section):
            notes.append(f"and {len(whole) - len(section)} more models, in the report")
        for note in notes:
            console.print(_plain(note), markup=False)
        console.print()
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n")) + "\n"


def _rich_table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.title), justify="right" if column.value else "left", overflow="fold")
    for row in rows:
        style = "" if row.status == "done" else "red" if row.status == "failed" else "yellow"
        table.add_row(*(Text(_plain(column.text(row))) for column in columns), style=style)
    return table


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def render_markdown(rows: Sequence[Row]) -> str:
    """The table as GitHub Markdown, a heading before each comparison."""
    lines = []
    for title, section in _sections(rows):
        lines += [f"### {_markdown(title)}", ""]
        lines.append("| " + " | ".join(column.title for column in COLUMNS) + " |")
        lines.append("|" + "|".join("---:" if column.value else "---" for column in COLUMNS) + "|")
        for row in section:
            lines.append("| " + " | ".join(_markdown(column.text(row)) for column in COLUMNS) + " |")
        lines.append("")
    lines += [f"{column.title}: {column.hint}." + "  " for column in COLUMNS[1:]]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(text: str) -> str:
    text = html.escape(_plain(text), quote=False)
    return "".join("\\" + char if char in "\\|`*_[]" else char for char in text)


def render_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with unrounded numbers: an estimate becomes its mean, low, high and what its interval is over."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    flat = [_flat(row) for row in rows]
    if flat:
        writer.writerow(flat[0])
        writer.writerows(list(row.values()) for row in flat)
    return out.getvalue()


def _flat(row: Row) -> dict[str, object]:
    cells: dict[str, object] = {}
    for key, value in vars(row).items():
        if key in ("heldout_bpb", "to_best"):
            cells[key] = getattr(value, "mean", None)
            cells.update({f"{key}_{part}": getattr(value, part, None) for part in ("low", "high", "over")})
        elif key == "tokens_per_second":
            cells[key] = getattr(value, "median", None)
            cells.update({f"{key}_{part}": getattr(value, part, None) for part in ("low", "high")})
        else:
            cells[key] = " ".join(value) if isinstance(value, tuple) else value
    return cells
