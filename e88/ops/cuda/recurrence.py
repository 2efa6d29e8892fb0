"""The CUDA backend: the recurrence as two kernels behind `torch.library` operators, differentiable and compilable.

Letters as in `e88.ops.contract`; `tokens` is B * T. `tile.cuh` says how the kernels work.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from e88.ops.cuda.fused import fused_forward
from e88.ops.cuda.launch import checkpoint_rows, launch, plan_for, resources, rows
from e88.ops.cuda.plan import NO_EDGES, Plan
from e88.ops.cuda.step import fused_step
from e88.ops.edges import composed

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
    floats = [None if x is None else x.float() for x in (g, beta, initial_state)]
    save = _needs_gradient(q, k, v, *floats)
    y, final_state, _, _ = _forward(q, k, v, *floats, _ends(cu_seqlens, v), activation == "tanh", save)
    return y, final_state


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
    floats = [None if x is None else x.float() for x in (A_log, dt_bias, initial_state)]
    save = _needs_gradient(qkv, a, *floats, b, gate)
    y, final_state, *_ = fused_forward(
        qkv, a, floats[0], floats[1], b, gate, floats[2], _ends(cu_seqlens, qkv), *sizes, save
    )
    return y, final_state


def _ends(cu_seqlens: Tensor | None, like: Tensor) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(device=like.device, dtype=torch.int64)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _plan(k: Tensor, v: Tensor, beta: Tensor | None, ends: Tensor | None, tanh: bool) -> Plan:
    sizes = (v.shape[2], k.shape[-1], v.shape[-1])
    return plan_for(v, _sequences(v, ends), sizes, tanh, beta is not None, NO_EDGES)


def _sequences(v: Tensor, ends: Tensor | None) -> int:
    return v.shape[0] if ends is None else ends.shape[0] - 1


@torch.library.custom_op("e88::cuda_forward", mutates_args=(), device_types="cuda")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    ends: Tensor | None,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, final_state, checkpoints, written = _forward_fake(q, k, v, g, beta, initial_state, ends, tanh, save)
    if final_state.numel() == 0:
        return y, final_state, checkpoints, written
    B, T, H, _ = v.shape
    plan = _plan(k, v, beta, ends, tanh)
    operands = [rows(x) for x in (q, k, v)]
    rest = [None if x is None else x.contiguous() for x in (g, beta, initial_state, ends)]
    saved = [checkpoints] if plan.precise else [written, checkpoints]
    pointers = [*operands, *rest, y, final_state, *(x if save else None for x in saved)]
    numbers = [x.stride(1) for x in operands]
    if not plan.precise:
        pointers, numbers = [*pointers, None, None, None, None], [*numbers, H, 0]
    grid = final_state.shape[0] * H * plan.splits, plan.threads(False)
    launch("forward", plan, save, v.device, grid, pointers, [*numbers, T, H])
    return y, final_state, checkpoints, written


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    ends: Tensor | None,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, V = v.shape
    sequences, K = _sequences(v, ends), k.shape[-1]
    plan = _plan(k, v, beta, ends, tanh)
    y = v.new_empty(B, T, H, V)
    final_state = v.new_empty(sequences, H, K, V, dtype=torch.float32)
    kept = checkpoint_rows(plan, B * T, sequences) if save else 0
    checkpoints = v.new_empty(kept, H, V, K, dtype=plan.saved_dtype)
    # The 16-bit kernels leave e_t = v_t - S_{t-1}^T k_t for the way back; the float32 kernels make it again from v.
    written = v.new_empty(B, T if save and not plan.precise else 0, H, V, dtype=torch.float16)
    return y, final_state, checkpoints, written


@torch.library.custom_op("e88::cuda_backward", mutates_args=(), device_types="cuda")
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    g: Tensor,
    beta: Tensor | None,
    ends: Tensor | None,
    checkpoints: Tensor,
    tanh: bool,
    need_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, H, V = dy.shape
    sequences = _sequences(dy, ends)
    plan = _plan(k, dy, beta, ends, tanh)
    dq, dk, dv, dg, dbeta, dinitial = _backward_fake(
        dy, dfinal, q, k, values, g, beta, ends, checkpoints, tanh, need_initial
    )
    if sequences * H == 0:
        return dq, dk, dv, dg, dbeta, dinitial
    operands = [rows(q), rows(k), rows(values) if plan.precise else values]
    rest = [None if x is None else x.contiguous() for x in (g, beta, ends)]
    sums = [dq, dk, dg, dbeta]
    if plan.splits > 1:
        sums = [x.new_empty(plan.splits, *x.shape, dtype=torch.float32) for x in sums]
    outputs = [sums[0], sums[1], dv, sums[2], sums[3], dinitial if need_initial else None]
    final = None if dfinal is None else dfinal.contiguous()
    inputs = [*operands, *rest, checkpoints, rows(dy.contiguous()), final]
    steps: list[int | ctypes.c_int64] = [x.stride(1) for x in (operands if plan.precise else operands[:2])]
    if plan.precise:
        pointers, numbers = [*inputs, *outputs], [*steps, ctypes.c_int64(B * T), T, H]
    else:
        pointers = [*inputs, *[None] * 5, *outputs, None, None]
        numbers = [*steps, 0, H, 0, 0, H * V, H, B * T, T, H]
    launch("backward", plan, True, dy.device, (sequences * H * plan.splits, plan.threads(True)), pointers, numbers)
    if plan.splits > 1:
        for total, parts in zip((dq, dk, dg, dbeta), sums, strict=True):
            torch.sum(parts, 0, out=total) if total.dtype == torch.float32 else total.copy_(parts.sum(0))
    return dq, dk, dv, dg, dbeta, dinitial


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    g: Tensor,
    beta: Tensor | None,
    ends: Tensor | None,
    checkpoints: Tensor,
    tanh: bool,
    need_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, H, V = dy.shape
    K = k.shape[-1]
    sequences = _sequences(dy, ends)
    dq, dk = (k.new_empty(B, T, H, K) for _ in range(2))
    dg = g.new_empty(B, T, H)
    dbeta = g.new_empty(0 if beta is None else B, T, H)
    dinitial = g.new_empty(sequences if need_initial else 0, H, K, V)
    return dq, dk, k.new_empty(B, T, H, V), dg, dbeta, dinitial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, beta, initial_state, ends, tanh, _ = inputs
    ctx.set_materialize_grads(False)
    values = v if _plan(k, v, beta, ends, tanh).precise else output[3]
    ctx.save_for_backward(q, k, values, g, beta, ends, output[2])
    ctx.tanh = tanh
    ctx.need_initial = initial_state is not None and initial_state.requires_grad


def _vjp(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, values, g, beta, ends, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = q.new_zeros(*q.shape[:3], values.shape[-1])
    dq, dk, dv, dg, dbeta, dinitial = _backward(
        dy, dfinal, q, k, values, g, beta, ends, checkpoints, ctx.tanh, ctx.need_initial
    )
    gate = None if beta is None else dbeta
    return dq, dk, dv, dg, gate, dinitial if ctx.need_initial else None, None, None, None


_forward.register_autograd(_vjp, setup_context=_setup_context)
