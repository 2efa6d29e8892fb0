"""Parts that several mixers share: root-mean-square norms, the short causal convolution, decay parameters.

B batch, T time, C channels, W filter width
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.ops import few_rows
from e88.ops.backends import triton_serves
from e88.ops.norms import compute_dtype, rms_norm


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


class ResidualRMSNorm(RMSNorm):
    """The norm in front of a branch, which also adds what the branch before it left to the residual stream."""

    def forward(self, h: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Stream h and update [..., dim] (None: nothing to add) -> (the new stream, its norm).

        The stream keeps h's dtype; the norm comes in the dtype that projections compute in. One pass over both on a
        GPU.
        """
        if triton_serves(h):
            from e88.ops.triton.norm import add_rms_norm

            return add_rms_norm(h, update, self.weight, self.eps, compute_dtype(h))
        h = h if update is None else h + update
        return h, rms_norm(h, self.weight, self.eps)

    def project(self, h: Tensor, update: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As forward, with the norm multiplied by weight [N, dim] transposed: [B, dim] -> [B, dim], [B, N]."""
        if few_rows.norm_linear_serves(h, update, weight):
            return few_rows.norm_linear(h, update, self.weight, self.eps, weight)
        h, x = self(h, update)
        return h, few_rows.linear(x, weight)


class GatedRMSNorm(RMSNorm):
    """RMSNorm with a SiLU gate: `norm(x) * silu(gate)`, or `norm(x * silu(gate))` where `gate_first`.

    With `groups`, each of that many equal parts of the last axis is normalised on its own.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, gate_first: bool = False, groups: int = 1) -> None:
        super().__init__(dim, eps)
        self.gate_first = gate_first
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """x, gate [..., dim] -> the shape and dtype of x."""
        gate = F.silu(gate.to(x.dtype))
        return self._norm(x * gate) if self.gate_first else self._norm(x) * gate

    def _norm(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return rms_norm(x, self.weight, self.eps)
        parts = x.unflatten(-1, (self.groups, -1))
        return rms_norm(parts, self.weight.view(self.groups, -1), self.eps).flatten(-2)


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
        return short_conv(x, self.weight, self.bias, tail)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """ShortConv's computation: weight [C, 1, W], bias [C] or None, x, tail and results as there.

    y has the dtype that products with x have here, the new tail x's; for one token behind a tail y has x's, and the new
    tail the old one's. On a GPU with Triton one pass reads x where it lies, as part of a wider row too, and sums in
    float32 with the filters as they are, under autocast too.
    """
    length, past = x.shape[1], weight.shape[2] - 1
    kernel = triton_serves(x)
    if tail is not None and length == 1:
        if kernel and not torch.is_grad_enabled():
            from e88.ops.triton.conv import conv_step

            y, new_tail = conv_step(x.squeeze(1), weight, bias, tail)
            return y.unsqueeze(1), new_tail
        window = torch.cat([tail, x.transpose(1, 2).to(tail.dtype)], dim=2)
        y = (window * weight.squeeze(1)).sum(2)
        y = y if bias is None else y + bias
        return y.unsqueeze(1).to(x.dtype), window[:, :, 1:].contiguous()
    tail = None if tail is None else tail.to(x.dtype)
    if kernel:
        from e88.ops.triton.conv import causal_conv

        dtype = compute_dtype(x)
        y = causal_conv(x.to(dtype), weight, bias, None if tail is None else tail.to(dtype))
    else:
        y = _library_conv(x, weight, bias, tail)
    new_tail = x[:, -past:].transpose(1, 2)
    missing = past - new_tail.shape[2]
    if missing > 0:
        new_tail = F.pad(new_tail, (missing, 0)) if tail is None else torch.cat([tail[:, :, -missing:], new_tail], 2)
    return y, new_tail.contiguous()


def _library_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    length = x.shape[1]
    if tail is not None:
        x = torch.cat([tail.transpose(1, 2), x], dim=1)
    # Time as the width of a channels-last image: the CPU convolution for that layout takes no copy and is
    # three times as fast, forward and backward, as conv1d on [B, C, T].
    image = x.transpose(1, 2).unsqueeze(2)
    padding = (0, weight.shape[2] - 1) if tail is None else 0
    y = F.conv2d(image, weight.unsqueeze(2), padding=padding, groups=weight.shape[0])
    y = y.squeeze(2).transpose(1, 2)[:, :length]
    # Not the convolution's own bias, whose gradient is several times as slow on a CPU.
    return y if bias is None else y + bias.to(y.dtype)


def exempt_from_decay(*parameters: nn.Parameter) -> None:
    """Marks parameters that weight decay must leave alone (`_no_weight_decay`)."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


@contextmanager
def keep_decay_exemptions(model: nn.Module) -> Iterator[None]:
    """Carries the marks of `exempt_from_decay` over to parameters that take the place of a model's own."""
    exempt = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    yield
    exempt_from_decay(*(p for name, p in model.named_parameters() if name in exempt))


def decay_parameters(heads: int, a_low: float = 1.0, a_high: float = 16.0) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log and dt_bias [heads] of the decay exp(-exp(A_log) * softplus(a + dt_bias)), as Mamba2 initialises them.

    exp(A_log) is uniform on [a_low, a_high]; softplus(dt_bias) is log-uniform on [1e-3, 0.1], 1e-4 at least. Both
    are exempt from weight decay.
    """
    a_log = nn.Parameter(torch.empty(heads).uniform_(a_low, a_high).log())
    dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
    dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
    exempt_from_decay(a_log, dt_bias)
    return a_log, dt_bias
