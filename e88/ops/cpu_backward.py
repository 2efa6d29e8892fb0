"""The backward pass on the CPU, over blocks of state columns (see `cpu_blocks`); formulas as in `checkpointed`.

Segments are walked from the last to the first: replayed from the saved state, then stepped back through. dq, dk, dg
and dbeta are sums over columns, for a whole head: its blocks are done one after another, by one worker.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from e88.ops.cpu_blocks import SEGMENT, STEPS, add_sums, copy, gather, place, read, scatter
from e88.ops.cpu_simd import HALF, LANES, advance, floats_at, integers_at, load, pair, splat, store, store_halves, take
from e88.ops.cpu_tanh import SCALE, tanh_and_slope

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@njit(forceinline=True)
def _replay(
    state: Any, slopes: Any, k: Any, k0: int, k1: int, step: int, K: int, d: Any, write: Any, nonlinear: bool
) -> Any:
    """One step that leaves the new state and the activation's slope after the old ones; what the next key reads."""
    r = splat(_ZERO)
    size = K * LANES
    gain = splat(SCALE if nonlinear else _ONE)
    decay, delta = d * gain, write * gain
    for i in range(K):
        x = decay * load(state, i * LANES) + pair(k, k0 + i, k1 + i) * delta
        slope = splat(_ONE)
        if nonlinear:
            x, slope = tanh_and_slope(x)
        store(state, size + i * LANES, x)
        store(slopes, size + i * LANES, slope)
        r = r + pair(k, k0 + step + i, k1 + step + i) * x
    return r


@njit(forceinline=True)
def _step_back(
    Z: Any,
    state: Any,
    slopes: Any,
    k: Any,
    q: Any,
    k0: int,
    k1: int,
    step: int,
    K: int,
    d: Any,
    write: Any,
    d_delta: Any,
    dy: Any,
    k_rows: Any,
    q_rows: Any,
    high: int,
    together: bool,
) -> tuple[Any, Any]:
    """From the gradient Z of step t's preactivation to that of step t - 1, in place.

    `state` and `slopes`, `dy` and `step` belong to step t - 1. Leaves in `k_rows` and `q_rows` the terms whose sums
    over columns are dk_t and dq_{t-1}; returns Z_{t-1}^T k_{t-1} and the sum of Z_t * S_{t-1} over rows.
    """
    w = splat(_ZERO)
    overlap = splat(_ZERO)
    for i in range(K):
        z = load(Z, i * LANES)
        s = load(state, i * LANES)
        overlap = overlap + z * s
        store_halves(k_rows, i * HALF, high + i * HALF, z * write - s * d_delta, together)
        store_halves(q_rows, i * HALF, high + i * HALF, s * dy, together)
        z = d * z - pair(k, k0 + i, k1 + i) * d_delta + pair(q, k0 - step + i, k1 - step + i) * dy
        z = z * load(slopes, i * LANES)
        w = w + pair(k, k0 - step + i, k1 - step + i) * z
        store(Z, i * LANES, z)
    return w, overlap


@njit
def _enter(Z: Any, slopes: Any, k: Any, k0: int, k1: int, K: int) -> Any:
    """Turn the gradient of a segment's last state into that of its preactivation, in place; Z^T k."""
    w = splat(_ZERO)
    for i in range(K):
        z = load(Z, i * LANES) * load(slopes, i * LANES)
        w = w + pair(k, k0 + i, k1 + i) * z
        store(Z, i * LANES, z)
    return w


@njit
def _add_output(
    Z: Any, state: Any, q: Any, k0: int, k1: int, K: int, dy: Any, q_rows: Any, high: int, together: bool
) -> None:
    """Add q dy^T to the gradient of a state, and leave in `q_rows` the terms of dq."""
    for i in range(K):
        store_halves(q_rows, i * HALF, high + i * HALF, load(state, i * LANES) * dy, together)
        store(Z, i * LANES, load(Z, i * LANES) + pair(q, k0 + i, k1 + i) * dy)


def scratch_size(K: int) -> int:
    """Floats of scratch that a worker needs."""
    return (2 * (SEGMENT + 1) + 1) * K * LANES + 2 * (K + HALF) * LANES + 5 * STEPS + LANES + HALF


