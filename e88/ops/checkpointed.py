"""The recurrence with a backward derived by hand, in plain PyTorch: the oracle of the kernels.

Forward keeps every C-th state. Backward walks the segments from the last to the first: it replays a segment
from its first state, then steps back through it. With G_t the gradient of S_t, h_t = act'(preactivation) and
d_t = exp(g_t), one step back is

    G_t  += q_t dy_t^T                       dq_t  = S_t dy_t
    Z_t   = G_t * h_t                        dg_t  = d_t * sum(Z_t * S_{t-1})
    w_t   = Z_t^T k_t                        dbeta_t = w_t . e_t
    dv_t  = beta_t * w_t                     dk_t  = beta_t * Z_t e_t - S_{t-1} dv_t
    G_{t-1} = d_t * Z_t - k_t dv_t^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e88.ops.reference import over_sequences, read, update

SEGMENT = 32


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
        state: Tensor,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(v)
        decay = g.exp()
        checkpoints = []
        for t in range(v.shape[1]):
            if t % SEGMENT == 0:
                checkpoints.append(state)
            beta_t = None if beta is None else beta[:, t]
            e = v[:, t] - read(state, k[:, t])
            state = update(state, k[:, t], e, decay[:, t], beta_t, activation)
            y[:, t] = read(state, q[:, t])
        ctx.save_for_backward(q, k, v, g, beta, *checkpoints)
        ctx.activation = activation
        return y, state.clone() if not checkpoints else state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, *checkpoints = ctx.saved_tensors
        decay = g.exp()
        dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))
        dbeta = None if beta is None else torch.empty_like(beta)
        G = d_state
        for segment in reversed(range(len(checkpoints))):
            start, end = segment * SEGMENT, min((segment + 1) * SEGMENT, v.shape[1])
            states, deltas = [checkpoints[segment]], []
            for t in range(start, end):
                beta_t = None if beta is None else beta[:, t]
                deltas.append(v[:, t] - read(states[-1], k[:, t]))
                states.append(update(states[-1], k[:, t], deltas[-1], decay[:, t], beta_t, ctx.activation))
            for t in reversed(range(start, end)):
                before, after, e = states[t - start], states[t - start + 1], deltas[t - start]
                G = G + q[:, t].unsqueeze(-1) * dy[:, t].unsqueeze(-2)
                Z = G * ((1 - after) * (1 + after)) if ctx.activation == "tanh" else G
                d_write = read(Z, k[:, t])
                write, d_delta = e, d_write
                if beta is not None and dbeta is not None:
                    dbeta[:, t] = (d_write * e).sum(-1)
                    write, d_delta = beta[:, t].unsqueeze(-1) * e, beta[:, t].unsqueeze(-1) * d_write
                dq[:, t] = _row_sums(after, dy[:, t])
                dk[:, t] = _row_sums(Z, write) - _row_sums(before, d_delta)
                dv[:, t] = d_delta
                dg[:, t] = decay[:, t] * (Z * before).sum((-2, -1))
                G = decay[:, t, :, None, None] * Z - k[:, t].unsqueeze(-1) * d_delta.unsqueeze(-2)
        return dq, dk, dv, dg, dbeta, G, None


def _row_sums(state: Tensor, values: Tensor) -> Tensor:
    """state values: [B, H, K, V] and [B, H, V] give [B, H, K]."""
    return (state * values.unsqueeze(-2)).sum(-1)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return _Recurrence.apply(q, k, v, g, beta, state, activation)


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
    return over_sequences(_dense, q, k, v, g, beta, initial_state, cu_seqlens, activation)
