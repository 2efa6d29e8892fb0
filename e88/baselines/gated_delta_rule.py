"""The gated delta rule (Yang, Kautz and Hatamizadeh, 2024) in its chunked parallel form, with its own backward.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T        y_t = S_t^T q_t

    B batch, T time, H heads, K key width, V value width, N chunks, C tokens of a chunk
    inner layout [N, B*H, ...]: a chunk's tokens are the rows of one matrix per batch row and head

With G the running sum of log a inside a chunk, D_ij = exp(G_i - G_j) for i >= j and S the state before the chunk, the
updates u_i that the chunk writes solve a unit lower-triangular system (the WY form of a product of Householder-like
factors; Yang et al., "Parallelizing linear transformers with the delta rule over sequence length", 2024):

    (I + L) U = b (V - exp(G) K S)       L_ij = b_i D_ij k_i.k_j for i > j
    S' = exp(G_C) S + sum_j exp(G_C - G_j) k_j u_j^T
    Y = exp(G) Q S + A U                 A_ij = D_ij q_i.k_j for i >= j

Every exponent is at most zero, so nothing overflows. q and k are the two halves of one row block, since A and L, the
two products with S, and all their gradients then are one matrix product each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from e88.ops.norms import l2_norm

NORM_EPS = 1e-6


def default_chunk(k_dim: int) -> int:
    """The chunk that is fastest on a CPU: longer for wider heads, whose states cost more to read and write."""
    return 16 if k_dim <= 32 else 32


def unit_lower_inverse(lower: Tensor, sign: float = 1.0) -> Tensor:
    """sign * (I + strictly lower part)^-1 of [M, C, C]; the diagonal and the upper part are not read.

    Halving down to blocks of 16, and joining the halves by products, is several times as fast on a CPU as the
    batched triangular solver at 32 or 64, and as exact: the inverse's entries never pass through powers of L.
    """
    count, size, _ = lower.shape
    if size <= 16 or size % 2:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device).mul_(sign).expand_as(lower)
        return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True, left=False)
    half = size // 2
    corner = lower[:, half:, :half]
    top, bottom = unit_lower_inverse(torch.cat([lower[:, :half, :half], lower[:, half:, half:]]), sign).split(count)
    inverse = torch.zeros_like(lower)
    inverse[:, :half, :half] = top
    inverse[:, half:, half:] = bottom
    inverse[:, half:, :half] = torch.bmm(torch.bmm(bottom, corner), top).mul_(-sign)
    return inverse


class _Chunks:
    """Views of [B, T, ...] tensors as [N, B, H, C, ...], and the sizes that both passes need."""

    def __init__(self, qkv: Tensor, heads: int, k_dim: int, chunk: int) -> None:
        self.B, self.T, width = qkv.shape
        self.H, self.K, self.C = heads, k_dim, chunk
        self.V = width // heads - 2 * k_dim
        self.N = self.T // chunk
        self.M = self.N * self.B * heads

    def qk(self, qkv: Tensor) -> Tensor:
        """The q and k part of [B, T, 2HK + HV] as [N, B, H, 2, C, K]."""
        qk = qkv[..., : 2 * self.H * self.K]
        return qk.view(self.B, self.N, self.C, 2, self.H, self.K).permute(1, 0, 4, 3, 2, 5)

    def norm_scale(self, qkv: Tensor) -> Tensor:
        """What q and k are to be multiplied by, [M, 2, C]: q to norm K^-1/2, k to norm 1."""
        qk = qkv[..., : 2 * self.H * self.K].view(self.B, self.T, 2, self.H, self.K)
        scale = torch.linalg.vector_norm(qk, dim=-1).square_().add_(NORM_EPS)
        scale[:, :, 0].mul_(self.K)
        scale = scale.rsqrt_().view(self.B, self.N, self.C, 2, self.H).permute(1, 0, 4, 3, 2)
        return scale.reshape(self.M, 2, self.C)

    def v_heads(self, qkv: Tensor) -> Tensor:
        """The v part of [B, T, 2HK + HV] as [B, T, H, V]."""
        return qkv[..., 2 * self.H * self.K :].view(self.B, self.T, self.H, self.V)

    def v(self, qkv: Tensor) -> Tensor:
        """The v part of [B, T, 2HK + HV] as [N, B, H, C, V]."""
        return self.heads(self.v_heads(qkv))

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] as [N, B, H, C, ...]."""
        split = x.view(self.B, self.N, self.C, self.H, *x.shape[3:])
        return split.permute(1, 0, 3, 2, *range(4, split.ndim))

    def time(self, x: Tensor) -> Tensor:
        """[N * B * H, C, ...] as a new [B, T, H, ...]."""
        split = x.reshape(self.N, self.B, self.H, self.C, *x.shape[2:])
        return split.permute(1, 0, 3, 2, *range(4, split.ndim)).reshape(self.B, self.T, self.H, *x.shape[2:])


