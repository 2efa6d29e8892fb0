"""The 16-bit CUDA kernels from raw projections to the gated output, behind `torch.library` operators.

Letters as in `e88.ops.contract`. The gradients of qkv, gate, a and b are neighbouring columns of one tensor, as their
operands are where one matrix product made all four, so that nobody has to put them together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from e88.ops.cuda.launch import checkpoint_rows, evenly_spaced, launch, plan_for, rows
from e88.ops.cuda.plan import Edges, Plan

FINISH_THREADS = 128
ALIGN = 64


def _plan(
    qkv: Tensor, a: Tensor, b: Tensor | None, gate: Tensor | None, sequences: int, H: int, K: int, V: int
) -> Plan:
    edges = Edges(fused=True, gate=gate is not None, narrow=a.dtype == qkv.dtype)
    return plan_for(qkv, sequences, (H, K, V), True, b is not None, edges)


def _parts(qkv: Tensor, H: int, K: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, or whatever lies as they do, as views [B, T, ...] of `qkv`."""
    k = qkv[..., H * K : 2 * H * K]
    return qkv[..., : H * K], k, k if qkv.shape[-1] == 2 * H * K else qkv[..., 2 * H * K : H * (2 * K + V)]


def _scalars(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """a and b with the same distance between tokens; copies only if needed."""
    given = [x for x in (a, b) if x is not None]
    if all(evenly_spaced(x) and x.stride(1) == a.stride(1) for x in given):
        return a, b
    return a.contiguous(), None if b is None else b.contiguous()


class Columns(NamedTuple):
    """Where the packed gradient has its parts: the first column of each, None for what is not there, and the width."""

    gate: int | None
    a: int | None
    b: int | None
    width: int


def _columns(qkv: Tensor, a: Tensor, b: Tensor | None, gate: Tensor | None) -> Columns:
    at = qkv.shape[-1]

    def place(x: Tensor | None) -> int | None:
        nonlocal at
        if x is None or x.dtype != qkv.dtype:
            return None
        at += x.shape[-1]
        return at - x.shape[-1]

    first = place(gate), place(a), place(b)
    # Rows begin at a line of the cache, 128 bytes; a head's piece of a row would otherwise touch one more.
    return Columns(*first, -(-at // ALIGN) * ALIGN)


@torch.library.custom_op("e88::cuda_fused_forward", mutates_args=(), device_types="cuda")
def fused_forward(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    ends: Tensor | None,
    H: int,
    K: int,
    V: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, H*V], the final state, and for the way back: states, e_t and y before its gate.

    qkv is float16 or bfloat16, gate of its dtype, a and b of its dtype or both float32, the other tensors float32.
    """
    outputs = _forward_fake(qkv, a, A_log, dt_bias, b, gate, initial_state, ends, H, K, V, save)
    y, final_state, checkpoints, written, ungated = outputs
    sequences, T = final_state.shape[0], qkv.shape[1]
    if sequences * H == 0:
        return outputs
    plan = _plan(qkv, a, b, gate, sequences, H, K, V)
    x, z = rows(qkv), None if gate is None else rows(gate)
    a, b = _scalars(a, b)
    vectors = [None if u is None else u.contiguous() for u in (initial_state, ends, A_log, dt_bias)]
    saved = [written, checkpoints] if save else [None, None]
    pointers = [*_parts(x, H, K, V), a, b, *vectors[:2], y, final_state, *saved, *vectors[2:], z, ungated]
    numbers = [x.stride(1)] * 3 + [a.stride(1), 0 if z is None else z.stride(1), T, H]
    grid = sequences * H * plan.splits, plan.threads(False)
    launch("forward", plan, save, qkv.device, grid, pointers, numbers)
    return outputs


@fused_forward.register_fake
def _forward_fake(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    ends: Tensor | None,
    H: int,
    K: int,
    V: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, _ = qkv.shape
    sequences = B if ends is None else ends.shape[0] - 1
    plan = _plan(qkv, a, b, gate, sequences, H, K, V)
    y = qkv.new_empty(B, T, H * V)
    final_state = qkv.new_empty(sequences, H, K, V, dtype=torch.float32)
    kept = checkpoint_rows(plan, B * T, sequences) if save else 0
    checkpoints = qkv.new_empty(kept, H, V, K, dtype=plan.saved_dtype)
    written = qkv.new_empty(B, T if save else 0, H, V, dtype=torch.float16)
    ungated = qkv.new_empty(B, T if save and gate is not None else 0, H * V)
    return y, final_state, checkpoints, written, ungated


@torch.library.custom_op("e88::cuda_fused_backward", mutates_args=(), device_types="cuda")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    ends: Tensor | None,
    checkpoints: Tensor,
    written: Tensor,
    ungated: Tensor,
    H: int,
    K: int,
    V: int,
    need_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The packed gradient [B, T, width], those of a and b where they are float32, of (A_log, dt_bias) [2, H] and of the
    initial state."""
    outputs = _backward_fake(
        dy, dfinal, qkv, a, A_log, dt_bias, b, gate, ends, checkpoints, written, ungated, H, K, V, need_initial
    )
    packed, da, db, dvectors, dinitial = outputs
    B, T, _ = qkv.shape
    sequences = B if ends is None else ends.shape[0] - 1
    if sequences * H == 0:
        dvectors.zero_()
        return outputs
    plan = _plan(qkv, a, b, gate, sequences, H, K, V)
    splits = plan.splits
    columns = _columns(qkv, a, b, gate)
    x, z = rows(qkv), None if gate is None else rows(gate)
    a, b = _scalars(a, b)
    final, ends, A_log, dt_bias = (None if u is None else u.contiguous() for u in (dfinal, ends, A_log, dt_bias))
    q, k, v = _parts(x, H, K, V)
    raw_dq, raw_dk, dv = _parts(packed, H, K, V)
    tied = qkv.shape[-1] == 2 * H * K
    if tied:
        dv = qkv.new_empty(B, T, H * V)
    scalars = [da if columns.a is None else packed[..., columns.a :]]
    scalars.append(db if columns.b is None else packed[..., columns.b :])
    sums = [raw_dq, raw_dk, *scalars]
    if splits > 1:
        sums = [x.new_empty(splits, B, T, n, dtype=torch.float32) for n in (H * K, H * K, H, H if b is not None else 0)]
    shares = None if A_log is None else dvectors.new_empty(2, sequences * splits, H)
    dgate = None if columns.gate is None else packed[..., columns.gate :]
    inputs = [q, k, written, a, b, ends, checkpoints, rows(dy), final, v, A_log, dt_bias, z, ungated]
    gradients = [sums[0], sums[1], dv, sums[2], sums[3], dinitial if need_initial else None, dgate, shares]
    steps = [x.stride(1)] * 3 + [a.stride(1), 0 if z is None else z.stride(1), packed.stride(1), dv.stride(1)]
    numbers = [*steps, sums[2].stride(-2), B * T, T, H]
    grid = sequences * H * splits, plan.threads(True)
    launch("backward", plan, True, qkv.device, grid, [*inputs, *gradients], numbers)
    if splits > 1:
        lanes = 2 * B * T * H * plan.row_lanes
        numbers = [x.stride(1), x.stride(1), packed.stride(1), B * T, H]
        grid = -(-lanes // FINISH_THREADS), FINISH_THREADS
        launch("finish", plan, True, qkv.device, grid, [q, k, sums[0], sums[1], raw_dq, raw_dk], numbers)
        for total, parts in zip(scalars, sums[2:], strict=True):
            if parts.numel():
                total[..., :H] = parts.sum(0)
    if tied:
        raw_dk += dv
    if shares is None:
        dvectors.zero_()
    else:
        torch.sum(shares, 1, out=dvectors)
    return outputs


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    ends: Tensor | None,
    checkpoints: Tensor,
    written: Tensor,
    ungated: Tensor,
    H: int,
    K: int,
    V: int,
    need_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, _ = qkv.shape
    sequences = B if ends is None else ends.shape[0] - 1
    columns = _columns(qkv, a, b, gate)
    packed = qkv.new_empty(B, T, columns.width)
    da = a.new_empty(B if columns.a is None else 0, T, H)
    db = a.new_empty(B if columns.b is None and b is not None else 0, T, H)
    dvectors = qkv.new_empty(2, H, dtype=torch.float32)
    dinitial = dvectors.new_empty(sequences if need_initial else 0, H, K, V)
    return packed, da, db, dvectors, dinitial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, a, A_log, dt_bias, b, gate, initial_state, ends, H, K, V, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, a, A_log, dt_bias, b, gate, ends, *output[2:])
    ctx.sizes = H, K, V
    ctx.need_initial = initial_state is not None and initial_state.requires_grad


def _vjp(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, a, A_log, dt_bias, b, gate, ends, *saved = ctx.saved_tensors
    H, K, V = ctx.sizes
    if dy is None:
        dy = qkv.new_zeros(*qkv.shape[:2], H * V)
    packed, da, db, dvectors, dinitial = _backward(
        dy, dfinal, qkv, a, A_log, dt_bias, b, gate, ends, *saved, H, K, V, ctx.need_initial
    )
    columns = _columns(qkv, a, b, gate)

    def part(first: int | None, width: int) -> Tensor | None:
        return None if first is None else packed[..., first : first + width]

    da = da if columns.a is None else part(columns.a, H)
    db = db if columns.b is None and b is not None else part(columns.b, H)
    vectors = (None, None) if A_log is None else dvectors.unbind(0)
    initial = dinitial if ctx.need_initial else None
    return part(0, qkv.shape[-1]), da, *vectors, db, part(columns.gate, H * V), initial, None, None, None, None, None


fused_forward.register_autograd(_vjp, setup_context=_setup_context)
