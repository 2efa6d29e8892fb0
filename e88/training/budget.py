"""The training clock, and what a budget has been spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from e88.runtime import synchronise


@dataclass
class Clock:
    """Seconds by purpose. `train` is what a budget in seconds counts; the rest is reported apart.

    Every section starts and ends with the device idle, so that no work is charged to another.
    """

    device: torch.device
    seconds: dict[str, float] = field(
        default_factory=lambda: {"train": 0.0, "compile": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
    )

    @contextmanager
    def section(self, purpose: str) -> Iterator[None]:
        """Charge the enclosed work to `purpose`, also where it raises."""
        synchronise(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            self.seconds[purpose] += time.perf_counter() - start
