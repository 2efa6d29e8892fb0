"""Several projections of one input as one matrix product, and gradients of weights in the weights' own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.ops.norms import compute_dtype
from e88.ops.operands import ALIGN


def joint_linear(x: Tensor, projections: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Each projection, all without bias, of x [..., D]: a tensor [..., rows] for each, in autocast's dtype.

    In training on a GPU the results are neighbouring columns of one tensor. A skinny projection beside a wide one is
    then free, where a product of its own would read x, and write x's gradient, once more.
    """
    if x.device.type == "cpu" or not torch.is_grad_enabled():
        return tuple(projection(x) for projection in projections)
    weights = (projection.weight for projection in projections)
    outputs: tuple[Tensor, ...] = _JointLinear.apply(x.to(compute_dtype(x)), *weights)
    return outputs


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        rows = [len(weight) for weight in weights]
        padding = -sum(rows) % ALIGN
        joint = x.new_empty(sum(rows) + padding, x.shape[-1])
        for part, weight in zip(joint.split([*rows, padding]), weights, strict=False):
            part.copy_(weight)
        joint[sum(rows) :] = 0
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, joint)
        ctx.rows, ctx.dtypes = rows, [weight.dtype for weight in weights]
        return F.linear(x, joint).split([*rows, padding], dim=-1)[: len(rows)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, joint = ctx.saved_tensors
        flat = x.flatten(0, -2)
        dx: Tensor | None = None
        dweights: list[Tensor | None] = []
        first = 0
        for grad, rows in _merged(grads, ctx.rows):
            if grad is None:
                dweights += [None] * len(rows)
            else:
                if first + sum(rows) == sum(ctx.rows):
                    grad = _whole_rows(grad, len(joint) - first)
                weight = joint[first : first + grad.shape[1]]
                dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
                dweights += _weight_gradient(grad, flat, ctx.dtypes[len(dweights)])[: sum(rows)].split(rows)
            first += sum(rows)
        return None if dx is None else dx.view_as(x), *dweights


def _weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T x in `dtype`: straight from the product's float32 sums where the GPU can, without rounding between."""
    if dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return (grad.t() @ x).to(dtype)


def _merged(grads: Sequence[Tensor | None], rows: Sequence[int]) -> list[tuple[Tensor | None, list[int]]]:
    """The gradients as matrices, with neighbours that lie side by side in one tensor as one, and their widths."""
    pieces: list[tuple[Tensor | None, list[int]]] = []
    for grad, width in zip(grads, rows, strict=True):
        flat = None if grad is None else grad.flatten(0, -2)
        last = pieces[-1][0] if pieces else None
        if flat is not None and last is not None and _beside(last, flat):
            size = (len(flat), last.shape[1] + width)
            joined = last.as_strided(size, last.stride(), last.storage_offset())
            pieces[-1] = (joined, [*pieces[-1][1], width])
        else:
            pieces.append((flat, [width]))
    return pieces


def _whole_rows(grad: Tensor, most: int) -> Tensor:
    """A matrix that fills a tensor but for zeros up to the next multiple of ALIGN columns, with those where a GPU's
    products need them: they are slow for a width that is no multiple of 16 bytes. Never more than `most`."""
    if torch.compiler.is_compiling() or grad.shape[1] * grad.element_size() % 16 == 0:
        return grad
    step, size = grad.stride(0), grad.untyped_storage().nbytes() // grad.element_size()
    alone = grad.storage_offset() == 0 and grad.stride(1) == 1 and size == len(grad) * step
    padded = alone and step == grad.shape[1] + -grad.shape[1] % ALIGN and step <= most
    return grad.as_strided((len(grad), step), (step, 1)) if padded else grad


def _beside(a: Tensor, b: Tensor) -> bool:
    # The compiler decides itself where tensors lie.
    return not torch.compiler.is_compiling() and (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.dtype == b.dtype
        and a.stride() == b.stride()
        and b.storage_offset() == a.storage_offset() + a.shape[1]
        and a.stride(1) == 1
        and a.stride(0) >= a.shape[1] + b.shape[1]
    )
