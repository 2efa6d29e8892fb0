"""Residual add and root-mean-square norm in one pass over the rows, forward and backward, in Triton.

R rows (tokens), D columns (model width). The backward pass reads the norm's output, which the next projection keeps
anyway, instead of the stream: x / rms = y / weight, exact but for rounding, so that a layer keeps no copy of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    stream, y, _ = _forward(h, update, weight, eps, dtype)
    return (h if update is None else stream), y


@cache
def _programs(device: int) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _options(D: int) -> dict[str, Any]:
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


@torch.library.custom_op("e88::add_rms_norm", mutates_args=())
def _forward(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    h, update = h.contiguous(), None if update is None else update.contiguous()
    stream, y, scale = _forward_fake(h, update, weight, eps, dtype)
    D = h.shape[-1]
    if h.numel():
        forward_kernel[(h.numel() // D,)](
            h, update, weight, stream, y, scale, D, eps, ADD=update is not None, **_options(D)
        )
    return stream, y, scale


@_forward.register_fake
def _forward_fake(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    stream = h.new_empty(0 if update is None else h.shape)
    return stream, h.new_empty(h.shape, dtype=dtype), h.new_empty(h.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("e88::add_rms_norm_backward", mutates_args=())
def _backward(
    dstream: Tensor | None, dy: Tensor, y: Tensor, scale: Tensor, weight: Tensor, h_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dstream, dy = None if dstream is None else dstream.contiguous(), dy.contiguous()
    dh, dupdate, dweight = _backward_fake(dstream, dy, y, scale, weight, h_dtype, update_dtype)
    D = y.shape[-1]
    rows = y.numel() // D
    if rows == 0:
        return dh, dupdate, dweight.zero_()
    programs = min(rows, _programs(y.device.index or 0) if y.is_cuda else 2)
    shares = weight.new_empty(programs, D, dtype=torch.float32)
    backward_kernel[(programs,)](
        dstream, dy, y, scale, weight, dh, dupdate, shares, rows, D,
        PASS=dstream is not None, ADD=update_dtype is not None, **_options(D),
    )  # fmt: skip
    return dh, dupdate, shares.sum(0).to(weight.dtype)


@_backward.register_fake
def _backward_fake(
    dstream: Tensor | None, dy: Tensor, y: Tensor, scale: Tensor, weight: Tensor, h_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dh = y.new_empty(y.shape, dtype=h_dtype)
    dupdate = y.new_empty(0 if update_dtype is None else y.shape, dtype=update_dtype or y.dtype)
    return dh, dupdate, torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, update, weight, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2], weight)
    ctx.h_dtype, ctx.update_dtype = h.dtype, None if update is None else update.dtype


def _vjp(
    ctx: Any, dstream: Tensor | None, dy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor, None, None]:
    y, scale, weight = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dstream = None if ctx.update_dtype is None else dstream
    dh, dupdate, dweight = _backward(dstream, dy, y, scale, weight, ctx.h_dtype, ctx.update_dtype)
    return dh, None if ctx.update_dtype is None else dupdate, dweight, None, None


_forward.register_autograd(_vjp, setup_context=_setup_context)
