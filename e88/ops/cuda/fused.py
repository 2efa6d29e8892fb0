"""The 16-bit CUDA kernels from raw projections to the gated output.

Letters as in `e88.ops.contract`. The gradients of qkv, gate, a and b are neighbouring columns of one tensor, as their
operands are where one matrix product made all four, so that nobody has to put them together; zeros fill its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from e88.ops.cuda.launch import checkpoint_rows, column, evenly_spaced, launch, plan_for, rows
from e88.ops.cuda.plan import Edges, Plan
from e88.ops.differentiable import differentiable
from e88.ops.operands import ALIGN, add_parts, parts_of, sequences

FINISH_THREADS = 128


class Projections(NamedTuple):
    """qkv in float16 or bfloat16, gate in its dtype, a and b in its dtype or both in float32, ends in int64, the others
    in float32."""

    qkv: Tensor
    a: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    b: Tensor | None
    gate: Tensor | None
    initial_state: Tensor | None
    ends: Tensor | None
    H: int
    K: int
    V: int


class Results(NamedTuple):
    y: Tensor
    final_state: Tensor
    # For the way back: states, e_t, and y before its gate.
    checkpoints: Tensor | None
    written: Tensor | None
    ungated: Tensor | None


class Saved(NamedTuple):
    qkv: Tensor
    a: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    b: Tensor | None
    gate: Tensor | None
    ends: Tensor | None
    checkpoints: Tensor | None
    written: Tensor | None
    ungated: Tensor | None
    H: int
    K: int
    V: int
    need_initial: bool


class Gradients(NamedTuple):
    """Those of qkv, gate, a and b side by side [B, T, width], a and b [B, T, H] where they are float32, A_log and
    dt_bias [2, H]."""

    packed: Tensor
    a: Tensor | None
    b: Tensor | None
    vectors: Tensor | None
    initial_state: Tensor | None


def _plan(x: Projections | Saved) -> Plan:
    edges = Edges(fused=True, gate=x.gate is not None, narrow=x.a.dtype == x.qkv.dtype)
    return plan_for(x.qkv, sequences(x.qkv, x.ends), (x.H, x.K, x.V), True, x.b is not None, edges)


def _parts(qkv: Tensor, x: Projections | Saved) -> list[int]:
    """Where q, k and v, or whatever lies as they do, begin in `qkv`."""
    n = x.H * x.K
    return [column(qkv, first) for first in (0, n, n if x.qkv.shape[-1] == 2 * n else 2 * n)]


def _scalars(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """a and b with the same distance between tokens; copies only if needed."""
    given = [x for x in (a, b) if x is not None]
    if all(evenly_spaced(x) and x.stride(1) == a.stride(1) for x in given):
        return a, b
    return a.contiguous(), None if b is None else b.contiguous()


def _widths(x: Saved) -> list[int]:
    """Columns in the packed gradient of qkv, gate, a and b, 0 for what is not there, and of the space behind them."""
    there = [0 if u is None or u.dtype != x.qkv.dtype else u.shape[-1] for u in (x.qkv, x.gate, x.a, x.b)]
    # The space holds zeros, so that a product can take whole rows.
    return [*there, -sum(there) % ALIGN]


def _pieces(x: Saved, out: Gradients) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of qkv, gate, a and b, wherever they are."""
    widths = _widths(x)
    qkv, gate, a, b, _ = out.packed.split_with_sizes(widths, -1)
    return qkv, gate if widths[1] else None, a if widths[2] else out.a, b if widths[3] else out.b


def _results(x: Projections, save: bool) -> Results:
    (B, T, _), N = x.qkv.shape, sequences(x.qkv, x.ends)
    y = x.qkv.new_empty(B, T, x.H * x.V)
    final_state = x.qkv.new_empty(N, x.H, x.K, x.V, dtype=torch.float32)
    if not save:
        return Results(y, final_state, None, None, None)
    plan = _plan(x)
    checkpoints = x.qkv.new_empty(checkpoint_rows(plan, B * T, N), x.H, x.V, x.K, dtype=plan.saved_dtype)
    written = x.qkv.new_empty(B, T, x.H, x.V, dtype=torch.float16)
    return Results(y, final_state, checkpoints, written, None if x.gate is None else y.new_empty(y.shape))


