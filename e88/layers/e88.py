"""The E88 layer: projections, decay and gates around the nonlinear matrix recurrence.

B batch, T time, D model width, H heads, K = n_state, V = n_state * expand_v
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.layers.common import RMSNorm, ShortConv, decay_parameters, exempt_from_decay, l2_norm, wide_dtype
from e88.layers.mixer import Mixer, State
from e88.models.config import E88Config
from e88.ops import tanh_delta_rule, tanh_delta_rule_step


class E88Layer(Mixer):
    """S_t = tanh(d_t S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T), out = W_o S_t^T q_t, q, k, v = silu(conv(W_qkv x)).

    q and k are L2-normalised per head. Options, see E88Config: decay mode, output gate, short convolution, per-head
    RMSNorm on the output, write gate b_t, tied k and v, linear state. Parameters are float32; the decay is computed in
    float32 and the state is float32 whatever the autocast dtype. `backend` picks the operator's backend.
    """

    def __init__(self, dim: int, config: E88Config, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        heads, k_dim, v_dim = config.n_heads, config.head_k_dim, config.head_v_dim
        self.widths = [heads * k_dim, heads * k_dim] + ([] if config.tie_kv else [heads * v_dim])
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.qkv_conv = ShortConv(sum(self.widths), config.conv) if config.conv else None
        if config.decay in ("mamba", "sigmoid"):
            self.a_proj = nn.Linear(dim, heads, bias=False)
        A_log, dt_bias = decay_parameters(heads)
        if config.decay == "mamba":
            self.A_log, self.dt_bias = A_log, dt_bias
        elif config.decay != "none":
            # The same spread of time constants: a decay of 1 - dt when the projection is 0.
            dt = F.softplus(dt_bias.detach())
            logit = nn.Parameter(torch.log1p(-dt) - torch.log(dt))
            exempt_from_decay(logit)
            if config.decay == "sigmoid":
                self.dt_bias = logit
            else:
                self.decay_logit = logit
        self.b_proj = nn.Linear(dim, heads, bias=False) if config.write_gate else None
        self.g_proj = nn.Linear(dim, heads * v_dim, bias=False) if config.gate else None
        self.o_norm = RMSNorm(v_dim) if config.head_norm else None
        self.o_proj = nn.Linear(heads * v_dim, dim, bias=False)

    def extra_repr(self) -> str:
        return f"{self.config}, backend={self.backend!r}"

    def log_decay(self, x: Tensor) -> Tensor:
        """log d_t for x [..., D]: [..., H], float32, never above 0."""
        mode, heads = self.config.decay, self.config.n_heads
        if mode == "none":
            return x.new_zeros((*x.shape[:-1], heads), dtype=wide_dtype(x.dtype))
        if mode == "constant":
            return F.logsigmoid(self.decay_logit).expand(*x.shape[:-1], heads)
        a = self.a_proj(x)
        a = a.to(wide_dtype(a.dtype)) + self.dt_bias
        return F.logsigmoid(a) if mode == "sigmoid" else -torch.exp(self.A_log) * F.softplus(a)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split activated projections [..., C] into normalised q, k [..., H, K] and v [..., H, V]."""
        c = self.config
        parts = torch.split(qkv, self.widths, dim=-1)
        q, k = (part.unflatten(-1, (c.n_heads, c.head_k_dim)) for part in parts[:2])
        v = k if c.tie_kv else parts[2].unflatten(-1, (c.n_heads, c.head_v_dim))
        return l2_norm(q), l2_norm(k), v

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        if self.o_norm is not None:
            y = self.o_norm(y)
        y = y.flatten(-2)
        if self.g_proj is not None:
            y = y * F.silu(self.g_proj(x))
        return self.o_proj(y)

    def forward(
        self, x: Tensor, state: State | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> y [B, T, D]; the state holds S [B, H, K, V] (float32) and the convolution's tail."""
        qkv = self.qkv_proj(x)
        tail = None
        if self.qkv_conv is not None:
            qkv, tail = self.qkv_conv(qkv, None if state is None else state["conv"])
        q, k, v = self._heads(F.silu(qkv))
        beta = None if self.b_proj is None else torch.sigmoid(self.b_proj(x)).to(wide_dtype(x.dtype))
        y, final = tanh_delta_rule(
            q, k, v, self.log_decay(x), beta,
            initial_state=None if state is None else state["S"], output_final_state=return_state,
            activation="identity" if self.config.linear_state else "tanh", backend=self.backend,
        )  # fmt: skip
        out = self._output(y, x)
        if not return_state:
            return out, None
        assert final is not None
        return out, {"S": final} if tail is None else {"S": final, "conv": tail}

    def init_state(self, batch: int, *, device: torch.device | None = None) -> State:
        c = self.config
        dtype = wide_dtype(self.o_proj.weight.dtype)
        state = {"S": torch.zeros(batch, c.n_heads, c.head_k_dim, c.head_v_dim, device=device, dtype=dtype)}
        if self.qkv_conv is not None:
            state["conv"] = self.qkv_conv.init_tail(batch, device=device)
        return state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D] -> [B, D]."""
        qkv = self.qkv_proj(x)
        new_state: State = {}
        if self.qkv_conv is not None:
            qkv, new_state["conv"] = self.qkv_conv(qkv.unsqueeze(1), state["conv"])
            qkv = qkv.squeeze(1)
        q, k, v = self._heads(F.silu(qkv))
        beta = None if self.b_proj is None else torch.sigmoid(self.b_proj(x)).to(wide_dtype(x.dtype))
        y, new_state["S"] = tanh_delta_rule_step(
            q, k, v, self.log_decay(x), beta, state=state["S"],
            activation="identity" if self.config.linear_state else "tanh", backend=self.backend,
        )  # fmt: skip
        return self._output(y, x), new_state
