"""The Triton backend: plans, launches, and the `torch.library` operators that make it differentiable and compilable.

Letters as in `e88.ops.contract`; a token is one step of one row.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from e88.ops.triton.kernels import backward_kernel, forward_kernel


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
    """The backend entry: y [B, T, H, V] in v's dtype and the final state [N, H, K, V] in float32."""
    floats = [None if x is None else x.float() for x in (g, beta, initial_state)]
    ends = None if cu_seqlens is None else cu_seqlens.to(device=v.device, dtype=torch.int64)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *floats))
    y, final_state, _ = _forward(q, k, v, *floats, ends, activation == "tanh", save)
    return y, final_state


class Plan(NamedTuple):
    """Compile-time choices: the state padded to BK rows, BV columns a program, a saved state every `segment` steps, the
    dtype of saved states, how tanh is computed, and a limit for the backward kernel's registers."""

    BK: int
    BV: int
    segment: int
    saved: torch.dtype
    tanh: str | None
    registers: int | None

    def blocks(self, V: int) -> int:
        return triton.cdiv(V, self.BV)

    def constants(self, K: int, V: int, backward: bool) -> dict[str, Any]:
        """The kernel's constants, and Triton's options."""
        sizes = {"K": K, "V": V, "BK": self.BK, "BV": self.BV, "SEGMENT": self.segment, "TANH": self.tanh}
        limit = {"maxnreg": self.registers} if backward and self.registers else {}
        # One warp: its sums cross lanes by shuffles alone.
        return {**sizes, "num_warps": 1, "num_stages": 1, **limit}


@cache
def make_plan(K: int, V: int, dtype: torch.dtype, tanh: bool, nvidia: bool) -> Plan:
    """The plan for one shape of state; it does not depend on B, T or H."""
    BK = max(16, triton.next_power_of_2(K))
    # Narrow blocks make many programs, whose latencies hide one another; narrower ones repeat more work.
    BV = 16 if BK <= 64 else 8
    precise = dtype == torch.float32
    # Within tanh's range fp16 has three more bits than bf16. Without tanh the state knows no bound.
    saved = torch.float16 if tanh and not precise else torch.float32
    mode = "exact" if precise else "approximate" if nvidia else "rounded"
    # The compiler takes more than it needs. Measured on an H200: more programs at a time are worth 12 %.
    registers = {16: 96, 32: 128}.get(BK) if nvidia and not precise else None
    return Plan(BK, BV, 8, saved, mode if tanh else None, registers)


def _plan(k: Tensor, v: Tensor, tanh: bool) -> Plan:
    return make_plan(k.shape[-1], v.shape[-1], v.dtype, tanh, v.device.type == "cuda" and torch.version.hip is None)


def _sequences(v: Tensor, ends: Tensor | None) -> int:
    return v.shape[0] if ends is None else ends.shape[0] - 1


def _rows(x: Tensor) -> Tensor:
    """`x` [B, T, H, D] as [B * T, H * D], a copy only where heads are not packed or tokens not evenly spaced."""
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])
    return rows if rows.stride(1) == 1 else rows.contiguous()


# The compiled kernel of each direction that was launched last.
_launched: dict[str, Any] = {}


def resources() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of a thread in the kernels launched last, "forward" and "backward"."""
    # Triton counts spills in words of 4 bytes.
    return {
        direction: {"registers": kernel.n_regs, "spilled_bytes": 4 * kernel.n_spills}
        for direction, kernel in _launched.items()
    }


@torch.library.custom_op("e88::triton_forward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    y, state, saved = _forward_fake(q, k, v, g, beta, initial_state, ends, tanh, save)
    _, T, H, V = v.shape
    plan = _plan(k, v, tanh)
    if initial_state is None:
        state.zero_()
    else:
        state.copy_(initial_state)
    rows = [_rows(x) for x in (q, k, v)]
    rest = [None if x is None else x.contiguous() for x in (g, beta, ends)]
    programs = state.shape[0] * H * plan.blocks(V)
    if programs:
        with torch.cuda.device_of(v):
            _launched["forward"] = forward_kernel[(programs,)](
                *rows,
                *rest,
                state,
                y,
                saved if save else None,
                *(x.stride(0) for x in rows),
                T,
                H,
                **plan.constants(k.shape[-1], V, backward=False),
            )
    return y, state, saved


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
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, V = v.shape
    sequences = _sequences(v, ends)
    plan = _plan(k, v, tanh)
    slots = B * T // plan.segment + sequences if save else 0
    saved = v.new_empty(slots, H, plan.blocks(V) * plan.BV * plan.BK, dtype=plan.saved)
    return v.new_empty(v.shape), v.new_empty(sequences, H, k.shape[-1], V, dtype=torch.float32), saved


@torch.library.custom_op("e88::triton_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    ends: Tensor | None,
    saved: Tensor,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, dbeta, dstate = _backward_fake(dy, dfinal, q, k, v, g, beta, ends, saved, tanh)
    B, T, H, V = v.shape
    plan = _plan(k, v, tanh)
    blocks = plan.blocks(V)
    programs = dstate.shape[0] * H * blocks
    if dfinal is None:
        dstate.zero_()
    else:
        dstate.copy_(dfinal)
    rows = [_rows(x) for x in (q, k, v)]
    rest = [None if x is None else x.contiguous() for x in (g, beta, ends)]
    states = saved.new_empty(programs, plan.segment, plan.BV * plan.BK)
    deltas = g.new_empty(programs, plan.segment, plan.BV)
    totals = [dq, dk, dg, dbeta]
    parts = totals if blocks == 1 else [x.new_empty(blocks, *x.shape, dtype=torch.float32) for x in totals]
    if programs:
        with torch.cuda.device_of(v):
            _launched["backward"] = backward_kernel[(programs,)](
                *rows,
                *rest,
                saved,
                dy.contiguous(),
                dstate,
                states,
                deltas,
                parts[0],
                parts[1],
                dv,
                *parts[2:],
                *(x.stride(0) for x in rows),
                B * T,
                T,
                H,
                **plan.constants(k.shape[-1], V, backward=True),
            )
    if blocks > 1:
        for total, part in zip(totals, parts, strict=True):
            total.copy_(part.sum(0))
    return dq, dk, dv, dg, dbeta, dstate


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    ends: Tensor | None,
    saved: Tensor,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
    dbeta = g.new_empty(0 if beta is None else g.shape[0], *g.shape[1:])
    return dq, dk, dv, dg, dbeta, g.new_empty(_sequences(v, ends), v.shape[2], k.shape[-1], v.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, g, beta, initial_state, ends, tanh, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, beta, ends, output[2])
    ctx.tanh, ctx.gate, ctx.initial = tanh, beta is not None, initial_state is not None


def _vjp(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, ends, saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    dq, dk, dv, dg, dbeta, dstate = _backward(dy, dfinal, q, k, v, g, beta, ends, saved, ctx.tanh)
    gate = dbeta if ctx.gate else None
    return dq, dk, dv, dg, gate, dstate if ctx.initial else None, None, None, None


_forward.register_autograd(_vjp, setup_context=_setup_context)