def _forward(x: Projections, out: Results) -> None:
    N, T = out.final_state.shape[0], x.qkv.shape[1]
    if N * x.H == 0:
        return
    plan = _plan(x)
    qkv, gate = rows(x.qkv), None if x.gate is None else rows(x.gate)
    a, b = _scalars(x.a, x.b)
    packed = [None if u is None else u.contiguous() for u in (x.initial_state, x.ends, x.A_log, x.dt_bias)]
    results = [out.y, out.final_state, out.written, out.checkpoints]
    pointers = [*_parts(qkv, x), a, b, *packed[:2], *results, *packed[2:], gate, out.ungated]
    numbers = [qkv.stride(1)] * 3 + [a.stride(1), 0 if gate is None else gate.stride(1), T, x.H]
    grid = N * x.H * plan.splits, plan.threads(False)
    launch("forward", plan, out.checkpoints is not None, qkv.device, grid, pointers, numbers)


def _keep(x: Projections, out: Results) -> Saved:
    need_initial = x.initial_state is not None and x.initial_state.requires_grad
    return Saved(*x[:6], x.ends, *out[2:], x.H, x.K, x.V, need_initial)


def _gradients(dy: Tensor, dfinal: Tensor | None, x: Saved) -> Gradients:
    (B, T, _), H, widths = x.qkv.shape, x.H, _widths(x)

    def room(wanted: bool, *shape: int) -> Tensor | None:
        return x.qkv.new_empty(*shape, dtype=torch.float32) if wanted else None

    return Gradients(
        x.qkv.new_empty(B, T, sum(widths)),
        room(not widths[2], B, T, H),
        room(not widths[3] and x.b is not None, B, T, H),
        room(x.A_log is not None, 2, H),
        room(x.need_initial, sequences(x.qkv, x.ends), H, x.K, x.V),
    )


def _backward(dy: Tensor, dfinal: Tensor | None, x: Saved, out: Gradients) -> None:
    (B, T, width), N, H = x.qkv.shape, sequences(x.qkv, x.ends), x.H
    if N * H == 0:
        if out.vectors is not None:
            out.vectors.zero_()
        return
    plan = _plan(x)
    splits = plan.splits
    qkv, gate = rows(x.qkv), None if x.gate is None else rows(x.gate)
    a, b = _scalars(x.a, x.b)
    final, ends, A_log, dt_bias = (None if u is None else u.contiguous() for u in (dfinal, x.ends, x.A_log, x.dt_bias))
    q, k, v = _parts(qkv, x)
    raw_dq, raw_dk, raw_dv = _parts(out.packed, x)
    tied = width == 2 * H * x.K
    dv = qkv.new_empty(B, T, H * x.V) if tied else out.packed
    out.packed[..., sum(_widths(x)[:-1]) :] = 0
    _, dgate, da, db = _pieces(x, out)
    dq: Tensor | int = raw_dq
    dk: Tensor | int = raw_dk
    dscalars = parts_of([da, db], splits)
    if splits > 1:
        dq, dk = (qkv.new_empty(splits, B, T, H * x.K, dtype=torch.float32) for _ in range(2))
    shares = None if out.vectors is None else out.vectors.new_empty(2, N * splits, H)
    inputs = [q, k, x.written, a, b, ends, x.checkpoints, rows(dy), final, v, A_log, dt_bias, gate, x.ungated]
    gradients = [dq, dk, dv if tied else raw_dv, *dscalars, out.initial_state, dgate, shares]
    assert dscalars[0] is not None
    steps = [qkv.stride(1)] * 3 + [a.stride(1), 0 if gate is None else gate.stride(1)]
    numbers = [*steps, out.packed.stride(1), dv.stride(1), dscalars[0].stride(-2), B * T, T, H]
    grid = N * H * splits, plan.threads(True)
    launch("backward", plan, True, qkv.device, grid, [*inputs, *gradients], numbers)
    if splits > 1:
        lanes = 2 * B * T * H * plan.row_lanes
        numbers = [qkv.stride(1), qkv.stride(1), out.packed.stride(1), B * T, H]
        grid = -(-lanes // FINISH_THREADS), FINISH_THREADS
        launch("finish", plan, True, qkv.device, grid, [q, k, dq, dk, raw_dq, raw_dk], numbers)
    add_parts([da, db], dscalars)
    if tied:
        out.packed[..., H * x.K : width] += dv
    if shares is not None:
        torch.sum(shares, 1, out=out.vectors)


def _unpack(x: Saved, found: Gradients) -> tuple[Tensor | None, ...]:
    qkv, gate, a, b = _pieces(x, found)
    vectors = (None, None) if found.vectors is None else found.vectors.unbind(0)
    return qkv, a, *vectors, b, gate, found.initial_state


fused = differentiable(
    "e88::cuda_fused",
    Projections,
    Saved,
    _results,
    _forward,
    _keep,
    _gradients,
    _backward,
    _unpack,
    device_types="cuda",
)
