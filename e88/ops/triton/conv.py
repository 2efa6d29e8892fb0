"""One token of a causal depthwise convolution in one pass, in Triton.

B rows, C channels, W filter width; the tail holds the W - 1 inputs before the token, the oldest first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


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


@torch.library.custom_op("e88::conv_step", mutates_args=())
def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C], weight [C, 1, W], bias [C] or None, tail [B, C, W - 1] -> (y [B, C] in x's dtype, the new tail).

    Sums in float32. Not differentiable.
    """
    x = x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
    tail, weight = tail.contiguous(), weight.contiguous()
    y, new_tail = _conv_step_fake(x, weight, bias, tail)
    if y.numel():
        grid = (triton.cdiv(y.numel(), BLOCK),)
        step_kernel[grid](
            x, weight, bias, tail, y, new_tail, y.numel(), x.shape[1], x.stride(0),
            WIDTH=weight.shape[-1], BIAS=bias is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return y, new_tail


@conv_step.register_fake
def _conv_step_fake(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), tail.new_empty(tail.shape)
