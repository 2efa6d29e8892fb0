"""A progress bar for work that turns out to be long; nothing is drawn in the first second or off a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

DELAY = 1.0


class Progress:
    """`with Progress("reading x", total) as bar: bar.update(done)`, in bytes. Drawn on stderr."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Say that `done` bytes of the total are behind us."""
        if self._bar is None and time.monotonic() - self._started > DELAY and sys.stderr.isatty():
            self._start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def _start(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.add_task(self.label, total=self.total)
        self._bar.start()
