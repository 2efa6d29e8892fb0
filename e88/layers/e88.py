"""The E88 layer: projections, decay and gates around the nonlinear matrix recurrence.

B batch, T time, D model width, H heads, K = n_state, V = n_state * expand_v
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.layers.common import RMSNorm, ShortConv, decay_parameters, exempt_from_decay
from e88.layers.linear import joint_linear
from e88.layers.mixer import Mixer, State
from e88.models.config import E88Config
from e88.ops import few_rows, fused_tanh_delta_rule, fused_tanh_delta_rule_step
from e88.ops.backends import BACKENDS
from e88.ops.norms import wide, wide_dtype


class E88Layer(Mixer):
    """S_t = tanh(d_t S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T), out = W_o S_t^T q_t, q, k, v = silu(conv(W_qkv x)).

    q and k are L2-normalised per head. Options, see E88Config: decay mode, output gate, short convolution, per-head
    RMSNorm on the output, write gate b_t, tied k and v, linear state. Parameters are float32; the decay is computed in
    float32 and the state is float32 whatever the autocast dtype. `backend` picks the operator's backend.
    """

    backends = tuple(row.name for row in BACKENDS)

    def __init__(self, dim: int, config: E88Config, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        heads, k_dim, v_dim = config.n_heads, config.head_k_dim, config.head_v_dim
        width = heads * (2 * k_dim if config.tie_kv else 2 * k_dim + v_dim)
        self.qkv_proj = nn.Linear(dim, width, bias=False)
        self.qkv_conv = ShortConv(width, config.conv) if config.conv else None
        self.a_proj = nn.Linear(dim, heads, bias=False) if config.decay in ("mamba", "sigmoid") else None
        A_log, dt_bias = decay_parameters(heads, config.a_low, config.a_high)
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

    def decay(self, x: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The operator's a, A_log and dt_bias for x [..., C] and a = a_proj(x); log d_t, None, None in some modes."""
        mode, heads = self.config.decay, self.config.n_heads
        if mode == "mamba":
            assert a is not None
            return a, self.A_log, self.dt_bias
        if mode == "sigmoid":
            assert a is not None
            return F.logsigmoid(wide(a) + self.dt_bias), None, None
        if mode == "constant":
            return F.logsigmoid(self.decay_logit).expand(*x.shape[:-1], heads), None, None
        return x.new_zeros((*x.shape[:-1], heads), dtype=wide_dtype(x.dtype)), None, None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """qkv, output gate, a and write gate for x [..., D], before any activation; None where there is no such."""
        return self._named(joint_linear(x, self._projections()))

    def _projections(self) -> list[nn.Linear]:
        return [p for p in (self.qkv_proj, self.g_proj, self.a_proj, self.b_proj) if p is not None]

    def _named(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        qkv, *others = outputs
        rest = iter(others)
        gate, a, b = (None if p is None else next(rest) for p in (self.g_proj, self.a_proj, self.b_proj))
        return qkv, gate, a, b

    @property
    def activation(self) -> str:
        return "identity" if self.config.linear_state else "tanh"

    def forward(
        self, x: Tensor, state: State | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> y [B, T, D]; the state holds S [B, H, K, V] (float32) and the convolution's tail."""
        c = self.config
        qkv, gate, a, b = self._project(x)
        tail = None
        if self.qkv_conv is not None:
            qkv, tail = self.qkv_conv(qkv, None if state is None else state["conv"])
        y, final = fused_tanh_delta_rule(
            qkv, *self.decay(x, a), n_heads=c.n_heads, head_k_dim=c.head_k_dim, head_v_dim=c.head_v_dim,
            b=b, gate=gate if self.o_norm is None else None,
            initial_state=None if state is None else state["S"], output_final_state=return_state,
            activation=self.activation, backend=self.backend,
        )  # fmt: skip
        y = y if self.o_norm is None else self._norm_and_gate(y, gate)
        (out,) = joint_linear(y, [self.o_proj])
        if not return_state:
            return out, None
        assert final is not None
        return out, {"S": final} if tail is None else {"S": final, "conv": tail}

    def _norm_and_gate(self, y: Tensor, gate: Tensor | None) -> Tensor:
        if self.o_norm is not None:
            y = self.o_norm(y.unflatten(-1, (self.config.n_heads, -1))).flatten(-2)
        return y if gate is None else y * F.silu(gate)

    def init_state(self, batch: int, *, device: torch.device | None = None) -> State:
        c, weight = self.config, self.o_proj.weight
        device = weight.device if device is None else device
        shape, dtype = (batch, c.n_heads, c.head_k_dim, c.head_v_dim), wide_dtype(weight.dtype)
        state = {"S": torch.zeros(shape, device=device, dtype=dtype)}
        if self.qkv_conv is not None:
            state["conv"] = self.qkv_conv.init_tail(batch, device=device)
        return state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D] -> [B, D]."""
        return self._step(*self._project(x), state, False)

    @torch.no_grad()
    def join_projections(self) -> None:
        projections = self._projections()
        self.joined = torch.cat([p.weight for p in projections])
        # Each stays what it was, now as rows of the whole, so that nothing is held twice.
        for projection, rows in zip(projections, self.joined.split([p.out_features for p in projections]), strict=True):
            projection.weight = nn.Parameter(rows, requires_grad=False)

    def step_joined(self, p: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, State]:
        parts = p.split([projection.out_features for projection in self._projections()], dim=-1)
        return self._step(*self._named(parts), state, inplace)

    def _step(
        self, qkv: Tensor, gate: Tensor | None, a: Tensor | None, b: Tensor | None, state: State, inplace: bool
    ) -> tuple[Tensor, State]:
        c = self.config
        new_state: State = {}
        if self.qkv_conv is not None:
            qkv, new_state["conv"] = self.qkv_conv(qkv.unsqueeze(1), state["conv"])
            qkv = qkv.squeeze(1)
        y, new_state["S"] = fused_tanh_delta_rule_step(
            qkv, *self.decay(qkv, a), n_heads=c.n_heads, head_k_dim=c.head_k_dim, head_v_dim=c.head_v_dim,
            b=b, gate=gate if self.o_norm is None else None, state=state["S"],
            activation=self.activation, backend=self.backend, inplace=inplace,
        )  # fmt: skip
        y = y if self.o_norm is None else self._norm_and_gate(y, gate)
        return few_rows.linear(y, self.o_proj.weight), new_state
