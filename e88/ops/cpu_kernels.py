"""The recurrence on the CPU, forward and backward, over blocks of state columns (see `cpu_blocks`).

Columns depend on one another only through the sums over a row that make dq, dk, dg and dbeta, so the sums of the
forward pass live in registers. Arrays are flat float32. `slots` counts the segments before each group: where, times
the blocks of a group, its checkpoints begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from e88.ops.cpu_blocks import add_gate_sums, add_key_sums, blocks_of, copy, gather, gather_state, place, read, scatter
from e88.ops.cpu_simd import HALF, LANES, load, pair, splat, store, tanh

# Steps between two saved states.
SEGMENT = 16
_ROWS = SEGMENT * LANES
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@njit
def _recur(
    state: Any, k: Any, k0: int, k1: int, step: int, K: int, d: Any, write: Any, nonlinear: bool, q: Any
) -> tuple[Any, Any]:
    """One step in place: the output, and what the next key (`step` further on) reads from the new state."""
    output = splat(_ZERO)
    r = splat(_ZERO)
    for i in range(K):
        x = d * load(state, i * LANES) + pair(k, k0 + i, k1 + i) * write
        if nonlinear:
            x, _ = tanh(x)
        store(state, i * LANES, x)
        output = output + pair(q, k0 + i, k1 + i) * x
        r = r + pair(k, k0 + step + i, k1 + step + i) * x
    return output, r


@njit
def _replay(
    states: Any, at: int, slopes: Any, k: Any, k0: int, k1: int, step: int, K: int, d: Any, write: Any, nonlinear: bool
) -> Any:
    """One step that keeps the new state and the activation's slope; what the next key reads."""
    r = splat(_ZERO)
    size = K * LANES
    for i in range(K):
        x = d * load(states, at + i * LANES) + pair(k, k0 + i, k1 + i) * write
        slope = splat(_ONE)
        if nonlinear:
            x, slope = tanh(x)
        store(states, at + size + i * LANES, x)
        store(slopes, at + size + i * LANES, slope)
        r = r + pair(k, k0 + step + i, k1 + step + i) * x
    return r


@njit
def _step_back(
    Z: Any,
    states: Any,
    slopes: Any,
    at: int,
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
) -> tuple[Any, Any]:
    """From the gradient Z of step t's preactivation to that of step t - 1, in place.

    `at` is the place of S_{t-1} and of its slope; dy and `step` belong to step t - 1. Leaves in `k_rows` and
    `q_rows` the terms whose sums over lanes are dk_t and dq_{t-1}; returns Z_{t-1}^T k_{t-1} and the sum of
    Z_t * S_{t-1} over rows.
    """
    w = splat(_ZERO)
    overlap = splat(_ZERO)
    for i in range(K):
        z = load(Z, i * LANES)
        s = load(states, at + i * LANES)
        overlap = overlap + z * s
        store(k_rows, i * LANES, z * write - s * d_delta)
        store(q_rows, i * LANES, s * dy)
        z = d * z - pair(k, k0 + i, k1 + i) * d_delta + pair(q, k0 - step + i, k1 - step + i) * dy
        z = z * load(slopes, at + i * LANES)
        w = w + pair(k, k0 - step + i, k1 - step + i) * z
        store(Z, i * LANES, z)
    return w, overlap


@njit
def _enter(Z: Any, slopes: Any, at: int, k: Any, k0: int, k1: int, K: int) -> Any:
    """Turn the gradient of a segment's last state into that of its preactivation, in place; Z^T k."""
    w = splat(_ZERO)
    for i in range(K):
        z = load(Z, i * LANES) * load(slopes, at + i * LANES)
        w = w + pair(k, k0 + i, k1 + i) * z
        store(Z, i * LANES, z)
    return w


@njit
def _add_output(Z: Any, states: Any, at: int, q: Any, k0: int, k1: int, K: int, dy: Any, q_rows: Any) -> None:
    """Add q dy^T to the gradient of the state at `at`, and leave in `q_rows` the terms of dq."""
    for i in range(K):
        store(q_rows, i * LANES, load(states, at + i * LANES) * dy)
        store(Z, i * LANES, load(Z, i * LANES) + pair(q, k0 + i, k1 + i) * dy)


def forward_size(K: int) -> int:
    """Floats of scratch that a worker of `forward` needs."""
    return K * LANES + 2 * _ROWS


def backward_size(K: int) -> int:
    """Floats of scratch that a worker of `backward` needs."""
    return (2 * (SEGMENT + 1) + 1) * K * LANES + 2 * (K + HALF) * LANES + 5 * _ROWS + LANES + HALF


