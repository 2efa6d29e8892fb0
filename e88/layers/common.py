"""Parts that several mixers share: root-mean-square norms, L2 normalisation, the short causal convolution.

    B batch, T time, C channels, W filter width
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        return y if weight is None else y.mul_(weight)

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
            grad_weight = torch.mul(grad, y, out=product).flatten(0, -2).sum(0)
        return torch.addcmul(grad_y, y, mean, out=y).mul_(scale), grad_weight, None, None


def _fast_rows(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; reduced in float32 or wider, keeps x's dtype."""
    if _fast_rows(x) and x.dtype == weight.dtype:
        y: Tensor = _ScaleRows.apply(x, weight, x.shape[-1], eps)
        return y
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis; reduced in float32 or wider, keeps x's dtype."""
    if _fast_rows(x):
        y: Tensor = _ScaleRows.apply(x, None, 1, eps)
        return y
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019) over the last axis, with a learned weight [dim]."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        exempt_from_decay(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm with a SiLU gate: `norm(x) * silu(gate)`, or `norm(x * silu(gate))` where `gate_first`."""

    def __init__(self, dim: int, eps: float = 1e-5, *, gate_first: bool = False) -> None:
        super().__init__(dim, eps)
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """x, gate [..., dim] -> the shape and dtype of x."""
        gate = F.silu(gate.to(x.dtype))
        if self.gate_first:
            return rms_norm(x * gate, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps) * gate


class ShortConv(nn.Module):
    """Causal depthwise convolution along time, parametrised and initialised as nn.Conv1d(groups=channels).

    The filter's last tap meets the current token. The tail holds the W - 1 inputs before the next token.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.width = width
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
            exempt_from_decay(self.bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}"

    def init_tail(self, batch: int, *, device: torch.device | None = None) -> Tensor:
        """The tail before the first token: zeros [B, C, W - 1]."""
        device = self.weight.device if device is None else device
        return torch.zeros(batch, self.channels, self.width - 1, device=device, dtype=self.weight.dtype)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, C], tail [B, C, W - 1] or None for zeros -> (y [B, T, C], the new tail), T >= 1."""
        length, past = x.shape[1], self.width - 1
        if tail is not None and length == 1:
            window = torch.cat([tail, x.transpose(1, 2).to(tail.dtype)], dim=2)
            y = (window * self.weight.squeeze(1)).sum(2)
            y = y if self.bias is None else y + self.bias
            return y.unsqueeze(1).to(x.dtype), window[:, :, 1:].contiguous()
        if tail is not None:
            x = torch.cat([tail.transpose(1, 2).to(x.dtype), x], dim=1)
        # Time as the width of a channels-last image: the CPU convolution for that layout takes no copy and is
        # three times as fast, forward and backward, as conv1d on [B, C, T].
        image = x.transpose(1, 2).unsqueeze(2)
        padding = (0, past) if tail is None else 0
        y = F.conv2d(image, self.weight.unsqueeze(2), self.bias, padding=padding, groups=self.channels)
        y = y.squeeze(2).transpose(1, 2)[:, :length]
        new_tail = x[:, -past:].transpose(1, 2)
        if new_tail.shape[2] < past:
            new_tail = F.pad(new_tail, (past - new_tail.shape[2], 0))
        return y, new_tail.contiguous()


def exempt_from_decay(*parameters: nn.Parameter) -> None:
    """Marks parameters that weight decay must leave alone (`_no_weight_decay`)."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]