@njit(error_model="numpy")
def backward(
    q: Any,
    k: Any,
    v: Any,
    decay: Any,
    beta: Any,
    checkpoints: Any,
    dy: Any,
    d_final: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    d_decay: Any,
    d_beta: Any,
    d_initial: Any,
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
    """Groups, as `counter` hands them out, until there are none left. `scratch` is the worker's own."""
    gated = beta != 0
    q, k, v, decay, beta = floats_at(q), floats_at(k), floats_at(v), floats_at(decay), floats_at(beta)
    checkpoints, dy, d_final = floats_at(checkpoints), floats_at(dy), floats_at(d_final)
    dq, dk, dv, d_decay = floats_at(dq), floats_at(dk), floats_at(dv), floats_at(d_decay)
    d_beta, d_initial, scratch = floats_at(d_beta), floats_at(d_initial), floats_at(scratch)
    ends, groups = integers_at(ends), integers_at(groups)
    slots, counter = integers_at(slots), integers_at(counter)

    size = K * LANES
    # Where the upper half's rows start: sums are taken over HALF rows at a time.
    high = (K + HALF - 1) // HALF * HALF * HALF
    high_step = SEGMENT * HALF
    states = scratch
    slopes = advance(states, (SEGMENT + 1) * size)
    Z = advance(slopes, (SEGMENT + 1) * size)
    k_rows = advance(Z, size)
    q_rows = advance(k_rows, 2 * high)
    dy_rows = advance(q_rows, 2 * high)
    e_rows = advance(dy_rows, STEPS + LANES)
    dv_rows = advance(e_rows, STEPS)
    decay_rows = advance(dv_rows, STEPS)
    beta_rows = advance(decay_rows, STEPS)
    sums = advance(beta_rows, STEPS)

    for i in range(K):
        store(slopes, i * LANES, splat(_ONE))
    group = take(counter)
    while group < group_count:
        for block in range(blocks):
            head0, n, token0, column0, width0 = place(groups, group, group_size, 2 * block, ends, H, V)
            head1, n, token1, column1, width1 = place(groups, group, group_size, 2 * block + 1, ends, H, V)
            if width0 == 0:
                continue
            together = head0 == head1 and width1 > 0
            # A head's first block writes its sums, and the others add to them.
            keep0, keep1 = column0 > 0, column1 > 0
            T = ends[n + 1] - ends[n]
            gather(Z, 0, K, d_final, head0 * K * V + column0, V, width0)
            gather(Z, HALF, K, d_final, head1 * K * V + column1, V, width1)
            segments = (T + SEGMENT - 1) // SEGMENT
            slot = (slots[group] * blocks + block * segments) * size
            for segment in range(segments - 1, -1, -1):
                start = segment * SEGMENT
                count = min(SEGMENT, T - start)
                t0, t1 = token0 + start * H, token1 + start * H
                copy(states, 0, checkpoints, slot + segment * size, K)
                gather(e_rows, 0, count, v, t0 * V + column0, H * V, width0)
                gather(e_rows, HALF, count, v, t1 * V + column1, H * V, width1)
                gather(dy_rows, LANES, count, dy, t0 * V + column0, H * V, width0)
                gather(dy_rows, LANES + HALF, count, dy, t1 * V + column1, H * V, width1)
                if start == 0:
                    store(dy_rows, 0, splat(_ZERO))
                else:
                    gather(dy_rows, 0, 1, dy, (t0 - H) * V + column0, H * V, width0)
                    gather(dy_rows, HALF, 1, dy, (t1 - H) * V + column1, H * V, width1)

                r = read(states, K, k, t0 * K, t1 * K)
                for c in range(count):
                    e = load(e_rows, c * LANES) - r
                    store(e_rows, c * LANES, e)
                    if gated:
                        e = e * pair(beta, t0 + c * H, t1 + c * H)
                    d = pair(decay, t0 + c * H, t1 + c * H)
                    k0, k1 = (t0 + c * H) * K, (t1 + c * H) * K
                    step = H * K if start + c + 1 < T else 0
                    r = _replay(
                        advance(states, c * size), advance(slopes, c * size), k, k0, k1, step, K, d, e, nonlinear
                    )

                k0, k1 = (t0 + (count - 1) * H) * K, (t1 + (count - 1) * H) * K
                if segment == segments - 1:
                    last = load(dy_rows, count * LANES)
                    _add_output(Z, advance(states, count * size), q, k0, k1, K, last, q_rows, high, together)
                    add_sums(q_rows, high, K, dq, k0, k1, 1, together, width1, keep0, keep1, sums)
                w = _enter(Z, advance(slopes, count * size), k, k0, k1, K)
                for c in range(count - 1, -1, -1):
                    e = load(e_rows, c * LANES)
                    write = e
                    d_delta = w
                    store_halves(beta_rows, c * HALF, high_step + c * HALF, w * e, together)
                    if gated:
                        b = pair(beta, t0 + c * H, t1 + c * H)
                        write = b * e
                        d_delta = b * w
                    store(dv_rows, c * LANES, d_delta)
                    d = pair(decay, t0 + c * H, t1 + c * H)
                    k0, k1 = (t0 + c * H) * K, (t1 + c * H) * K
                    step = H * K if start + c > 0 else 0
                    output = load(dy_rows, c * LANES)
                    state, slope = advance(states, c * size), advance(slopes, c * size)
                    # The same code twice, for constants: with one head its keys are read once and halves add up.
                    if together:
                        w, overlap = _step_back(
                            Z, state, slope, k, q, k0, k0, step, K, d, write, d_delta, output, k_rows, q_rows, 0, True
                        )
                    else:
                        w, overlap = _step_back(
                            Z,
                            state,
                            slope,
                            k,
                            q,
                            k0,
                            k1,
                            step,
                            K,
                            d,
                            write,
                            d_delta,
                            output,
                            k_rows,
                            q_rows,
                            high,
                            False,
                        )
                    store_halves(decay_rows, c * HALF, high_step + c * HALF, overlap, together)
                    add_sums(k_rows, high, K, dk, k0, k1, 1, together, width1, keep0, keep1, sums)
                    if step > 0:
                        add_sums(q_rows, high, K, dq, k0 - step, k1 - step, 1, together, width1, keep0, keep1, sums)

                scatter(dv_rows, 0, count, dv, t0 * V + column0, H * V, width0)
                scatter(dv_rows, HALF, count, dv, t1 * V + column1, H * V, width1)
                add_sums(decay_rows, high_step, count, d_decay, t0, t1, H, together, width1, keep0, keep1, sums)
                if gated:
                    add_sums(beta_rows, high_step, count, d_beta, t0, t1, H, together, width1, keep0, keep1, sums)
            scatter(Z, 0, K, d_initial, head0 * K * V + column0, V, width0)
            scatter(Z, HALF, K, d_initial, head1 * K * V + column1, V, width1)
        group = take(counter)
