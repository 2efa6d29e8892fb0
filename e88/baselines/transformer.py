"""Causal multi-head attention with rotary positions (Vaswani et al., 2017; Su et al., 2021).

    B batch, T time, D model width, H heads, K = D / H, P positions seen before
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from e88.baselines.libraries import PLAIN, choose
from e88.layers.mixer import Mixer, State
from e88.models.config import AttentionConfig
from e88.ops.backends import triton_serves
from e88.ops.norms import rms_norm, wide, wide_dtype

# cuDNN may refuse an unusual length, such as the rest of an evaluation: flash attention takes that one.
KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
}


class Attention(Mixer):
    """out = W_o softmax(q k^T / sqrt(K)) v over the tokens so far, q and k rotated by their positions; no biases.

    With `qk_norm` each q and k is divided by its root mean square (after Henry et al., 2020; without weights).

    The state is the cache of rotated keys and values, k and v [B, H, P, K]: it grows by T, and its length is the
    position of the next token.

    `backend`: on a GPU in half precision flash attention runs wherever no mask is needed, cuDNN's (`cudnn`), which is
    the fastest on Hopper GPUs and newer, or PyTorch's (`flash`); else what PyTorch chooses (`torch`).
    """

    backends = ("cudnn", "flash", PLAIN)

    def __init__(self, dim: int, config: AttentionConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
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
        length = x.shape[1]
        # Tokens after others see all of those and a triangle of themselves: that needs a mask.
        masked = past > 0 and length > 1
        none = "it takes no mask, which several tokens that follow others need" if masked else None
        runs = choose(self.backend, x, cudnn=none or self._misfit(128, length), flash=none or self._misfit(256))
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.config.n_heads, self.head_dim))
        q, k, v = split(qkv, past, self.config.rope_theta)
        if self.config.qk_norm:
            q, k = _norm(q), _norm(k)
        if state is not None:
            k, v = torch.cat([state["k"].to(k.dtype), k], dim=2), torch.cat([state["v"].to(v.dtype), v], dim=2)
        if masked:
            seen = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril_(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        elif runs != PLAIN:
            with sdpa_kernel(KERNELS[runs], set_priority=True):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        out = self.o_proj(y.transpose(1, 2).flatten(2))
        return out, {"k": k, "v": v} if return_state else None

    def _misfit(self, widest: int, length: int = 2) -> str | None:
        """Why a kernel for heads up to this width cannot serve, or None; length: of the queries, where it matters."""
        if length == 1:
            return "it takes more than one token at a time"
        if self.head_dim % 8 or self.head_dim > widest:
            return f"its head width is a multiple of 8 up to {widest}, not {self.head_dim}"
        return None

    def init_state(self, batch: int, *, device: torch.device | None = None) -> State:
        weight = self.o_proj.weight
        device = weight.device if device is None else device
        empty = torch.zeros(batch, self.config.n_heads, 0, self.head_dim, device=device, dtype=weight.dtype)
        return {"k": empty, "v": empty.clone()}


def _norm(x: Tensor) -> Tensor:
    """x [B, H, T, K] over its root mean square; keeps the dtype, and the order that the heads have in memory."""
    return rms_norm(x.transpose(1, 2), eps=1e-6).transpose(1, 2)


def split(qkv: Tensor, start: int, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, 3, H, K] -> q and k rotated from position `start` on, and v, [B, H, T, K] each."""
    if triton_serves(qkv):
        from e88.ops.triton.rotary import split_rotated

        tables = _turns(start, qkv.shape[1], qkv.shape[-1] // 2, theta, qkv.device, torch.float32)
        q, k, v = (part.transpose(1, 2) for part in split_rotated(qkv, *tables))
        return q, k, v
    qk, v = qkv.split([2, 1], dim=2)
    q, k = rotate(qk, start, theta).permute(2, 0, 3, 1, 4)
    return q, k, v.squeeze(2).transpose(1, 2)


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """x [B, T, ..., K] with each pair (x_2i, x_2i+1) turned by (start + t) * theta^(-2i / K); keeps the dtype."""
    count = x.shape[-1] // 2
    tables = _turns(start, x.shape[1], count, theta, x.device, wide_dtype(x.dtype))
    cos, sin = (table.view(-1, *[1] * (x.ndim - 3), count) for table in tables)
    pairs = wide(x).unflatten(-1, (-1, 2))
    if x.device.type == "cpu":
        # A turn is a complex product: a third of the time of the same in real parts, on a CPU.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    else:
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


@lru_cache(maxsize=8)
def _turns(
    start: int, length: int, count: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of (start + t) * theta^(-i / count), each [length, count]; one table for all layers of a pass."""
    # Kept for later passes, which may need gradients.
    with torch.inference_mode(False):
        rates = theta ** (-torch.arange(count, device=device, dtype=torch.float64) / count)
        time = torch.arange(start, start + length, device=device, dtype=torch.float64)
        # In float64: at position 100,000 the angles of float32 are off by 0.004.
        angle = torch.outer(time, rates)
        return angle.cos().to(dtype), angle.sin().to(dtype)
