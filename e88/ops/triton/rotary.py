"""Rotary positions in Triton: q, k and v out of their common projection in one pass, and its gradient in one.

B batch, T time, H heads, K head width, R = B * T * H rows of K elements. Pairs are (x_2i, x_2i+1) (Su et al., 2021).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e88.ops.differentiable import differentiable

# The elements of q, of k and of v that a program takes: 16 a thread, in two loads of half precision each.
BLOCK, WARPS = 2048, 4


@triton.jit
def _turned(x: tl.tensor, cos: tl.tensor, sin: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """x [ROWS, WIDTH] in float32 with its pairs turned; cos, sin [ROWS, WIDTH / 2]."""
    a, b = tl.split(tl.reshape(x.to(tl.float32), [ROWS, WIDTH // 2, 2]))
    return tl.interleave(a * cos - b * sin, a * sin + b * cos)


@triton.jit
def turn_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    new_q: tl.tensor,
    new_k: tl.tensor,
    new_v: tl.tensor,
    R: int,
    T: int,
    H: int,
    q_row: tl.tensor,
    q_step: int,
    q_head: int,
    k_row: tl.tensor,
    k_step: int,
    k_head: int,
    v_row: tl.tensor,
    v_step: int,
    v_head: int,
    new_step: int,
    BACK: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """new_q, new_k = q, k turned by their positions, against them where BACK; new_v = v.

    Heads of K elements lie anywhere in q, k and v (_row: a sequence on, _step: a token on); in the results those of a
    token lie side by side and tokens new_step apart. cos, sin [T, K / 2] float32. (What is annotated `int` has 32 bits;
    a step from sequence to sequence may want 64.)
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // H
    # 64 bits, since a large batch has more elements than 32 can count, but not for divisions, which are slow in them.
    head, b, t = (row % H).to(tl.int64), (token // T).to(tl.int64), (token % T).to(tl.int64)
    column, half = tl.arange(0, WIDTH)[None, :], tl.arange(0, WIDTH // 2)[None, :]
    inside = (row < R) & (column < K)
    at = t * (K // 2) + half
    turns = (row < R) & (half < K // 2)
    c = tl.load(cos + at, mask=turns, other=0.0)
    s = tl.load(sin + at, mask=turns, other=0.0)
    if BACK:
        s = -s
    x = tl.load(q + b * q_row + t * q_step + head * q_head + column, mask=inside, other=0.0)
    y = tl.load(k + b * k_row + t * k_step + head * k_head + column, mask=inside, other=0.0)
    z = tl.load(v + b * v_row + t * v_step + head * v_head + column, mask=inside, other=0.0)
    to = token.to(tl.int64) * new_step + head * K + column
    tl.store(new_q + to, _turned(x, c, s, ROWS, WIDTH), mask=inside)
    tl.store(new_k + to, _turned(y, c, s, ROWS, WIDTH), mask=inside)
    tl.store(new_v + to, z, mask=inside)


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, 3, H, K], K even, and cos, sin [T, K / 2] float32 -> q and k turned, and v, each [B, T, H, K].

    The results have qkv's dtype and are packed; computes in float32. Differentiable in qkv, whose gradient is packed
    too. v is a copy, so that the projection's memory is free once it is split.
    """
    q, k, v = _run(Operands(qkv, cos, sin))
    return q, k, v


def _options(K: int) -> dict[str, Any]:
    width = triton.next_power_of_2(K)
    return {"K": K, "WIDTH": width, "ROWS": max(BLOCK // width, 1), "num_warps": WARPS}


def _turn(parts: list[Tensor], cos: Tensor, sin: Tensor, out: tuple[Tensor, ...], back: bool) -> None:
    """parts q, k, v [B, T, H, K] of any strides -> out, the same, where B and T are one axis and H and K are packed."""
    B, T, H, K = parts[0].shape
    rows = B * T * H
    if rows == 0:
        return
    parts = [x if x.stride(3) == 1 else x.contiguous() for x in parts]
    strides = [stride for x in parts for stride in x.stride()[:3]]
    options = _options(K)
    turn_kernel[(triton.cdiv(rows, options["ROWS"]),)](
        *parts, cos.contiguous(), sin.contiguous(), *out, rows, T, H, *strides, out[0].stride(1), BACK=back, **options
    )


class Operands(NamedTuple):
    qkv: Tensor
    cos: Tensor
    sin: Tensor


class Results(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


class Saved(NamedTuple):
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype


class Gradients(NamedTuple):
    qkv: Tensor


def _results(x: Operands, save: bool) -> Results:
    B, T, _, H, K = x.qkv.shape
    return Results(*(x.qkv.new_empty(B, T, H, K) for _ in range(3)))


def _forward(x: Operands, out: Results) -> None:
    _turn(list(x.qkv.unbind(2)), x.cos, x.sin, out, back=False)


def _keep(x: Operands, out: Results) -> Saved:
    return Saved(x.cos, x.sin, x.qkv.dtype)


def _gradients(dq: Tensor, dk: Tensor | None, dv: Tensor | None, x: Saved) -> Gradients:
    B, T, H, K = dq.shape
    return Gradients(dq.new_empty(B, T, 3, H, K, dtype=x.dtype))


def _backward(dq: Tensor, dk: Tensor | None, dv: Tensor | None, x: Saved, out: Gradients) -> None:
    # One head of zeros, read again and again.
    parts = [dq.new_zeros(dq.shape[-1]).expand_as(dq) if d is None else d for d in (dq, dk, dv)]
    _turn(parts, x.cos, x.sin, out.qkv.unbind(2), back=True)


_run = differentiable(
    "e88::split_rotated", Operands, Saved, _results, _forward, _keep, _gradients, _backward, outputs=3
)
