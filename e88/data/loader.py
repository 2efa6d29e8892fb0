"""Batches as a pure function of seed and step, and the fixed held-out slice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from e88.data.corpus import Split
from e88.errors import UserError


class WindowSampler:
    """Random windows of a split, drawn with replacement, each batch independently of all others.

    With `carry` above 1, steps come in blocks of that many: a row of the first batch of a block is drawn, and goes on
    in the others where it ended, with its last token.

    The batch of a step depends on (seed, step) alone, through the counter-based generator Philox (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3"), so that every model sees the same bytes and a resumed run goes on
    with the batches it would have had.
    """

    def __init__(self, split: Split, window: int, batch_size: int, seed: int, carry: int = 1) -> None:
        """window: tokens predicted a window, which is one longer. seed: 0 to 2^64 - 1."""
        if window < 1 or batch_size < 1:
            raise UserError(f"window and batch_size must be at least 1, got {window} and {batch_size}")
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed must be from 0 to 2^64 - 1, got {seed}")
        self._windows = _windows(split, window)
        self._places = len(_windows(split, carry * window, f"{carry} windows in a row, together"))
        self._window, self._batch_size, self._seed, self._carry = window, batch_size, seed, carry

    def batch(self, step: int) -> np.ndarray:
        """int64 [batch_size, window + 1]: the windows of a step, counted from 0."""
        return self._windows[self.starts(step)].astype(np.int64)

    def starts(self, step: int) -> np.ndarray:
        """int64 [batch_size]: where the windows of a step start, uniform over all places where those of a block fit."""
        block, turn = divmod(step, self._carry)
        key = np.array([self._seed, block], dtype=np.uint64)
        # Raw output: unlike numpy's distributions it is fixed for all versions. 53 bits make a uniform double.
        raw = np.random.Philox(key=key).random_raw(self._batch_size)
        return ((raw >> np.uint64(11)) * 2.0**-53 * self._places).astype(np.int64) + turn * self._window


class HeldOutWindows(NamedTuple):
    """rows: int64 [n, context + window + 1], tokens to read. scored: bool [n, context + window], which of the predicted
    ones count: `window` of them, one after the other."""

    rows: np.ndarray
    scored: np.ndarray


def heldout_windows(split: Split, window: int, max_bytes: int = 262_144, context: int = 0) -> HeldOutWindows:
    """Windows spread evenly over a split, always the same for the same window length, each behind `context` tokens.

    n is chosen so that the tokens that count stand for about `max_bytes` bytes, at most as many as fit without overlap,
    and at least one. The context decides nothing of that. A window that begins nearer to the split's beginning has the
    tokens from there on as its context, and its row is as long as the others: what comes after its window does not
    count. Raises UserError where the split is shorter than a row.
    """
    windows = _windows(split, window)
    bytes_per_token = split.bytes / len(split)
    count = max(1, min(int(max_bytes / (window * bytes_per_token)), len(split) // (window + 1)))
    starts = np.arange(count, dtype=np.int64) * (len(windows) - 1) // max(count - 1, 1)
    before = np.minimum(starts, context)
    rows = _windows(split, context + window, "a window with its context")
    offset = np.arange(context + window) - before[:, None]
    return HeldOutWindows(rows[starts - before].astype(np.int64), (offset >= 0) & (offset < window))


def _windows(split: Split, window: int, what: str = "a window") -> np.ndarray:
    """All windows of a split, [len - window, window + 1], as a view."""
    if window < 1:
        raise UserError(f"the window must be at least 1, got {window}")
    if len(split) < window + 1:
        unit = "bytes" if split.data.dtype == np.uint8 else "tokens"
        raise UserError(
            f"the {split.name} split has {len(split)} {unit}, too few for {what} of {window} + 1; "
            "use a shorter window or more data"
        )
    # A plain array over the same memory: slicing a memmap costs more than the copy.
    return sliding_window_view(split.data.view(np.ndarray), window + 1)
