"""The definition of the operator: an eager loop, differentiable by autograd, in any floating dtype.

    r_t = S_{t-1}^T k_t
    e_t = v_t - r_t
    S_t = act(exp(g_t) * S_{t-1} + beta_t * k_t e_t^T)
    y_t = S_t^T q_t

Shapes: q, k [B, T, H, K]; v [B, T, H, V]; g, beta [B, T, H]; S [N, H, K, V].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from e88.ops.contract import state_dtype

Dense = Callable[..., tuple[Tensor, Tensor]]


def read(state: Tensor, key: Tensor) -> Tensor:
    """state^T key: [B, H, K, V] and [B, H, K] give [B, H, V]."""
    # Not a matmul, whose precision depends on global settings.
    return (state * key.unsqueeze(-1)).sum(-2)


def update(state: Tensor, k: Tensor, e: Tensor, decay: Tensor, beta: Tensor | None, activation: str) -> Tensor:
    """The next state from the last one, the key [B, H, K], the delta e [B, H, V] and the scalars [B, H]."""
    write = e if beta is None else beta.unsqueeze(-1) * e
    preactivation = decay[..., None, None] * state + k.unsqueeze(-1) * write.unsqueeze(-2)
    return torch.tanh(preactivation) if activation == "tanh" else preactivation


def dense(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The loop over T for rows of equal length; inputs and state already in the state's dtype."""
    decay = g.exp()
    outputs = []
    for t in range(v.shape[1]):
        beta_t = None if beta is None else beta[:, t]
        e = v[:, t] - read(state, k[:, t])
        state = update(state, k[:, t], e, decay[:, t], beta_t, activation)
        outputs.append(read(state, q[:, t]))
    return torch.stack(outputs, dim=1) if outputs else v.clone(), state


def over_sequences(
    dense: Dense,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Apply `dense(q, k, v, g, beta, state, activation)` in the state's dtype, once or once a sequence."""
    dtype = state_dtype(v.dtype)
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype), g.to(dtype)]
    gate = None if beta is None else beta.to(dtype)
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        state = torch.zeros(N, v.shape[2], k.shape[3], v.shape[3], dtype=dtype, device=v.device)
    else:
        state = initial_state.to(dtype)
    if cu_seqlens is None:
        y, final_state = dense(*inputs, gate, state, activation)
        return y.to(v.dtype), final_state

    outputs, states = [], []
    ends = cu_seqlens.tolist()
    for n in range(N):
        part = slice(ends[n], ends[n + 1])
        gate_n = None if gate is None else gate[:, part]
        y, last = dense(*(x[:, part] for x in inputs), gate_n, state[n : n + 1], activation)
        outputs.append(y)
        states.append(last)
    return torch.cat(outputs, dim=1).to(v.dtype), torch.cat(states)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The backend entry: y [B, T, H, V] in v's dtype and the final state [N, H, K, V]."""
    return over_sequences(dense, q, k, v, g, beta, initial_state, cu_seqlens, activation)
