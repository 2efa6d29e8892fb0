"""What stands around the recurrence in a layer: from raw projections to its operands, and the output gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from e88.ops.norms import l2_norm, wide

Run = Callable[..., tuple[Tensor, Tensor]]


def split_heads(qkv: Tensor, H: int, K: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Raw projections [..., H*(2K+V)], or [..., 2*H*K] tied, to normalised q, k [..., H, K] and v [..., H, V]."""
    x = F.silu(qkv)
    tied = qkv.shape[-1] == 2 * H * K
    parts = x.split([H * K, H * K] if tied else [H * K, H * K, H * V], dim=-1)
    q, k = (part.unflatten(-1, (H, K)) for part in parts[:2])
    v = k if tied else parts[2].unflatten(-1, (H, V))
    return l2_norm(q), l2_norm(k), v


def log_decay(a: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """-exp(A_log) * softplus(a + dt_bias) in float32 or wider; a itself where it is the log decay already."""
    if A_log is None or dt_bias is None:
        return a
    return -torch.exp(A_log) * F.softplus(wide(a) + dt_bias)


def composed(
    run: Run,
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    sizes: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """`fused_tanh_delta_rule` step by step around a backend's `run`; sizes are H, K and V."""
    q, k, v = split_heads(qkv, *sizes)
    beta = None if b is None else torch.sigmoid(wide(b))
    y, final_state = run(q, k, v, log_decay(a, A_log, dt_bias), beta, initial_state, cu_seqlens, activation)
    y = y.flatten(-2)
    return (y if gate is None else y * F.silu(gate)), final_state
