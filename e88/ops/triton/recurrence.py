"""The Triton backend: plans and launches.

Letters as in `e88.ops.contract`; a token is one step of one row.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from e88.ops.differentiable import differentiable
from e88.ops.operands import (
    Gradients,
    Operands,
    Results,
    Saved,
    add_parts,
    empty_gradients,
    keep,
    parts_of,
    prepare,
    sequences,
)
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
    return _run(prepare(q, k, v, g, beta, initial_state, cu_seqlens, activation))


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


def _plan(x: Operands | Saved) -> Plan:
    nvidia = x.v.device.type == "cuda" and torch.version.hip is None
    return make_plan(x.k.shape[-1], x.v.shape[-1], x.v.dtype, x.tanh, nvidia)


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


def _results(x: Operands, save: bool) -> Results:
    B, T, H, V = x.v.shape
    N, plan = sequences(x.v, x.ends), _plan(x)
    y = x.v.new_empty(x.v.shape)
    state = x.v.new_empty(N, H, x.k.shape[-1], V, dtype=torch.float32)
    if not save:
        return Results(y, state)
    size = plan.blocks(V) * plan.BV * plan.BK
    return Results(y, state, x.v.new_empty(B * T // plan.segment + N, H, size, dtype=plan.saved))


def _forward(x: Operands, out: Results) -> None:
    _, T, H, V = x.v.shape
    plan, state = _plan(x), out.final_state
    if x.initial_state is None:
        state.zero_()
    else:
        state.copy_(x.initial_state)
    rows = [_rows(u) for u in (x.q, x.k, x.v)]
    rest = [None if u is None else u.contiguous() for u in (x.g, x.beta, x.ends)]
    programs = state.shape[0] * H * plan.blocks(V)
    if programs:
        with torch.cuda.device_of(x.v):
            _launched["forward"] = forward_kernel[(programs,)](
                *rows,
                *rest,
                state,
                out.y,
                out.checkpoints,
                *(u.stride(0) for u in rows),
                T,
                H,
                **plan.constants(x.k.shape[-1], V, backward=False),
            )


def _backward(dy: Tensor, dfinal: Tensor | None, x: Saved, out: Gradients) -> None:
    B, T, H, V = x.v.shape
    K, plan = x.k.shape[-1], _plan(x)
    blocks = plan.blocks(V)
    dstate = out.initial_state
    if dstate is None:
        dstate = x.g.new_empty(sequences(x.v, x.ends), H, K, V)
    if dfinal is None:
        dstate.zero_()
    else:
        dstate.copy_(dfinal)
    programs = dstate.shape[0] * H * blocks
    rows = [_rows(u) for u in (x.q, x.k, x.v)]
    rest = [None if u is None else u.contiguous() for u in (x.g, x.beta, x.ends)]
    states = x.q.new_empty(programs, plan.segment, plan.BV * plan.BK, dtype=plan.saved)
    deltas = x.g.new_empty(programs, plan.segment, plan.BV)
    totals = [out.q, out.k, out.g, out.beta]
    parts = parts_of(totals, blocks)
    if programs:
        with torch.cuda.device_of(x.v):
            _launched["backward"] = backward_kernel[(programs,)](
                *rows,
                *rest,
                x.checkpoints,
                dy.contiguous(),
                dstate,
                states,
                deltas,
                parts[0],
                parts[1],
                out.v,
                *parts[2:],
                *(u.stride(0) for u in rows),
                B * T,
                T,
                H,
                **plan.constants(K, V, backward=True),
            )
    add_parts(totals, parts)


_run = differentiable("e88::triton", Operands, Saved, _results, _forward, keep, empty_gradients, _backward)
