"""Batches as a pure function of seed and step, and the fixed held-out slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from e88.data.corpus import Split
from e88.errors import UserError


class WindowSampler:
    """Random windows of a split. The batch of a step depends on (seed, step) alone, so that every model sees the same
    bytes and a resumed run goes on with the batches it would have had.

    `passes`: the text is cut into windows, and all are read in a random order before any is read again, in the next
    pass, which is cut elsewhere. `draws`: each window is drawn from all places, independently of all others.

    With `carry` above 1, steps come in blocks of that many: a row of the first batch of a block is found as above, as
    if the block were one window, and goes on in the others where it ended, with its last token.
    """

    def __init__(
        self, split: Split, window: int, batch_size: int, seed: int, carry: int = 1, sampling: str = "passes"
    ) -> None:
        """window: tokens predicted a window, which is one longer. seed: 0 to 2^64 - 1."""
        if window < 1 or batch_size < 1:
            raise UserError(f"window and batch_size must be at least 1, got {window} and {batch_size}")
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed must be from 0 to 2^64 - 1, got {seed}")
        self._windows = _windows(split, window)
        self._span = carry * window
        # Where a block may start.
        self._places = len(_windows(split, self._span, f"{carry} windows in a row, together"))
        self._window, self._batch_size, self._seed, self._carry = window, batch_size, seed, carry
        self._draws = sampling == "draws"

    def batch(self, step: int) -> np.ndarray:
        """int64 [batch_size, window + 1]: the windows of a step, counted from 0."""
        return self._windows[self.starts(step)].astype(np.int64)

    def starts(self, step: int) -> np.ndarray:
        """int64 [batch_size]: where the windows of a step start."""
        block, turn = divmod(step, self._carry)
        first = self._drawn(block) if self._draws else self._in_passes(block)
        return first + turn * self._window

    def _drawn(self, block: int) -> np.ndarray:
        return (_uniform(self._seed, block, self._batch_size) * self._places).astype(np.int64)

    def _in_passes(self, block: int) -> np.ndarray:
        # One less than fits, so that a pass can be cut at any offset.
        count = max(1, self._places // self._span)
        spare = self._places - 1 - (count - 1) * self._span
        turns, index = np.divmod(block * self._batch_size + np.arange(self._batch_size), count)
        starts = np.empty(self._batch_size, dtype=np.int64)
        for turn in np.unique(turns):
            rows = turns == turn
            offset, *keys = _uniform(self._seed, int(turn), 1 + ROUNDS)
            starts[rows] = int(offset * (spare + 1)) + shuffled(index[rows], count, keys) * self._span
        return starts


def _uniform(seed: int, number: int, count: int) -> np.ndarray:
    """float64 [count] from 0 to below 1, of the counter-based generator Philox (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"), whose raw output, unlike numpy's distributions, is fixed for all versions."""
    raw = np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).random_raw(count)
    # 53 bits make a double.
    return (raw >> np.uint64(11)) * 2.0**-53


ROUNDS = 6


def shuffled(index: np.ndarray, count: int, keys: Sequence[float]) -> np.ndarray:
    """Where a random order of 0 to count - 1 has its places `index`, int64 [n], without writing that order down.

    A Feistel network over the next power of four, walked until it leads back below `count` (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"). keys: of its rounds, from 0 to below 1.
    """
    half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)

    def once(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + np.uint64(int(key * 2.0**53))) & mask)
        return left << half | right

    found = once(index.astype(np.uint64))
    while (outside := found >= count).any():
        found[outside] = once(found[outside])
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 depends on all bits of x (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


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