@njit(nogil=True, cache=True, error_model="numpy")
def forward(
    q: Any,
    k: Any,
    v: Any,
    decay: Any,
    beta: Any,
    initial: Any,
    ends: Any,
    groups: Any,
    slots: Any,
    H: int,
    K: int,
    V: int,
    nonlinear: bool,
    y: Any,
    final: Any,
    checkpoints: Any,
    scratch: Any,
    worker: int,
    workers: int,
) -> None:
    """Every `workers`-th block from block `worker` on. `beta`, `initial` and `checkpoints` may be empty."""
    size = K * LANES
    state = scratch[worker, :size]
    v_rows = scratch[worker, size : size + _ROWS]
    y_rows = scratch[worker, size + _ROWS : size + 2 * _ROWS]
    blocks = blocks_of(groups, V)
    for unit in range(worker, groups.shape[0] * blocks, workers):
        group, block = unit // blocks, unit % blocks
        head0, n, token0, column0, width0 = place(groups[group], 2 * block, ends, H, V)
        head1, n, token1, column1, width1 = place(groups[group], 2 * block + 1, ends, H, V)
        T = ends[n + 1] - ends[n]
        gather_state(state, initial, head0 * K * V + column0, head1 * K * V + column1, K, V, width0, width1)
        slot = (slots[group] * blocks + block * ((T + SEGMENT - 1) // SEGMENT)) * size
        r = splat(_ZERO)
        if T > 0:
            r = read(state, 0, K, k, token0 * K, token1 * K)
        for start in range(0, T, SEGMENT):
            count = min(SEGMENT, T - start)
            if checkpoints.size:
                copy(checkpoints, slot + start // SEGMENT * size, state, 0, K)
            t0, t1 = token0 + start * H, token1 + start * H
            gather(v_rows, 0, count, v, t0 * V + column0, H * V, width0)
            gather(v_rows, HALF, count, v, t1 * V + column1, H * V, width1)
            for c in range(count):
                write = load(v_rows, c * LANES) - r
                if beta.size:
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


@njit(nogil=True, cache=True, error_model="numpy")
def backward(
    q: Any,
    k: Any,
    v: Any,
    decay: Any,
    beta: Any,
    ends: Any,
    groups: Any,
    slots: Any,
    H: int,
    K: int,
    V: int,
    nonlinear: bool,
    checkpoints: Any,
    dy: Any,
    d_final: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    d_decay: Any,
    d_beta: Any,
    d_initial: Any,
    scratch: Any,
    worker: int,
    workers: int,
) -> None:
    """Every `workers`-th group from group `worker` on. dq, dk, d_decay and d_beta are added to."""
    size = K * LANES
    rows = (K + HALF - 1) // HALF * HALF * LANES
    at = 0
    states = scratch[worker, at : at + (SEGMENT + 1) * size]
    at += states.size
    slopes = scratch[worker, at : at + (SEGMENT + 1) * size]
    at += slopes.size
    Z = scratch[worker, at : at + size]
    at += size
    k_rows = scratch[worker, at : at + rows]
    at += rows
    q_rows = scratch[worker, at : at + rows]
    at += rows
    dy_rows = scratch[worker, at : at + _ROWS + LANES]
    at += _ROWS + LANES
    e_rows = scratch[worker, at : at + _ROWS]
    at += _ROWS
    dv_rows = scratch[worker, at : at + _ROWS]
    at += _ROWS
    decay_rows = scratch[worker, at : at + _ROWS]
    at += _ROWS
    beta_rows = scratch[worker, at : at + _ROWS]
    at += _ROWS
    sums = scratch[worker, at : at + HALF]

    for i in range(K):
        store(slopes, i * LANES, splat(_ONE))
    blocks = blocks_of(groups, V)
    for unit in range(worker * blocks, groups.shape[0] * blocks):
        group, block = unit // blocks, unit % blocks
        if group % workers != worker:
            continue
        head0, n, token0, column0, width0 = place(groups[group], 2 * block, ends, H, V)
        head1, n, token1, column1, width1 = place(groups[group], 2 * block + 1, ends, H, V)
        together = head0 == head1 and width1 > 0
        T = ends[n + 1] - ends[n]
        gather_state(Z, d_final, head0 * K * V + column0, head1 * K * V + column1, K, V, width0, width1)
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

            r = read(states, 0, K, k, t0 * K, t1 * K)
            for c in range(count):
                e = load(e_rows, c * LANES) - r
                store(e_rows, c * LANES, e)
                if beta.size:
                    e = e * pair(beta, t0 + c * H, t1 + c * H)
                d = pair(decay, t0 + c * H, t1 + c * H)
                k0, k1 = (t0 + c * H) * K, (t1 + c * H) * K
                step = H * K if start + c + 1 < T else 0
                r = _replay(states, c * size, slopes, k, k0, k1, step, K, d, e, nonlinear)

            k0, k1 = (t0 + (count - 1) * H) * K, (t1 + (count - 1) * H) * K
            if segment == segments - 1:
                _add_output(Z, states, count * size, q, k0, k1, K, load(dy_rows, count * LANES), q_rows)
                add_key_sums(q_rows, K, dq, k0, k1, together, width1, sums)
            w = _enter(Z, slopes, count * size, k, k0, k1, K)
            for c in range(count - 1, -1, -1):
                e = load(e_rows, c * LANES)
                write = e
                d_delta = w
                store(beta_rows, c * LANES, w * e)
                if beta.size:
                    b = pair(beta, t0 + c * H, t1 + c * H)
                    write = b * e
                    d_delta = b * w
                store(dv_rows, c * LANES, d_delta)
                d = pair(decay, t0 + c * H, t1 + c * H)
                k0, k1 = (t0 + c * H) * K, (t1 + c * H) * K
                step = H * K if start + c > 0 else 0
                output = load(dy_rows, c * LANES)
                w, overlap = _step_back(
                    Z, states, slopes, c * size, k, q, k0, k1, step, K, d, write, d_delta, output, k_rows, q_rows
                )
                store(decay_rows, c * LANES, overlap)
                add_key_sums(k_rows, K, dk, k0, k1, together, width1, sums)
                if step > 0:
                    add_key_sums(q_rows, K, dq, k0 - step, k1 - step, together, width1, sums)

            scatter(dv_rows, 0, count, dv, t0 * V + column0, H * V, width0)
            scatter(dv_rows, HALF, count, dv, t1 * V + column1, H * V, width1)
            add_gate_sums(decay_rows, count, d_decay, t0, t1, H, together, width1, sums)
            if beta.size:
                add_gate_sums(beta_rows, count, d_beta, t0, t1, H, together, width1, sums)
        scatter(Z, 0, K, d_initial, head0 * K * V + column0, V, width0)
        scatter(Z, HALF, K, d_initial, head1 * K * V + column1, V, width1)
