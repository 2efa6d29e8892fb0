"""Products with few rows, as decoding makes them: kernels of our own where they read the weights faster than a library.

B rows, D columns of the input, N of the output
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from e88.ops.backends import available_backends


def _served(x: Tensor, weight: Tensor) -> bool:
    if not weight.is_cuda or torch.is_grad_enabled() or weight.dtype != torch.bfloat16:
        return False
    if available_backends()["cuda"] is not None:
        return False
    from e88.ops.cuda import linear as kernel

    return kernel.supports(x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, D] times weight [N, D] transposed: [B, N] in autocast's dtype."""
    if x.dtype == weight.dtype and _served(x, weight):
        from e88.ops.cuda import linear as kernel

        return kernel.linear(x, weight)
    return F.linear(x, weight)


def norm_linear_serves(h: Tensor, update: Tensor | None, weight: Tensor) -> bool:
    """Whether `norm_linear` has a kernel for these tensors."""
    return h.dtype == torch.float32 and (update is None or update.dtype == weight.dtype) and _served(h, weight)


def norm_linear(h: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """h + update [B, D], and its root-mean-square norm times weight [N, D] transposed, in one pass.

    The norm is scaled by `norm` [D]. h and norm float32; update (None: nothing to add), weight and so the product bf16.
    Not differentiable.
    """
    from e88.ops.cuda import linear as kernel

    stream, y = kernel.norm_linear(h, update, norm, weight, eps)
    return (h if update is None else stream), y
