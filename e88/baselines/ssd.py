"""Mamba2's recurrence (Dao and Gu, 2024) in the chunked form of its "state space dual", with its own backward.

    S_t = a_t S_{t-1} + dt_t B_t x_t^T        y_t = S_t^T C_t + D x_t

    b batch, T time, H heads, P head width, N state width, G groups of R heads that share B and C
    chunks of Q tokens, inner layout [b, chunk, ...]; states [b, chunk, G, N, R*P]

Inside a chunk the outputs are a masked product of C, B and the pairwise decays exp(L_i - L_j) <= 1, with L the running
sum of log a; between chunks one state per chunk is carried. B and C are shared by a group's heads, so every product
with a state is one matrix product for all heads of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Sizes:
    """The sizes and views that both passes need."""

    def __init__(self, xbc: Tensor, state: Tensor, groups: int, chunk: int) -> None:
        self.b, self.T, _ = xbc.shape
        _, self.H, self.P, self.N = state.shape
        self.G, self.Q, self.R = groups, chunk, self.H // groups
        self.chunks = self.T // chunk
        self.batch = self.b * self.chunks

    def x(self, xbc: Tensor) -> Tensor:
        """The x part of [b, T, HP + 2GN] as [b * chunks, Q, H, P]."""
        return xbc[..., : self.H * self.P].view(self.batch, self.Q, self.H, self.P)

    def shared(self, xbc: Tensor) -> tuple[Tensor, Tensor]:
        """The B and C parts of [b, T, HP + 2GN] as [b * chunks, Q, G, N] each."""
        parts = xbc[..., self.H * self.P :].view(self.batch, self.Q, 2, self.G, self.N)
        return parts[:, :, 0], parts[:, :, 1]

    def by_group(self, x: Tensor) -> Tensor:
        """[b * chunks, Q, G, ...] as [b * chunks * G, Q, -1]: a view where there is one group."""
        return x.transpose(1, 2).reshape(self.batch * self.G, self.Q, -1)

    def by_time(self, x: Tensor) -> Tensor:
        """The inverse of by_group, [b * chunks, Q, G, -1]."""
        return x.view(self.batch, self.G, self.Q, -1).transpose(1, 2)

    def heads_first(self, x: Tensor) -> Tensor:
        """[b, T, H] as a new [b * chunks, H, Q]."""
        return x.view(self.batch, self.Q, self.H).transpose(1, 2).contiguous()

    def states(self, x: Tensor) -> Tensor:
        """[b, H, P, N] as a new [b, G, N, R * P]."""
        split = x.view(self.b, self.G, self.R, self.P, self.N).permute(0, 1, 4, 2, 3)
        return split.reshape(self.b, self.G, self.N, self.R * self.P)

    def heads(self, x: Tensor) -> Tensor:
        """The inverse of states, [b, H, P, N]."""
        split = x.view(self.b, self.G, self.N, self.R, self.P).permute(0, 1, 3, 4, 2)
        return split.reshape(self.b, self.H, self.P, self.N)


class _Scan(torch.autograd.Function):
    """Inputs as ssd, with T a multiple of the chunk; returns y [b, T, H, P] and the final state [b, H, P, N]."""

    @staticmethod
    def forward(
        ctx: Any, xbc: Tensor, dt: Tensor, log_decay: Tensor, D: Tensor, state: Tensor, groups: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        s = _Sizes(xbc, state, groups, chunk)
        x = s.x(xbc)
        B, C = (s.by_group(part) for part in s.shared(xbc))
        total = log_decay.view(s.batch, s.Q, s.H).cumsum(1)
        decay = total.exp().unsqueeze(-1)
        rest = (total[:, -1:] - total).exp_().unsqueeze(-1)
        # One factor for each state and head, laid along the head's P columns.
        kept = decay[:, -1].expand(s.batch, s.H, s.P).reshape(s.b, s.chunks, s.G, 1, s.R * s.P)
        steps = dt.view(s.batch, s.Q, s.H, 1)

        # Above the diagonal the exponent is positive and means nothing: clamped, so that it cannot overflow, and
        # multiplied by the zeros of the product of C and B, which is smaller than the decays by a factor of R.
        total = total.transpose(1, 2).contiguous()
        pair = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_max_(0).exp_()
        pair = pair.view(s.batch * s.G, s.R, s.Q, s.Q)
        scores = (pair * torch.bmm(C, B.mT).tril_().unsqueeze(1)).view(s.batch * s.H, s.Q, s.Q)
        inputs = xbc.new_empty(s.batch, s.H, s.Q, s.P)
        torch.mul(x.transpose(1, 2), s.heads_first(dt).unsqueeze(-1), out=inputs)
        inputs = inputs.view(s.batch * s.H, s.Q, s.P)
        late = s.by_group((x * (steps * rest)).view(s.batch, s.Q, s.G, -1))

        before = xbc.new_empty(s.b, s.chunks, s.G, s.N, s.R * s.P)
        before[:, 0] = s.states(state)
        written = torch.bmm(B.mT, late).view_as(before)
        for c in range(1, s.chunks):
            torch.addcmul(written[:, c - 1], before[:, c - 1], kept[:, c - 1], out=before[:, c])
        final = s.heads(torch.addcmul(written[:, -1], before[:, -1], kept[:, -1]))
        before = before.view(s.batch * s.G, s.N, -1)
        y = s.by_time(torch.bmm(C, before)).reshape(s.batch, s.Q, s.H, s.P).mul_(decay)
        y.add_(torch.bmm(scores, inputs).view(s.batch, s.H, s.Q, s.P).transpose(1, 2))
        out = torch.addcmul(y, x, D.unsqueeze(-1)).reshape(s.b, s.T, s.H, s.P)
        ctx.save_for_backward(xbc, dt, D, decay, rest, kept, pair, scores, inputs, late, before, final, y)
        ctx.sizes = s
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _backward(ctx, grad_y, grad_final)


def _backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    xbc, dt, D, decay, rest, kept, pair, scores, inputs, late, before, final, y = ctx.saved_tensors
    s: _Sizes = ctx.sizes
    x = s.x(xbc)
    B, C = (s.by_group(part) for part in s.shared(xbc))
    steps = dt.view(s.batch, s.Q, s.H, 1)
    grad_y = grad_y.contiguous().view(s.batch, s.Q, s.H, s.P)
    grad_heads = grad_y.transpose(1, 2).contiguous().view(s.batch * s.H, s.Q, s.P)

    grad_scores = torch.bmm(grad_heads, inputs.mT).view_as(pair).mul_(pair).sum(1).tril_()
    decayed = s.by_group((grad_y * decay).view(s.batch, s.Q, s.G, -1))
    grad_C = torch.bmm(decayed, before.mT).baddbmm_(grad_scores, B)
    grad_states = torch.bmm(C.mT, decayed).view(s.b, s.chunks, s.G, s.N, -1)
    # The gradient of the state after each chunk.
    after = torch.empty_like(grad_states)
    after[:, -1] = s.states(grad_final)
    for c in range(s.chunks - 1, 0, -1):
        torch.addcmul(grad_states[:, c], after[:, c], kept[:, c], out=after[:, c - 1])
    grad_state = s.heads(torch.addcmul(grad_states[:, 0], after[:, 0], kept[:, 0]))
    after = after.view(s.batch * s.G, s.N, -1)
    grad_B = torch.bmm(late, after.mT).baddbmm_(grad_scores.mT, C)

    # The gradient of dt * x, through the states and inside the chunk.
    grad_input = s.by_time(torch.bmm(B, after)).reshape(s.batch, s.Q, s.H, s.P).mul_(rest)
    grad_input.add_(torch.bmm(scores.mT, grad_heads).view(s.batch, s.H, s.Q, s.P).transpose(1, 2))
    grad_dt = torch.linalg.vecdot(grad_input, x).view_as(dt)
    grad_D = (grad_y * x).sum((0, 1, 3))
    # log a_t scales all that later outputs and the final state hold from before t: what they hold in all, less
    # what was written since, is a difference of dot products that are at hand, summed from the end.
    change = torch.linalg.vecdot(grad_y, y).view_as(dt).addcmul_(grad_dt, dt, value=-1)
    change[:, -1] += (grad_final * final).sum((-1, -2))
    grad_log_decay = change.flip(1).cumsum(1).flip(1)

    grad_xbc = torch.empty_like(xbc)
    torch.mul(grad_input, steps, out=s.x(grad_xbc)).addcmul_(grad_y, D.unsqueeze(-1))
    for part, grad in zip(s.shared(grad_xbc), (grad_B, grad_C), strict=True):
        part.copy_(s.by_time(grad))
    return grad_xbc, grad_dt, grad_log_decay, grad_D, grad_state, None, None


def ssd(
    xbc: Tensor, dt: Tensor, log_decay: Tensor, D: Tensor, state: Tensor, *, groups: int = 1, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """y [b, T, H, P] and the final state [b, H, P, N] of the recurrence above, from `state` [b, H, P, N].

    xbc [b, T, H*P + G*N + G*N]: x, B and C side by side. dt >= 0 and log_decay <= 0 [b, T, H], D [H]. All of one
    dtype, float32 or float64. Differentiable once in every tensor.
    """
    length = xbc.shape[1]
    chunk = min(chunk, length)
    if length % chunk:
        # Tokens of zero step and no decay leave the state as it is.
        after = (0, 0, 0, chunk - length % chunk)
        xbc, dt, log_decay = F.pad(xbc, after), F.pad(dt, after), F.pad(log_decay, after)
    y, final = _Scan.apply(xbc, dt, log_decay, D, state, groups, chunk)
    return y[:, :length], final


def ssd_step(
    xbc: Tensor, dt: Tensor, log_decay: Tensor, D: Tensor, state: Tensor, *, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: xbc [b, H*P + 2*G*N], dt, log_decay [b, H], state [b, H, P, N].

    Returns y [b, H, P] and the new state.
    """
    b, H, P, N = state.shape
    x, B, C = xbc.split([H * P, groups * N, groups * N], dim=-1)
    x = x.view(b, H, P)
    B, C = (part.reshape(b, groups, 1, N).expand(b, groups, H // groups, N).reshape(b, H, N) for part in (B, C))
    state = state * torch.exp(log_decay)[..., None, None]
    state = torch.addcmul(state, (x * dt.unsqueeze(-1)).unsqueeze(-1), B.unsqueeze(-2))
    y = torch.matmul(state, C.unsqueeze(-1)).squeeze(-1)
    return torch.addcmul(y, x, D.unsqueeze(-1)), state
