"""Blocks of state columns for the CPU kernels: which columns, how they come and go, and sums over a row.

A block is LANES columns of state side by side, one vector a row: two halves of HALF columns each, which belong to one
head or to two. Heads are numbered n * H + h over sequences and heads; a group is one or two of them whose columns
fill its blocks, -1 standing for no head. `ends` are the sequences' boundaries in tokens. `slots` counts the segments
before each group: where, times the blocks of a group, its saved states begin. Tensors are contiguous float32 and come
to the kernels as addresses, 0 for one that is absent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from e88.ops.cpu_simd import (
    HALF,
    LANES,
    advance,
    copy_half,
    load,
    pair,
    splat,
    store,
    sum_rows,
)

# Steps between two saved states, and floats in a block of as many rows.
SEGMENT = 16
STEPS = SEGMENT * LANES
_ZERO = np.float32(0.0)


@njit
def place(groups: Any, group: int, size: int, half: int, ends: Any, H: int, V: int) -> tuple[int, int, int, int, int]:
    """Head, sequence, first token-head, first column and width of half number `half` of a group."""
    per_head = (V + HALF - 1) // HALF
    which = half // per_head
    # A half beyond the group's last column repeats the first one with no width, so that nothing is written.
    beyond = which >= size or groups[group * size + which] < 0
    if beyond:
        which = 0
    head = groups[group * size + which]
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
def clear(rows: Any, count: int) -> None:
    for i in range(count):
        store(rows, i * LANES, splat(_ZERO))


@njit
def read(rows: Any, K: int, k: Any, k0: int, k1: int) -> Any:
    """state^T key for each half's key."""
    total = splat(_ZERO)
    for i in range(K):
        total = total + pair(k, k0 + i, k1 + i) * load(rows, i * LANES)
    return total


@njit
def _add_sums(rows: Any, count: int, target: Any, first: int, stride: int, keep: bool, sums: Any) -> None:
    for i in range(0, count, HALF):
        if stride == 1 and i + HALF <= count:
            sum_rows(target, first + i, rows, i * HALF, keep)
        else:
            sum_rows(sums, 0, rows, i * HALF, False)
            for j in range(min(HALF, count - i)):
                at = first + (i + j) * stride
                target[at] = sums[j] + (target[at] if keep else _ZERO)


@njit
def add_sums(
    rows: Any,
    size: int,
    count: int,
    target: Any,
    first0: int,
    first1: int,
    stride: int,
    together: bool,
    width1: int,
    keep0: bool,
    keep1: bool,
    sums: Any,
) -> None:
    """Sum `count` rows of each half, as `store_halves` left them `size` apart, into the halves' heads.

    The sum of row i goes to target[first + i * stride], or is added to what is there if `keep`.
    """
    _add_sums(rows, count, target, first0, stride, keep0, sums)
    if width1 > 0 and not together:
        _add_sums(advance(rows, size), count, target, first1, stride, keep1, sums)
