"""Residual add and root-mean-square norm in one pass over the rows, forward and backward, in Triton.

R rows (tokens), D columns (model width). The backward pass reads the norm's output, which the next projection keeps
anyway, instead of the stream: x / rms = y / weight, exact but for rounding, so that a layer keeps no copy of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e88.ops.differentiable import differentiable
from e88.ops.operands import add_parts


@triton.jit
def forward_kernel(
    h: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    stream: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    D: int,
    eps: float,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """stream = h + update (where ADD), y = stream * scale * weight, scale = 1 / rms(stream); one row a program."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    at = tl.cast(row, tl.int64) * D + columns
    inside = columns < D
    x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream + at, x, mask=inside)
        x = x.to(stream.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(y + at, x * inverse * w, mask=inside)
    tl.store(scale + row, inverse)


@triton.jit
def backward_kernel(
    dstream: tl.tensor,
    dy: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    dh: tl.tensor,
    dupdate: tl.tensor,
    dweight: tl.tensor,
    R: int,
    D: int,
    PASS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dh = dstream (where PASS) + scale * (dy w - x mean(dy w x)), x = y / w; dupdate is dh again (where ADD).

    A program takes every num_programs-th row and leaves its share of dweight in row program_id of [programs, D].
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    # A weight of exactly 0 says nothing of x; its column then gets no gradient but the stream's.
    undo = tl.where(w == 0.0, 0.0, 1.0 / tl.where(w == 0.0, 1.0, w))
    share = tl.zeros([BLOCK], tl.float32)
    for row in range(program, R, programs):
        at = tl.cast(row, tl.int64) * D + columns
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * undo
        share += g * x
        g *= w
        d = tl.load(scale + row) * (g - x * (tl.sum(g * x, 0) / D))
        if PASS:
            d += tl.load(dstream + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dh + at, d, mask=inside)
        if ADD:
            tl.store(dupdate + at, d, mask=inside)
    tl.store(dweight + program * D + columns, share, mask=inside)


def add_rms_norm(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """h [..., D] and update [..., D] or None -> (h + update in h's dtype, its norm times weight [D] in `dtype`).

    Differentiable in all three; sums in float32. Without an update the first result is h itself.
    """
    y, stream = _run(Operands(h, update, weight, eps, dtype))
    return (h if update is None else stream), y


@cache
def _programs(device: int) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _options(D: int) -> dict[str, Any]:
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


class Operands(NamedTuple):
    h: Tensor
    update: Tensor | None
    weight: Tensor
    eps: float
    dtype: torch.dtype


class Results(NamedTuple):
    y: Tensor
    stream: Tensor | None
    scale: Tensor


class Saved(NamedTuple):
    y: Tensor
    scale: Tensor
    weight: Tensor
    h_dtype: torch.dtype
    update_dtype: torch.dtype | None


class Gradients(NamedTuple):
    h: Tensor
    update: Tensor | None
    weight: Tensor


def _results(x: Operands, save: bool) -> Results:
    h = x.h
    y = h.new_empty(h.shape, dtype=x.dtype)
    stream = None if x.update is None else h.new_empty(h.shape)
    return Results(y, stream, h.new_empty(h.shape[:-1], dtype=torch.float32))


def _forward(x: Operands, out: Results) -> None:
    h, update = x.h.contiguous(), None if x.update is None else x.update.contiguous()
    D = h.shape[-1]
    if h.numel():
        forward_kernel[(h.numel() // D,)](
            h, update, x.weight, out.stream, out.y, out.scale, D, x.eps, ADD=update is not None, **_options(D)
        )


def _keep(x: Operands, out: Results) -> Saved:
    return Saved(out.y, out.scale, x.weight, x.h.dtype, None if x.update is None else x.update.dtype)


def _gradients(dy: Tensor, dstream: Tensor | None, x: Saved) -> Gradients:
    dh = x.y.new_empty(x.y.shape, dtype=x.h_dtype)
    dupdate = None if x.update_dtype is None else x.y.new_empty(x.y.shape, dtype=x.update_dtype)
    return Gradients(dh, dupdate, x.weight.new_empty(x.weight.shape))


def _backward(dy: Tensor, dstream: Tensor | None, x: Saved, out: Gradients) -> None:
    D = x.y.shape[-1]
    rows = x.y.numel() // D
    if rows == 0:
        out.weight.zero_()
        return
    programs = min(rows, _programs(x.y.device.index or 0) if x.y.is_cuda else 2)
    shares = x.weight.new_empty(programs, D, dtype=torch.float32)
    passed = None if dstream is None or out.update is None else dstream.contiguous()
    backward_kernel[(programs,)](
        passed, dy.contiguous(), x.y, x.scale, x.weight, out.h, out.update, shares, rows, D,
        PASS=passed is not None, ADD=out.update is not None, **_options(D),
    )  # fmt: skip
    add_parts([out.weight], [shares])


_run = differentiable("e88::add_rms_norm", Operands, Saved, _results, _forward, _keep, _gradients, _backward)
