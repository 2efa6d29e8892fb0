"""Live progress of a run: a bar on a terminal, a line now and then elsewhere. All of it on stderr."""

from __future__ import annotations

import math
import time
from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn  # noqa: I001
from rich.progress import Progress as Bar

LINE_EVERY = 10.0
SMOOTH_STEPS = 20


class Progress:
    """A training reporter: share of the budget, loss, bits per byte, tok/s, time left."""

    def __init__(self, name: str, bytes_per_token: float, *, quiet: bool = False) -> None:
        self.name = name
        self.bytes_per_token = bytes_per_token
        self.console = Console(stderr=True, quiet=quiet)
        self.losses: deque[float] = deque(maxlen=SMOOTH_STEPS)
        self.rates: deque[float] = deque(maxlen=SMOOTH_STEPS)
        self.last_line = time.monotonic()
        self.bar: Bar | None = None
        if self.console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task(name, total=1.0, text="preparing")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, entry: dict[str, Any], used: float, seconds_left: float) -> None:
        """Show the state after a step."""
        self.losses.append(entry["loss"])
        self.rates.append(entry["step_tokens"] / entry["step_seconds"])
        now = time.monotonic()
        if self.bar is None and now - self.last_line < LINE_EVERY:
            return
        loss = sum(self.losses) / len(self.losses)
        bpb = loss / math.log(2) / self.bytes_per_token
        rate = sum(self.rates) / len(self.rates)
        left = "" if math.isinf(seconds_left) else f", {duration(seconds_left)} left"
        share = f"{min(used, 1):4.0%}  step {entry['step']:,}"
        text = f"{share}  loss {loss:.3f}  {bpb:.3f} bits/byte  {rate:,.0f} tok/s{left}"
        if self.bar:
            self.bar.update(self.task, completed=min(used, 1.0), text=text)
        else:
            self.last_line = now
            self.message(f"{self.name}: {text}")

    def message(self, text: str) -> None:
        """Print a line of its own."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time as people say it, to the second."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
