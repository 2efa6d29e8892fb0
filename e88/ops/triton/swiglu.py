"""SwiGLU in Triton: silu(gate) * up from the common projection of both in one pass, and its gradient in one.

R rows (tokens), M hidden width; of a row of gate_up the first M elements are the gate (Shazeer, 2020).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from e88.ops.differentiable import differentiable

BLOCK = 1024


@triton.jit
def forward_kernel(gate_up: tl.tensor, y: tl.tensor, M: int, step: int, BLOCK: tl.constexpr) -> None:
    """y = silu(gate) * up; the rows of gate_up are `step` elements apart. A program takes BLOCK columns of one row."""
    program, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    row = tl.cast(program // blocks, tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    gate_up += row * step
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + M + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * M + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def backward_kernel(
    dy: tl.tensor, gate_up: tl.tensor, dgate_up: tl.tensor, M: int, dy_step: int, step: int, BLOCK: tl.constexpr
) -> None:
    """The gradients of both, packed as one row; rows of dy are dy_step elements apart, the rest as forward_kernel."""
    program, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    row = tl.cast(program // blocks, tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    gate_up += row * step
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + M + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_step + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate_up += row * 2 * M
    tl.store(dgate_up + column, d * up * share * (1.0 + gate * (1.0 - share)), mask=inside)
    tl.store(dgate_up + M + column, d * gate * share, mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * M] -> silu(gate) * up [..., M] in its dtype, computed in float32.

    Differentiable; reads rows where they lie, as parts of wider ones too.
    """
    return _run(Operands(gate_up))[0]


def _rows(x: Tensor) -> Tensor:
    """x [..., C] as [R, C], where the columns are adjacent."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid for gate_up as rows [R, 2 * M], and compile-time choices: 8 elements a thread, one load of each half."""
    M = x.shape[1] // 2
    block = min(BLOCK, max(triton.next_power_of_2(M), 32))
    return (len(x) * triton.cdiv(M, block),), {"BLOCK": block, "num_warps": max(block // 256, 1)}


class Operands(NamedTuple):
    gate_up: Tensor


class Results(NamedTuple):
    y: Tensor


class Saved(NamedTuple):
    gate_up: Tensor


class Gradients(NamedTuple):
    gate_up: Tensor


def _results(x: Operands, save: bool) -> Results:
    *rows, width = x.gate_up.shape
    return Results(x.gate_up.new_empty(*rows, width // 2))


def _forward(x: Operands, out: Results) -> None:
    if out.y.numel():
        gate_up = _rows(x.gate_up)
        grid, options = _launch(gate_up)
        forward_kernel[grid](gate_up, out.y, out.y.shape[-1], gate_up.stride(0), **options)


def _keep(x: Operands, out: Results) -> Saved:
    return Saved(x.gate_up)


def _gradients(dy: Tensor, x: Saved) -> Gradients:
    return Gradients(x.gate_up.new_empty(x.gate_up.shape))


def _backward(dy: Tensor, x: Saved, out: Gradients) -> None:
    if dy.numel():
        dy, gate_up = _rows(dy), _rows(x.gate_up)
        grid, options = _launch(gate_up)
        backward_kernel[grid](dy, gate_up, out.gate_up, dy.shape[1], dy.stride(0), gate_up.stride(0), **options)


_run = differentiable("e88::swiglu", Operands, Saved, _results, _forward, _keep, _gradients, _backward, outputs=1)
