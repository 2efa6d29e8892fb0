"""What the kernels of a GPU read and write of the recurrence; letters as in `e88.ops.contract`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Columns of which rows of joint projections and of their gradients are a multiple, zeros behind them. In 16-bit dtypes
# a row then begins at a line of a GPU's cache (128 bytes): kernels load 8 elements at a time, and a head's piece of a
# row would otherwise touch one line more.
ALIGN = 64


class Operands(NamedTuple):
    """Decay, write gate and initial state in float32, the ends of packed sequences in int64 where the others are."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    initial_state: Tensor | None
    ends: Tensor | None
    tanh: bool


class Results(NamedTuple):
    """y and final state; for the way back states and, if the kernels want it there in place of v, e_t = v_t - S_{t-1}^T
    k_t."""

    y: Tensor
    final_state: Tensor
    checkpoints: Tensor | None = None
    written: Tensor | None = None


class Saved(NamedTuple):
    """The operands, v as the way back wants it, and states."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    ends: Tensor | None
    checkpoints: Tensor | None
    tanh: bool
    need_initial: bool


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    initial_state: Tensor | None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Operands:
    """The operands from the arguments of a backend's `run`."""
    beta, initial_state = (None if x is None else x.float() for x in (beta, initial_state))
    return Operands(q, k, v, g.float(), beta, initial_state, ends_on(cu_seqlens, v), activation == "tanh")


def ends_on(cu_seqlens: Tensor | None, like: Tensor) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(device=like.device, dtype=torch.int64)


def sequences(rows: Tensor, ends: Tensor | None) -> int:
    """How many sequences there are in rows [B, T, ...]."""
    return rows.shape[0] if ends is None else ends.shape[0] - 1


def keep(x: Operands, out: Results) -> Saved:
    need_initial = x.initial_state is not None and x.initial_state.requires_grad
    v = x.v if out.written is None else out.written
    return Saved(x.q, x.k, v, x.g, x.beta, x.ends, out.checkpoints, x.tanh, need_initial)


def empty_gradients(dy: Tensor, dfinal: Tensor | None, x: Saved) -> Gradients:
    dinitial = x.g.new_empty(sequences(dy, x.ends), *x.k.shape[2:], dy.shape[-1]) if x.need_initial else None
    dbeta = None if x.beta is None else x.beta.new_empty(x.beta.shape)
    dq, dk, dv, dg = (u.new_empty(u.shape) for u in (x.q, x.k, dy, x.g))
    return Gradients(dq, dk, dv, dg, dbeta, dinitial)


def parts_of(totals: list[Tensor | None], count: int) -> list[Tensor | None]:
    """Room for float32 parts of each, which `add_parts` adds; the totals themselves where there is one part."""
    if count == 1:
        return totals
    return [None if x is None else x.new_empty(count, *x.shape, dtype=torch.float32) for x in totals]


def add_parts(totals: list[Tensor | None], parts: list[Tensor | None]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if total is None or part is None or part is total:
            continue
        if total.dtype == part.dtype:
            torch.sum(part, 0, out=total)
        else:
            total.copy_(part.sum(0))
