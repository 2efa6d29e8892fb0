"""Norms over the last axis, reduced in float32 or wider, and the dtypes that layers compute in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it is."""
    return x.to(wide_dtype(x.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what norms and recurrences compute in."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products with x have here, under autocast or not."""
    kind = x.device.type
    # Autocast leaves float64 alone.
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


class _ScaleRows(torch.autograd.Function):
    """x / sqrt(sum(x^2) / count + eps), times a weight over the last axis where one is given.

    Autograd's own chain for the same expression takes two to four times as long on a CPU, since every
    intermediate is written out and read back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, count: int, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(count).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.count = count
        y = x * scale
        if weight is None:
            return y
        # For a result changed in place torch 2.11 compiles a backward pass of zeros.
        return y * weight if torch.compiler.is_compiling() else y.mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        y = x * scale
        grad_y = grad if weight is None else grad * weight
        product = grad_y * y
        mean = product.sum(-1, keepdim=True).div_(-ctx.count)
        grad_weight = None
        if weight is not None:
            grad_weight = torch.mul(grad, y, out=product).flatten(0, -1 - weight.ndim).sum(0)
        return torch.addcmul(grad_y, y, mean, out=y).mul_(scale), grad_weight, None, None


def _fast_rows(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; reduced in float32 or wider, keeps x's dtype.

    weight is [d], or [g, d] where the last two axes of x are, with x of at least one axis more; None for ones.
    """
    if _fast_rows(x) and (weight is None or x.dtype == weight.dtype):
        y: Tensor = _ScaleRows.apply(x, weight, x.shape[-1], eps)
        return y
    if weight is None:
        # Reduced in float32 by itself; autocast may return that.
        return F.rms_norm(x, (x.shape[-1],), eps=eps).to(x.dtype)
    y = F.rms_norm(wide(x), (x.shape[-1],), None if weight.ndim > 1 else wide(weight), eps)
    return (y if weight.ndim == 1 else y * weight).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis; reduced in float32 or wider, keeps x's dtype."""
    if _fast_rows(x):
        y: Tensor = _ScaleRows.apply(x, None, 1, eps)
        return y
    x_wide = wide(x)
    return (x_wide * torch.rsqrt(x_wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
