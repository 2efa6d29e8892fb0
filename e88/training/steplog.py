"""The log of every optimiser step, one JSON line each, and the summaries a record takes from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from e88.files import write_text

CURVE_POINTS = 400
LAST_STEPS = 100


class StepLog:
    """`log.jsonl` of a run folder: appended as it goes, cut back to a checkpoint's step on resume.

    Of several processes only one writes; the others have no path.
    """

    def __init__(self, path: Path | None, keep_until: int = 0) -> None:
        self.entries: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        if path is not None:
            self.entries = [e for e in read_entries(path) if e["step"] <= keep_until]
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
            self._file = open(path, "a")

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self._file:
            self._file.write(json.dumps(entry) + "\n")

    def sync(self) -> None:
        """Put everything logged so far on disk; a checkpoint calls it first, so that the log never lags behind it."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_entries(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a log; a line torn by a kill ends it."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def last_loss(entries: list[dict[str, Any]]) -> tuple[float | None, int]:
    """(exact mean loss over the last 100 optimiser steps, how many there were), nats per token."""
    last = [e["loss"] for e in entries[-LAST_STEPS:]]
    return (float(np.mean(last)), len(last)) if last else (None, 0)


def throughput(entries: list[dict[str, Any]]) -> tuple[float | None, list[float] | None]:
    """(median tok/s, [10th, 90th percentile]) over steady steps: the first tenth, at most 10 steps, is left out."""
    steady = entries[min(10, len(entries) // 10) :]
    rates = [e["step_tokens"] / e["step_seconds"] for e in steady if e["step_seconds"] > 0]
    if not rates:
        return None, None
    low, middle, high = np.percentile(rates, [10, 50, 90])
    return float(middle), [float(low), float(high)]


def curve(entries: list[dict[str, Any]], points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """At most `points` points: each the mean loss since the one before, at the step it ends on."""
    edges = np.unique(np.linspace(0, len(entries), points + 1).astype(int))
    chunks = [entries[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [
        {
            "step": chunk[-1]["step"],
            "tokens": chunk[-1]["tokens"],
            "seconds": round(chunk[-1]["seconds"], 4),
            "loss": round(float(np.mean([e["loss"] for e in chunk])), 6),
            "lr": chunk[-1]["lr"],
        }
        for chunk in chunks
    ]
