"""A causal depthwise convolution in Triton: whole sequences forward and backward, and one token with its tail.

B rows, T tokens, C channels, W filter width; the tail holds the W - 1 inputs before the first token, the oldest first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from e88.ops.differentiable import differentiable, operator

BLOCK = 256
# Of a sequence, a program is one warp; its channels, and its tokens where there are then enough programs.
CHANNELS, RUN, SHORT_RUN, MANY = 128, 64, 16, 4096


@triton.jit
def step_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor | None,
    tail: tl.tensor,
    y: tl.tensor,
    new_tail: tl.tensor,
    N: int,
    C: int,
    x_step: int,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """N = B * C filters; the rows of x are x_step elements apart, everything else is packed."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    channel = at % C
    past: tl.constexpr = WIDTH - 1
    # 64 bits, since a large batch's tail has more elements than 32 can count.
    first = tl.cast(at, tl.int64) * past
    now = tl.load(x + tl.cast(at // C, tl.int64) * x_step + channel, mask=inside, other=0.0).to(tl.float32)
    total = now * tl.load(weight + channel * WIDTH + past, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for w in tl.static_range(past):
        value = tl.load(tail + first + w, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(weight + channel * WIDTH + w, mask=inside, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(new_tail + first + w - 1, value, mask=inside)
    tl.store(new_tail + first + past - 1, now, mask=inside)
    tl.store(y + at, total, mask=inside)


def _conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C], weight [C, 1, W], bias [C] or None, tail [B, C, W - 1] -> (y [B, C] in x's dtype, the new tail).

    Sums in float32. Not differentiable.
    """
    x = x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
    tail, weight = tail.contiguous(), weight.contiguous()
    y, new_tail = _empty_step(x, weight, bias, tail)
    if y.numel():
        grid = (triton.cdiv(y.numel(), BLOCK),)
        step_kernel[grid](
            x, weight, bias, tail, y, new_tail, y.numel(), x.shape[1], x.stride(0),
            WIDTH=weight.shape[-1], BIAS=bias is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return y, new_tail


def _empty_step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), tail.new_empty(tail.shape)


conv_step = operator("e88::conv_step", _conv_step, _empty_step)


@triton.jit
def _row(x: tl.tensor, t: tl.tensor, step: int, first: int, end: int, c: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Token t of x in float32, zeros unless first <= t < end; tokens are `step` elements apart."""
    at = tl.cast(t, tl.int64) * step
    return tl.load(x + at + c, mask=inside & (t >= first) & (t < end), other=0.0).to(tl.float32)


@triton.jit
def _past_row(tail: tl.tensor, t: tl.tensor, c: tl.tensor, inside: tl.tensor, PAST: tl.constexpr) -> tl.tensor:
    """Token t < 0 of the tail [C, PAST] in float32, zeros where t >= 0."""
    return tl.load(tail + c * PAST + (t + PAST), mask=inside & (t < 0), other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor | None,
    tail: tl.tensor | None,
    y: tl.tensor,
    T: int,
    C: int,
    x_row: tl.tensor,
    x_step: int,
    run: int,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """y_t = bias + sum_w weight_w x_{t - WIDTH + 1 + w}. A program takes BLOCK channels of `run` tokens of one row.

    It reads STEPS tokens at once, to have loads on the way, and keeps the last WIDTH - 1 for the next ones.
    """
    PAST: tl.constexpr = WIDTH - 1
    program, blocks, runs = tl.program_id(0), tl.cdiv(C, BLOCK), tl.cdiv(T, run)
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.cast(program // blocks // runs, tl.int64)
    start = program // blocks % runs * run
    end = tl.minimum(start + run, T)
    inside = c < C
    x += row * x_row
    y += row * T * C
    filters: tl.tuple = ()
    rows: tl.tuple = ()
    for w in tl.static_range(WIDTH):
        filters = filters + (tl.load(weight + c * WIDTH + w, mask=inside, other=0.0).to(tl.float32),)
    for w in tl.static_range(PAST):
        value = _row(x, start - PAST + w, x_step, 0, T, c, inside)
        if TAIL:
            value += _past_row(tail + row * C * PAST, start - PAST + w, c, inside, PAST)
        rows = rows + (value,)
    first = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        first += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for t in range(start, end, STEPS):
        window = rows
        for s in tl.static_range(STEPS):
            window = window + (_row(x, t + s, x_step, 0, end, c, inside),)
        for s in tl.static_range(STEPS):
            total = first
            for w in tl.static_range(WIDTH):
                total += window[s + w] * filters[w]
            tl.store(y + tl.cast(t + s, tl.int64) * C + c, total, mask=inside & (t + s < end))
        rows = ()
        for w in tl.static_range(PAST):
            rows = rows + (window[STEPS + w],)


@triton.jit
def backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    tail: tl.tensor | None,
    dx: tl.tensor,
    dtail: tl.tensor | None,
    shares: tl.tensor,
    T: int,
    C: int,
    dy_row: tl.tensor,
    dy_step: int,
    x_row: tl.tensor,
    x_step: int,
    run: int,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dx_t = sum_w weight_w dy_{t + WIDTH - 1 - w} and dweight_w = sum_t x_t dy_{t + WIDTH - 1 - w}.

    Both need a token's own x and the WIDTH dy from it on, so that only dy is kept in registers. The first program of a
    row also takes the tail's tokens, at t < 0. A program leaves its share of dweight, and of dbias behind it, in
    [rows * runs, WIDTH + BIAS, C].
    """
    PAST: tl.constexpr = WIDTH - 1
    program, blocks, runs = tl.program_id(0), tl.cdiv(C, BLOCK), tl.cdiv(T, run)
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.cast(program // blocks // runs, tl.int64)
    start = program // blocks % runs * run
    end = tl.minimum(start + run, T)
    if TAIL:
        start = tl.where(start == 0, -PAST, start)
    inside = c < C
    dy += row * dy_row
    x += row * x_row
    dx += row * T * C
    filters: tl.tuple = ()
    dfilters: tl.tuple = ()
    rows: tl.tuple = ()
    for w in tl.static_range(WIDTH):
        filters = filters + (tl.load(weight + c * WIDTH + w, mask=inside, other=0.0).to(tl.float32),)
        dfilters = dfilters + (tl.zeros([BLOCK], tl.float32),)
    for w in tl.static_range(PAST):
        rows = rows + (_row(dy, start + w, dy_step, 0, T, c, inside),)
    dfirst = tl.zeros([BLOCK], tl.float32)
    for t in range(start, end, STEPS):
        window = rows
        values: tl.tuple = ()
        for s in tl.static_range(STEPS):
            window = window + (_row(dy, t + s + PAST, dy_step, 0, T, c, inside),)
            value = _row(x, t + s, x_step, 0, end, c, inside)
            if TAIL:
                value += _past_row(tail + row * C * PAST, t + s, c, inside, PAST)
            values = values + (value,)
        for s in tl.static_range(STEPS):
            total = tl.zeros([BLOCK], tl.float32)
            sums: tl.tuple = ()
            for w in tl.static_range(WIDTH):
                later = window[s + PAST - w]
                total += later * filters[w]
                sums = sums + (dfilters[w] + later * values[s],)
            dfilters = sums
            tl.store(dx + tl.cast(t + s, tl.int64) * C + c, total, mask=inside & (t + s >= 0) & (t + s < end))
            if TAIL:
                at = dtail + row * C * PAST + c * PAST + (t + s + PAST)
                tl.store(at, total, mask=inside & (t + s < 0))
            if BIAS:
                dfirst += tl.where(t + s < end, window[s], 0.0)
        rows = ()
        for w in tl.static_range(PAST):
            rows = rows + (window[STEPS + w],)
    shares += tl.cast(program // blocks, tl.int64) * (WIDTH + BIAS) * C + c
    for w in tl.static_range(WIDTH):
        tl.store(shares + w * C, dfilters[w], mask=inside)
    if BIAS:
        tl.store(shares + WIDTH * C, dfirst, mask=inside)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    """x [B, T, C], weight [C, 1, W], bias [C] or None, tail [B, C, W - 1] or None for zeros -> y [B, T, C].

    y has x's dtype; sums in float32. Differentiable in all four. x is read where it lies, as part of a wider row too.
    """
    return _run(Operands(x, weight, bias, tail))[0]


def _launch(x: Tensor, width: int) -> tuple[int, tuple[int], dict[str, int]]:
    """How many tokens of x [B, T, C] a program takes, the grid, and compile-time choices."""
    B, T, C = x.shape
    blocks = triton.cdiv(C, CHANNELS)
    # Long runs read few tokens twice; a small problem needs short ones to occupy the device.
    run = RUN if B * T * blocks >= RUN * MANY else SHORT_RUN
    return run, (B * triton.cdiv(T, run) * blocks,), {"WIDTH": width, "STEPS": 4, "BLOCK": CHANNELS, "num_warps": 1}


def _strided(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    tail: Tensor | None


class Results(NamedTuple):
    y: Tensor


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    tail: Tensor | None
    bias_dtype: torch.dtype | None


class Gradients(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    tail: Tensor | None


def _results(x: Operands, save: bool) -> Results:
    return Results(x.x.new_empty(x.x.shape))


def _forward(operands: Operands, out: Results) -> None:
    x, weight, bias, tail = operands
    x, weight, tail = _strided(x), weight.contiguous(), None if tail is None else tail.contiguous()
    if out.y.numel():
        run, grid, options = _launch(x, weight.shape[2])
        forward_kernel[grid](
            x, weight, bias, tail, out.y, x.shape[1], x.shape[2], x.stride(0), x.stride(1), run,
            BIAS=bias is not None, TAIL=tail is not None, **options,
        )  # fmt: skip


def _keep(x: Operands, out: Results) -> Saved:
    return Saved(x.x, x.weight, x.tail, None if x.bias is None else x.bias.dtype)


def _gradients(dy: Tensor, x: Saved) -> Gradients:
    dx, dweight = (u.new_empty(u.shape) for u in (x.x, x.weight))
    dbias = None if x.bias_dtype is None else dx.new_empty(dx.shape[2], dtype=x.bias_dtype)
    return Gradients(dx, dweight, dbias, None if x.tail is None else x.tail.new_empty(x.tail.shape))


def _backward(dy: Tensor, saved: Saved, out: Gradients) -> None:
    dy, x, weight = _strided(dy), _strided(saved.x), saved.weight.contiguous()
    tail = None if saved.tail is None else saved.tail.contiguous()
    if x.numel() == 0:
        for gradient in out:
            if gradient is not None:
                gradient.zero_()
        return
    width, biased = weight.shape[2], out.bias is not None
    run, grid, options = _launch(x, width)
    shares = x.new_empty(len(x) * triton.cdiv(x.shape[1], run), width + biased, x.shape[2], dtype=torch.float32)
    backward_kernel[grid](
        dy, x, weight, tail, out.x, out.tail, shares, x.shape[1], x.shape[2], dy.stride(0), dy.stride(1),
        x.stride(0), x.stride(1), run, BIAS=biased, TAIL=tail is not None, **options,
    )  # fmt: skip
    sums = shares.sum(0)
    out.weight.copy_(sums[:width].t().unsqueeze(1))
    if out.bias is not None:
        out.bias.copy_(sums[width])


_run = differentiable(
    "e88::causal_conv", Operands, Saved, _results, _forward, _keep, _gradients, _backward, outputs=1
)
