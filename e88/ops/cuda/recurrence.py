"""The CUDA backend: the recurrence as two kernels.

Letters as in `e88.ops.contract`; `tokens` is B * T. `tile.cuh` says how the kernels work.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from e88.ops.cuda.fused import Projections, fused
from e88.ops.cuda.launch import checkpoint_rows, launch, plan_for, resources, rows
from e88.ops.cuda.plan import NO_EDGES, Plan
from e88.ops.cuda.step import fused_step
from e88.ops.differentiable import differentiable
from e88.ops.edges import composed
from e88.ops.operands import (
    Gradients,
    Operands,
    Results,
    Saved,
    add_parts,
    empty_gradients,
    ends_on,
    keep,
    parts_of,
    prepare,
    sequences,
)

__all__ = ["fused_step", "resources", "run", "run_fused"]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The backend entry: y [B, T, H, V] in v's dtype and the final state [N, H, K, V]."""
    if activation != "tanh" and v.dtype != torch.float32:
        # Without tanh the state may leave fp16's range, which the 16-bit kernels rely on.
        y, state = run(q.float(), k.float(), v.float(), g, beta, initial_state, cu_seqlens, activation)
        return y.to(v.dtype), state
    return _run(prepare(q, k, v, g, beta, initial_state, cu_seqlens, activation))


def run_fused(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    sizes: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """The backend's own `fused_tanh_delta_rule`; what the float32 kernels serve is composed."""
    if qkv.dtype == torch.float32 or activation != "tanh":
        return composed(
            run, qkv, a, A_log, dt_bias, b, gate, initial_state, cu_seqlens, activation, sizes
        )  # fmt: skip
    if a.dtype != qkv.dtype or (b is not None and b.dtype != qkv.dtype):
        a, b = a.float(), None if b is None else b.float()
    A_log, dt_bias, initial_state = (None if x is None else x.float() for x in (A_log, dt_bias, initial_state))
    return fused(Projections(qkv, a, A_log, dt_bias, b, gate, initial_state, ends_on(cu_seqlens, qkv), *sizes))


def _plan(x: Operands | Saved) -> Plan:
    sizes = (x.v.shape[2], x.k.shape[-1], x.v.shape[-1])
    return plan_for(x.q, sequences(x.v, x.ends), sizes, x.tanh, x.beta is not None, NO_EDGES)


def _results(x: Operands, save: bool) -> Results:
    B, T, H, V = x.v.shape
    K, N = x.k.shape[-1], sequences(x.v, x.ends)
    y = x.v.new_empty(B, T, H, V)
    final_state = x.v.new_empty(N, H, K, V, dtype=torch.float32)
    if not save:
        return Results(y, final_state)
    plan = _plan(x)
    checkpoints = x.v.new_empty(checkpoint_rows(plan, B * T, N), H, V, K, dtype=plan.saved_dtype)
    written = None if plan.precise else x.v.new_empty(B, T, H, V, dtype=torch.float16)
    return Results(y, final_state, checkpoints, written)


def _forward(x: Operands, out: Results) -> None:
    N, H, _, _ = out.final_state.shape
    if N * H == 0:
        return
    plan = _plan(x)
    operands = [rows(u) for u in (x.q, x.k, x.v)]
    rest = [None if u is None else u.contiguous() for u in (x.g, x.beta, x.initial_state, x.ends)]
    saved = [out.checkpoints] if plan.precise else [out.written, out.checkpoints]
    pointers = [*operands, *rest, out.y, out.final_state, *saved]
    numbers = [u.stride(1) for u in operands]
    if not plan.precise:
        pointers, numbers = [*pointers, None, None, None, None], [*numbers, H, 0]
    grid = N * H * plan.splits, plan.threads(False)
    launch("forward", plan, out.checkpoints is not None, x.v.device, grid, pointers, [*numbers, x.v.shape[1], H])


def _backward(dy: Tensor, dfinal: Tensor | None, x: Saved, out: Gradients) -> None:
    B, T, H, V = dy.shape
    N = sequences(dy, x.ends)
    if N * H == 0:
        return
    plan = _plan(x)
    operands = [rows(x.q), rows(x.k), rows(x.v) if plan.precise else x.v]
    rest = [None if u is None else u.contiguous() for u in (x.g, x.beta, x.ends)]
    totals = [out.q, out.k, out.g, out.beta]
    sums = parts_of(totals, plan.splits)
    outputs = [sums[0], sums[1], out.v, sums[2], sums[3], out.initial_state]
    final = None if dfinal is None else dfinal.contiguous()
    inputs = [*operands, *rest, x.checkpoints, rows(dy.contiguous()), final]
    steps: list[int | ctypes.c_int64] = [u.stride(1) for u in (operands if plan.precise else operands[:2])]
    if plan.precise:
        pointers, numbers = [*inputs, *outputs], [*steps, ctypes.c_int64(B * T), T, H]
    else:
        pointers = [*inputs, *[None] * 5, *outputs, None, None]
        numbers = [*steps, 0, H, 0, 0, H * V, H, B * T, T, H]
    launch("backward", plan, True, dy.device, (N * H * plan.splits, plan.threads(True)), pointers, numbers)
    add_parts(totals, sums)


_run = differentiable(
    "e88::cuda", Operands, Saved, _results, _forward, keep, empty_gradients, _backward, device_types="cuda"
)
