"""What a study's user sees while it runs: a table on a terminal, a line now and then elsewhere. All of it on stderr."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from e88.study.progress import duration
from e88.study.scheduler import State

LINE_EVERY = 10.0
REFRESH_EVERY = 0.5
MOST_ROWS = 40


class LiveView:
    """A `scheduler.View`: what runs where, with its share, loss, tok/s and time left, and how many runs are left.

    above: what else to show on a terminal.
    """

    def __init__(self, above: Callable[[], RenderableType] = Text) -> None:
        self.above = above
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.last = -LINE_EVERY

    def __enter__(self) -> LiveView:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def update(self, state: State) -> None:
        now = time.monotonic()
        if now - self.last < (REFRESH_EVERY if self.live else LINE_EVERY):
            return
        self.last = now
        rows = [progress_row(job.name, handle.where, job.folder.progress()) for job, handle in state.running.values()]
        if self.live:
            self.live.update(Group(self.above(), Text(summary(state)), running_table(rows[:MOST_ROWS])), refresh=True)
        else:
            self.message("; ".join([summary(state), *(" ".join(filter(None, row)) for row in rows)]))

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def summary(state: State) -> str:
    """How many runs are where."""
    counts = Counter(state.ended.values())
    parts = [f"{counts[status]} {status}" for status in ("done", "pruned", "diverged", "failed") if counts[status]]
    parts += [f"{len(state.running)} running", f"{state.waiting} waiting"]
    if state.elsewhere:
        parts.append(f"{state.elsewhere} in other hands")
    return f"{len(state.runs)} runs: " + ", ".join(parts)


def running_table(rows: list[tuple[str, ...]]) -> Table:
    """The table of running runs; `rows` as `progress_row` gives them."""
    table = Table(box=None, pad_edge=False)
    for title in ("Run", "Where", "Step", "Done", "Loss", "Tok/s", "Time left"):
        table.add_column(title, justify="left" if title in ("Run", "Where") else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def progress_row(name: str, where: str, progress: dict[str, Any] | None) -> tuple[str, ...]:
    """Run, where, step, share of the budget, loss (nats per token), tok/s, training time left."""
    if progress is None or "step" not in progress:
        return name, where, "", "starting", "", "", ""
    left = progress["seconds_left"]
    return (
        name, where, f"{progress['step']:,}", f"{progress['used']:.0%}", f"{progress['loss']:.3f}",
        f"{progress['tokens_per_second']:,.0f} tok/s", "" if math.isinf(left) else f"{duration(left)} left",
    )  # fmt: skip
