"""Causal multi-head attention with rotary positions (Vaswani et al., 2017; Su et al., 2021).

    B batch, T time, D model width, H heads, K = D / H, P positions seen before
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.layers.mixer import Mixer, State
from e88.models.config import AttentionConfig
from e88.ops.norms import wide


class Attention(Mixer):
    """out = W_o softmax(q k^T / sqrt(K)) v over the tokens so far, q and k rotated by their positions; no biases.

    The state is the cache of rotated keys and values, k and v [B, H, P, K]: it grows by T, and its length is the
    position of the next token.
    """

    def __init__(self, dim: int, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = dim // config.n_heads
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def extra_repr(self) -> str:
        return str(self.config)

    def forward(
        self, x: Tensor, state: State | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> y [B, T, D]."""
        past = 0 if state is None else state["k"].shape[2]
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.config.n_heads, self.head_dim))
        qk, v = qkv.split([2, 1], dim=2)
        q, k = rotate(qk, past, self.config.rope_theta).permute(2, 0, 3, 1, 4)
        v = v.squeeze(2).transpose(1, 2)
        if state is not None:
            k, v = torch.cat([state["k"].to(k.dtype), k], dim=2), torch.cat([state["v"].to(v.dtype), v], dim=2)
        length = x.shape[1]
        if past and length > 1:
            seen = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril_(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        out = self.o_proj(y.transpose(1, 2).flatten(2))
        return out, {"k": k, "v": v} if return_state else None

    def init_state(self, batch: int, *, device: torch.device | None = None) -> State:
        weight = self.o_proj.weight
        device = weight.device if device is None else device
        empty = torch.zeros(batch, self.config.n_heads, 0, self.head_dim, device=device, dtype=weight.dtype)
        return {"k": empty, "v": empty.clone()}


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """x [B, T, ..., K] with each pair (x_2i, x_2i+1) turned by (start + t) * theta^(-2i / K); keeps the dtype."""
    pairs = wide(x).unflatten(-1, (-1, 2))
    count = pairs.shape[-2]
    # Angles in float64, folded to one turn: at position 100,000 those of float32 are off by 0.004.
    rates = theta ** (-torch.arange(count, device=x.device, dtype=torch.float64) / count)
    time = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float64)
    angle = torch.outer(time, rates).remainder_(2 * math.pi).to(pairs.dtype)
    turn = torch.polar(torch.ones_like(angle), angle).view(-1, *[1] * (x.ndim - 3), count)
    # A turn is a complex product: a third of the time of the same in real parts, on a CPU.
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)