class _GatedDeltaRule(torch.autograd.Function):
    """Inputs as gated_delta_rule, with T a multiple of the chunk; returns y [B, T, H, V] and the final state."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, log_decay: Tensor, beta_logit: Tensor, state: Tensor, k_dim: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        s = _Chunks(qkv, state.shape[1], k_dim, chunk)
        groups, C, K, V = s.B * s.H, s.C, s.K, s.V
        # q and k stay as they come; the norm's scale of each row goes into the factors below.
        rows = s.qk(qkv).reshape(s.M, 2 * C, K)
        keys = rows[:, C:]
        scale = s.norm_scale(qkv)

        beta = torch.sigmoid(s.heads(beta_logit)).reshape(s.M, C)
        total = s.heads(log_decay).cumsum(-1).view(s.M, C)
        # A q row reads with a plus, a k row with a minus: what the state already holds for k is taken off v.
        signed = torch.stack([scale[:, 0], -scale[:, 1]], dim=1).unsqueeze(-1)
        # Above the diagonal the exponent is positive and means nothing: clamped, so that it cannot overflow.
        pair = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_max_(0).exp_().tril_()
        pair = pair.mul_(scale[:, 1].unsqueeze(-2)).unsqueeze(1) * signed
        scores = torch.bmm(rows, keys.mT)
        scores.view(s.M, 2, C, C).mul_(pair)
        solve = unit_lower_inverse(scores[:, C:] * -beta.unsqueeze(-1)).mul_(beta.unsqueeze(-2))
        solve = solve.view(s.N, groups, C, C)

        read_scale = signed * total.exp().view(s.M, 1, C, 1)
        write_scale = (total[:, -1:] - total).exp_().mul_(scale[:, 1]).unsqueeze(-1)
        kept = total[:, -1].exp().view(s.N, groups, 1, 1)
        read = (rows.view(s.M, 2, C, K) * read_scale).view(s.N, groups, 2 * C, K)
        write = (keys * write_scale).view(s.N, groups, C, K)
        product = qkv.new_empty(s.N, groups, 2 * C, V)
        product[:, :, :C] = 0
        product.view(s.N, s.B, s.H, 2, C, V)[:, :, :, 1] = s.v(qkv)
        states = qkv.new_empty(s.N + 1, groups, K, V)
        states[0] = state.reshape(groups, K, V)
        update = qkv.new_empty(s.N, groups, C, V)
        for c in range(s.N):
            product[c].baddbmm_(read[c], states[c])
            torch.bmm(solve[c], product[c, :, C:], out=update[c])
            torch.mul(states[c], kept[c], out=states[c + 1])
            states[c + 1].baddbmm_(write[c].mT, update[c])
        y = torch.baddbmm(product.view(s.M, 2 * C, V)[:, :C], scores[:, :C], update.view(s.M, C, V))
        ctx.save_for_backward(
            qkv, rows, scale, beta, pair, scores, solve, read_scale, write_scale, kept, states, update
        )
        ctx.shape = s
        return s.time(y), states[-1].view(s.B, s.H, K, V).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _backward(ctx, grad_y, grad_final)


def _backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    qkv, rows, scale, beta, pair, scores, solve, read_scale, write_scale, kept, states, update = ctx.saved_tensors
    s: _Chunks = ctx.shape
    groups, C, K, V = s.B * s.H, s.C, s.K, s.V
    keys = rows[:, C:]
    read = (rows.view(s.M, 2, C, K) * read_scale).view(s.N, groups, 2 * C, K)
    write = (keys * write_scale).view(s.N, groups, C, K)

    # The gradient of `product`: the output's rows above, the rows of the system's right-hand side below.
    grad = qkv.new_empty(s.N, groups, 2 * C, V)
    by_kind = grad.view(s.N, s.B, s.H, 2, C, V)
    by_kind[:, :, :, 0] = s.heads(grad_y.contiguous())
    flat = grad.view(s.M, 2 * C, V)
    grad_update = torch.bmm(scores[:, :C].mT, flat[:, :C]).view(s.N, groups, C, V)
    grad_states = torch.empty_like(states)
    grad_states[s.N] = grad_final.reshape(groups, K, V)
    for c in range(s.N - 1, -1, -1):
        grad_update[c].baddbmm_(write[c], grad_states[c + 1])
        grad[c, :, C:] = torch.bmm(solve[c].mT, grad_update[c])
        torch.mul(grad_states[c + 1], kept[c], out=grad_states[c])
        grad_states[c].baddbmm_(read[c].mT, grad[c])

    update = update.view(s.M, C, V)
    after = grad_states[1:].view(s.M, K, V)
    grad_rows = torch.bmm(flat, states[:-1].view(s.M, K, V).mT)
    grad_rows.view(s.M, 2, C, K).mul_(read_scale)
    grad_scores = torch.bmm(flat, update.mT)
    grad_scores.view(s.M, 2, C, C).mul_(pair).diagonal(dim1=-2, dim2=-1)[:, 1] = 0
    grad_rows.baddbmm_(grad_scores, keys)
    grad_keys = torch.bmm(update, after.mT).mul_(write_scale)
    grad_keys.baddbmm_(grad_scores.mT, rows)

    # G_i enters as exp(G_i) with row i and as exp(-G_i) with the write of token i, so its gradient is a
    # difference of dot products that are at hand; G_C alone also scales the chunk's final state.
    row_dot = torch.linalg.vecdot(grad_rows, rows).view(s.M, 2, C)
    write_dot = torch.linalg.vecdot(grad_keys, keys)
    grad_total = row_dot.sum(1).sub_(write_dot)
    grad_total[:, -1] += torch.linalg.vecdot(after.flatten(1), states[1:].reshape(s.M, K * V))
    grad_log_decay = s.time(grad_total.flip(-1).cumsum(-1).flip(-1))

    # b_i scales row i of the system, its k and its v alike.
    grad_qkv = torch.empty_like(qkv)
    s.v(grad_qkv).copy_(by_kind[:, :, :, 1])
    v_dot = torch.linalg.vecdot(s.v_heads(grad_qkv), s.v_heads(qkv))
    grad_logit = s.time(row_dot[:, 1] * (1 - beta)).addcmul_(v_dot, s.time(1 - beta))

    # The norm: of y = c x with c^-2 = n |x|^2 + eps n, the gradient of c adds -n c^2 x (x.dx) to dx = c dy.
    grad_rows[:, C:] += grad_keys
    row_dot[:, 0].mul_(-K)
    row_dot[:, 1].add_(write_dot).neg_()
    grad_rows.addcmul_(rows, row_dot.mul_(scale.square()).view(s.M, 2 * C, 1))
    s.qk(grad_qkv).copy_(grad_rows.view(s.N, s.B, s.H, 2, C, K))
    return grad_qkv, grad_log_decay, grad_logit, grad_states[0].view(s.B, s.H, K, V), None, None


def gated_delta_rule(
    qkv: Tensor, log_decay: Tensor, beta_logit: Tensor, state: Tensor, *, k_dim: int, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the final state [B, H, K, V] of the recurrence above, from `state` [B, H, K, V].

    qkv [B, T, H*K + H*K + H*V]: q, k and v side by side; q and k are L2-normalised per head here, and q scaled by
    K^-1/2. log_decay [B, T, H] <= 0 is log a; beta_logit [B, T, H] gives b = sigmoid. All of one dtype, float32 or
    float64. `chunk` bounds C; None takes the fastest on a CPU. Differentiable once in every tensor.
    """
    length = qkv.shape[1]
    chunk = min(default_chunk(k_dim) if chunk is None else chunk, length)
    if length % chunk:
        # Tokens of zero keys, zero values and no decay leave the state as it is.
        after = (0, 0, 0, chunk - length % chunk)
        qkv, log_decay, beta_logit = F.pad(qkv, after), F.pad(log_decay, after), F.pad(beta_logit, after)
    y, final = _GatedDeltaRule.apply(qkv, log_decay, beta_logit, state, k_dim, chunk)
    return y[:, :length], final


def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta_logit: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: q, k [B, H, K], v [B, H, V], log_decay, beta_logit [B, H], state [B, H, K, V].

    Returns y [B, H, V] and the new state; q and k are normalised here, as in gated_delta_rule.
    """
    q, k = l2_norm(q, NORM_EPS) * q.shape[-1] ** -0.5, l2_norm(k, NORM_EPS)
    state = state * torch.exp(log_decay)[..., None, None]
    error = v - torch.matmul(k.unsqueeze(-2), state).squeeze(-2)
    state = torch.addcmul(state, (k * torch.sigmoid(beta_logit).unsqueeze(-1)).unsqueeze(-1), error.unsqueeze(-2))
    return torch.matmul(q.unsqueeze(-2), state).squeeze(-2), state
