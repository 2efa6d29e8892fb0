"""Blocks of state columns for the CPU kernels: which columns, how they come and go, and sums over a row.

A block is LANES columns of state side by side, one vector a row: two halves of HALF columns each, which belong to one
head or to two. Heads are numbered n * H + h over sequences and heads; a group is one or two of them whose columns
fill its blocks, -1 standing for no head. `ends` are the sequences' boundaries in tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from e88.ops.cpu_simd import HALF, LANES, add_high_sums, add_low_sums, add_sums, copy_half, load, pair, splat, store

_ZERO = np.float32(0.0)


@njit
def place(group: Any, half: int, ends: Any, H: int, V: int) -> tuple[int, int, int, int, int]:
    """Head row, sequence, first token-head, first column and width of half number `half` of a group."""
    per_head = (V + HALF - 1) // HALF
    which = half // per_head
    # A half beyond the group's last column repeats the first one with no width, so that nothing is written.
    beyond = which >= group.shape[0] or group[which] < 0
    if beyond:
        which = 0
    head = group[which]
    n = head // H
    column = 0 if beyond else (half % per_head) * HALF
    width = 0 if beyond else min(HALF, V - column)
    return head, n, ends[n] * H + head % H, column, width


@njit
def gather(rows: Any, at: int, count: int, source: Any, first: int, stride: int, width: int) -> None:
    """Copy `count` rows of a half into a block, with zeros beyond `width`."""
    for c in range(count):
        if width == HALF:
            copy_half(rows, at + c * LANES, source, first + c * stride)
        else:
            for j in range(width):
                rows[at + c * LANES + j] = source[first + c * stride + j]
            for j in range(width, HALF):
                rows[at + c * LANES + j] = _ZERO


@njit
def scatter(rows: Any, at: int, count: int, target: Any, first: int, stride: int, width: int) -> None:
    """Copy `count` rows of a half out of a block."""
    for c in range(count):
        if width == HALF:
            copy_half(target, first + c * stride, rows, at + c * LANES)
        else:
            for j in range(width):
                target[first + c * stride + j] = rows[at + c * LANES + j]


@njit
def copy(target: Any, to: int, source: Any, start: int, rows: int) -> None:
    for i in range(rows):
        store(target, to + i * LANES, load(source, start + i * LANES))


@njit
def gather_state(rows: Any, source: Any, first0: int, first1: int, K: int, V: int, width0: int, width1: int) -> None:
    """Copy a block's columns of two states, or zeros where there is no `source`."""
    if source.size:
        gather(rows, 0, K, source, first0, V, width0)
        gather(rows, HALF, K, source, first1, V, width1)
    else:
        for i in range(K):
            store(rows, i * LANES, splat(_ZERO))


@njit
def blocks_of(groups: Any, V: int) -> int:
    """Blocks in a group: enough halves for the columns of its one or two heads."""
    halves = (V + HALF - 1) // HALF * groups.shape[1]
    return (halves + 1) // 2


@njit
def read(rows: Any, at: int, K: int, k: Any, k0: int, k1: int) -> Any:
    total = splat(_ZERO)
    for i in range(K):
        total = total + pair(k, k0 + i, k1 + i) * load(rows, at + i * LANES)
    return total


@njit
def add_key_sums(
    rows: Any, K: int, target: Any, first0: int, first1: int, together: bool, width1: int, sums: Any
) -> None:
    """Add the sums over lanes of K rows to target[first0 : first0 + K], or each half to its own head."""
    for i in range(0, K, HALF):
        if together:
            _add_half(rows, i, K, target, first0, 2, sums)
        else:
            _add_half(rows, i, K, target, first0, 0, sums)
            if width1 > 0:
                _add_half(rows, i, K, target, first1, 1, sums)


@njit
def _add_half(rows: Any, i: int, K: int, target: Any, first: int, half: int, sums: Any) -> None:
    whole = i + HALF <= K
    to, out = (first + i, target) if whole else (0, sums)
    if not whole:
        for j in range(HALF):
            sums[j] = _ZERO
    if half == 2:
        add_sums(out, to, rows, i * LANES)
    elif half == 1:
        add_high_sums(out, to, rows, i * LANES)
    else:
        add_low_sums(out, to, rows, i * LANES)
    if not whole:
        for j in range(K - i):
            target[first + i + j] += sums[j]


@njit
def add_gate_sums(
    rows: Any, count: int, target: Any, first0: int, first1: int, H: int, together: bool, width1: int, sums: Any
) -> None:
    """Add the sums over lanes of `count` rows, one a step, to the steps of one head or of each half's head."""
    for half in range(1 if together or width1 == 0 else 2):
        first = first1 if half else first0
        for j in range(HALF):
            sums[j] = _ZERO
        if together:
            add_sums(sums, 0, rows, 0)
        elif half:
            add_high_sums(sums, 0, rows, 0)
        else:
            add_low_sums(sums, 0, rows, 0)
        for c in range(count):
            target[first + c * H] += sums[c]
