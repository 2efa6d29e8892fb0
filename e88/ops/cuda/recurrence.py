"""The CUDA backend: the recurrence as two kernels behind `torch.library` operators, differentiable and compilable.

Letters as in `e88.ops.contract`; `tokens` is B * T. `tile.cuh` says how the kernels work.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from e88.ops.cuda.compile import Kernel, compile_cubin
from e88.ops.cuda.plan import Plan, make_plan


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
    ends = None if cu_seqlens is None else cu_seqlens.to(device=v.device, dtype=torch.int64)
    given = [x for x in (q, k, v, *floats) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    y, final_state, _, _ = _forward(q, k, v, *floats, ends, activation == "tanh", save)
    return y, final_state


def _plan(k: Tensor, v: Tensor, beta: Tensor | None, ends: Tensor | None, tanh: bool) -> Plan:
    sequences = v.shape[0] if ends is None else ends.shape[0] - 1
    limit = _shared_bytes(v.device.index or 0)
    return make_plan(k.shape[-1], v.shape[-1], v.dtype, tanh, beta is not None, sequences * v.shape[2], limit)


@cache
def _shared_bytes(device: int) -> int:
    # Missing from torch's stubs.
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


@cache
def _kernel(kernel: str, device: int, plan: Plan, save: bool) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    backward = kernel == "backward"
    name = f"{kernel}_float" if plan.precise else kernel
    code = compile_cubin(name, f"sm_{major}{minor}", plan.defines(backward, save))
    return Kernel(code, f"e88_{kernel}", device, plan.shared_bytes if backward else 0)


# The kernel of each direction that was launched last.
_launched: dict[str, Kernel] = {}


def resources() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of a thread in the kernels launched last, "forward" and "backward"."""
    return {direction: kernel.resources() for direction, kernel in _launched.items()}


def _launch(
    kernel: str, plan: Plan, save: bool, like: Tensor, sequences: int, heads: int, arguments: list[Any]
) -> None:
    device = like.device.index
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        blocks = sequences * heads * plan.splits
        _launched[kernel] = _kernel(kernel, device, plan, save)
        _launched[kernel](blocks, plan.threads(kernel == "backward"), stream, arguments)


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _rows(x: Tensor) -> Tensor:
    """`x` [B, T, H, D] with heads packed, tokens evenly spaced and rows aligned to 16 bytes; a copy only if needed."""
    B, T, H, D = x.shape
    even = B == 1 or x.stride(0) == T * x.stride(1)
    packed = x.stride(3) == 1 and (H == 1 or x.stride(2) == D)
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return x if even and packed and aligned else x.contiguous(memory_format=torch.contiguous_format).clone()


def _checkpoint_shape(k: Tensor, v: Tensor, ends: Tensor | None, plan: Plan) -> tuple[int, int, int, int]:
    B, T, H, V = v.shape
    sequences = B if ends is None else ends.shape[0] - 1
    return B * T // plan.segment + sequences, H, V, k.shape[-1]


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
    rows = [_rows(x) for x in (q, k, v)]
    rest = [None if x is None else x.contiguous() for x in (g, beta, initial_state, ends)]
    saved = [checkpoints] if plan.precise else [written, checkpoints]
    arguments: list[Any] = [_pointer(x) for x in (*rows, *rest, y, final_state)]
    arguments += [_pointer(x if save else None) for x in saved]
    arguments += [ctypes.c_int(n) for n in (*(x.stride(1) for x in rows), T, H)]
    _launch("forward", plan, save, v, final_state.shape[0], H, arguments)
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
    sequences = B if ends is None else ends.shape[0] - 1
    plan = _plan(k, v, beta, ends, tanh)
    y = v.new_empty(B, T, H, V)
    final_state = v.new_empty(sequences, H, k.shape[-1], V, dtype=torch.float32)
    shape = _checkpoint_shape(k, v, ends, plan) if save else (0, H, V, k.shape[-1])
    checkpoints = v.new_empty(shape, dtype=plan.saved_dtype)
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
    sequences = B if ends is None else ends.shape[0] - 1
    plan = _plan(k, dy, beta, ends, tanh)
    dq, dk, dv, dg, dbeta, dinitial = _backward_fake(
        dy, dfinal, q, k, values, g, beta, ends, checkpoints, tanh, need_initial
    )
    if sequences * H == 0:
        return dq, dk, dv, dg, dbeta, dinitial
    rows = [_rows(q), _rows(k), _rows(values) if plan.precise else values]
    rest = [None if x is None else x.contiguous() for x in (g, beta, ends)]
    sums = [dq, dk, dg, dbeta]
    if plan.splits > 1:
        sums = [x.new_empty(plan.splits, *x.shape, dtype=torch.float32) for x in sums]
    outputs = [sums[0], sums[1], dv, sums[2], sums[3], dinitial if need_initial else None]
    final = None if dfinal is None else dfinal.contiguous()
    inputs = [*rows, *rest, checkpoints, _rows(dy.contiguous()), final]
    arguments: list[Any] = [_pointer(x) for x in (*inputs, *outputs)]
    steps = [ctypes.c_int(x.stride(1)) for x in (rows if plan.precise else rows[:2])]
    tokens = ctypes.c_int64(B * T) if plan.precise else ctypes.c_int(B * T)
    arguments += [*steps, tokens, ctypes.c_int(T), ctypes.c_int(H)]
    _launch("backward", plan, True, dy, sequences, H, arguments)
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
    sequences = B if ends is None else ends.shape[0] - 1
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
