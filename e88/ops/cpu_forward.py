"""The forward pass on the CPU, over blocks of state columns (see `cpu_blocks`).

Columns do not depend on one another here, so that all sums live in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from e88.ops.cpu_blocks import SEGMENT, STEPS, clear, copy, gather, place, read, scatter
from e88.ops.cpu_simd import HALF, LANES, advance, floats_at, integers_at, load, pair, splat, store, take
from e88.ops.cpu_tanh import SCALE, tanh

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@njit(forceinline=True)
def _recur(
    state: Any, k: Any, k0: int, k1: int, step: int, K: int, d: Any, write: Any, nonlinear: bool, q: Any
) -> tuple[Any, Any]:
    """One step in place: the output, and what the next key (`step` further on) reads from the new state."""
    output = splat(_ZERO)
    r = output
    gain = splat(SCALE if nonlinear else _ONE)
    decay, delta = d * gain, write * gain
    for i in range(K):
        x = decay * load(state, i * LANES) + pair(k, k0 + i, k1 + i) * delta
        if nonlinear:
            x = tanh(x)
        store(state, i * LANES, x)
        output = output + pair(q, k0 + i, k1 + i) * x
        r = r + pair(k, k0 + step + i, k1 + step + i) * x
    return output, r


def scratch_size(K: int) -> int:
    """Floats of scratch that a worker needs."""
    return K * LANES + 2 * STEPS


@njit(error_model="numpy")
def forward(
    q: Any,
    k: Any,
    v: Any,
    decay: Any,
    beta: Any,
    initial: Any,
    y: Any,
    final: Any,
    checkpoints: Any,
    ends: Any,
    groups: Any,
    slots: Any,
    group_count: int,
    group_size: int,
    blocks: int,
    H: int,
    K: int,
    V: int,
    nonlinear: bool,
    counter: Any,
    scratch: Any,
) -> None:
    """Blocks, as `counter` hands them out, until there are none left. `scratch` is the worker's own."""
    gated, given, saving = beta != 0, initial != 0, checkpoints != 0
    q, k, v, decay, beta, initial = (
        floats_at(q),
        floats_at(k),
        floats_at(v),
        floats_at(decay),
        floats_at(beta),
        floats_at(initial),
    )
    y, final, checkpoints, scratch = floats_at(y), floats_at(final), floats_at(checkpoints), floats_at(scratch)
    ends, groups = integers_at(ends), integers_at(groups)
    slots, counter = integers_at(slots), integers_at(counter)
    size = K * LANES
    state = scratch
    v_rows = advance(state, size)
    y_rows = advance(v_rows, STEPS)
    unit = take(counter)
    while unit < group_count * blocks:
        group, block = unit // blocks, unit % blocks
        unit = take(counter)
        head0, n, token0, column0, width0 = place(groups, group, group_size, 2 * block, ends, H, V)
        head1, n, token1, column1, width1 = place(groups, group, group_size, 2 * block + 1, ends, H, V)
        if width0 == 0:
            continue
        T = ends[n + 1] - ends[n]
        if given:
            gather(state, 0, K, initial, head0 * K * V + column0, V, width0)
            gather(state, HALF, K, initial, head1 * K * V + column1, V, width1)
        else:
            clear(state, K)
        slot = (slots[group] * blocks + block * ((T + SEGMENT - 1) // SEGMENT)) * size
        r = splat(_ZERO)
        if T > 0:
            r = read(state, K, k, token0 * K, token1 * K)
        for start in range(0, T, SEGMENT):
            count = min(SEGMENT, T - start)
            if saving:
                copy(checkpoints, slot + start // SEGMENT * size, state, 0, K)
            t0, t1 = token0 + start * H, token1 + start * H
            gather(v_rows, 0, count, v, t0 * V + column0, H * V, width0)
            gather(v_rows, HALF, count, v, t1 * V + column1, H * V, width1)
            for c in range(count):
                write = load(v_rows, c * LANES) - r
                if gated:
                    write = write * pair(beta, t0 + c * H, t1 + c * H)
                d = pair(decay, t0 + c * H, t1 + c * H)
                k0, k1 = (t0 + c * H) * K, (t1 + c * H) * K
                step = H * K if start + c + 1 < T else 0
                output, r = _recur(state, k, k0, k1, step, K, d, write, nonlinear, q)
                store(y_rows, c * LANES, output)
            scatter(y_rows, 0, count, y, t0 * V + column0, H * V, width0)
            scatter(y_rows, HALF, count, y, t1 * V + column1, H * V, width1)
        scatter(state, 0, K, final, head0 * K * V + column0, V, width0)
        scatter(state, HALF, K, final, head1 * K * V + column1, V, width1)
