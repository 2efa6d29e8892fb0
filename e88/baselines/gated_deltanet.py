"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024), with the parameters of flash-linear-attention's layer.

    B batch, T time, D model width, H heads, K = head_dim, V = head_dim * expand_v
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.baselines.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from e88.baselines.libraries import PLAIN, choose
from e88.layers.common import GatedRMSNorm, RMSNorm, ShortConv, decay_parameters, short_conv
from e88.layers.mixer import Mixer, State
from e88.models.config import GatedDeltaNetConfig
from e88.ops.norms import wide, wide_dtype


class GatedDeltaNet(Mixer):
    """out = W_o gate(norm(y)), y the gated delta rule of q, k, v = silu(conv(W x)).

    The decay is exp(-exp(A_log) softplus(W_a x + dt_bias)), the write strength sigmoid(W_b x). Parameters carry the
    names and shapes of `fla.layers.GatedDeltaNet` and start as there (linear maps and convolutions as PyTorch's own),
    except that exp(A_log) is kept above 0.01, so that no decay parameter starts at minus infinity.

    `backend`: on a GPU in half precision the library's kernels run (`fla`), else our PyTorch code (`torch`), whose
    recurrence is float32 (float64 for float64 parameters) under any autocast; `auto` is the library where it serves.
    """

    backends = ("fla", PLAIN)

    def __init__(self, dim: int, config: GatedDeltaNetConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        heads, k_dim, v_dim = config.n_heads, config.head_dim, config.head_v_dim
        self.widths = (heads * k_dim, heads * k_dim, heads * v_dim)
        self.q_proj = nn.Linear(dim, heads * k_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * k_dim, bias=False)
        self.v_proj = nn.Linear(dim, heads * v_dim, bias=False)
        self.a_proj = nn.Linear(dim, heads, bias=False)
        self.b_proj = nn.Linear(dim, heads, bias=False)
        self.A_log, self.dt_bias = decay_parameters(heads, a_low=0.01)
        if config.conv:
            self.q_conv1d = ShortConv(heads * k_dim, config.conv)
            self.k_conv1d = ShortConv(heads * k_dim, config.conv)
            self.v_conv1d = ShortConv(heads * v_dim, config.conv)
        self.g_proj = nn.Linear(dim, heads * v_dim, bias=False) if config.gate else None
        self.o_norm: RMSNorm = GatedRMSNorm(v_dim) if config.gate else RMSNorm(v_dim)
        self.o_proj = nn.Linear(heads * v_dim, dim, bias=False)

    def extra_repr(self) -> str:
        return str(self.config)

    def forward(
        self, x: Tensor, state: State | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> y [B, T, D]; the state holds S [B, H, K, V] and, with convolutions, their tail `conv`."""
        if choose(self.backend, x, fla=self._misfit()) != PLAIN:
            return self._library_forward(x, state, return_state)
        given = self.init_state(len(x), device=x.device) if state is None else state
        # One product, one convolution and one gradient for q, k and v together.
        qkv = F.linear(x, torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]))
        tail = None
        if self.config.conv:
            filters = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])
            qkv, tail = short_conv(qkv, filters, None, None if state is None else state["conv"])
        qkv = F.silu(qkv)
        log_decay, beta_logit = self._gates(x)
        with torch.autocast(x.device.type, enabled=False):
            y, final = gated_delta_rule(
                wide(qkv), log_decay, beta_logit, given["S"], k_dim=self.config.head_dim
            )
        out = self._output(y, x)
        if not return_state:
            return out, None
        return out, {"S": final} if tail is None else {"S": final, "conv": tail}

    def _misfit(self) -> str | None:
        """Why the library's kernels cannot serve this model, or None."""
        widths = (self.config.head_dim, self.config.head_v_dim)
        return None if all(w % 16 == 0 for w in widths) else f"its head widths are multiples of 16, not {widths}"

    def _library_forward(self, x: Tensor, state: State | None, return_state: bool) -> tuple[Tensor, State | None]:
        """The same function through fla's convolution, recurrence and gated norm."""
        from fla.modules.convolution import causal_conv1d
        from fla.modules.fused_norm_gate import rms_norm_gated
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        tail = None
        if not self.config.conv:
            parts = [F.silu(part) for part in parts]
        elif state is None and not return_state:
            filters = [conv.weight.squeeze(1) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
            parts = [causal_conv1d(p, f, activation="silu")[0] for p, f in zip(parts, filters, strict=True)]
        else:
            parts, tail = self._convolve(parts, state)
            parts = [F.silu(part) for part in parts]
        q, k, v = (part.unflatten(-1, (self.config.n_heads, -1)) for part in parts)
        # The layout of fla's own layer, unless the state leaves or enters in ours.
        keep = state is not None or return_state
        y, final = chunk_gated_delta_rule(
            q, k, v, self.a_proj(x), self.b_proj(x), A_log=self.A_log, dt_bias=self.dt_bias,
            initial_state=None if state is None else state["S"], output_final_state=return_state,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            state_v_first=not keep,
        )  # fmt: skip
        if self.g_proj is None:
            out = self.o_proj(self.o_norm(y).flatten(-2))
        else:
            gate = self.g_proj(x).unflatten(-1, y.shape[-2:])
            out = self.o_proj(rms_norm_gated(y, gate, self.o_norm.weight, None, eps=self.o_norm.eps).flatten(-2))
        if not return_state:
            return out, None
        return out, {"S": final} if tail is None else {"S": final, "conv": tail}

    def _convolve(self, parts: list[Tensor], state: State | None) -> tuple[list[Tensor], Tensor]:
        """The convolutions of q, k and v [B, T, C], and their tails side by side."""
        tails = [None, None, None] if state is None else state["conv"].split(self.widths, dim=1)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        pairs = [conv(part, tail) for conv, part, tail in zip(convs, parts, tails, strict=True)]
        return [y for y, _ in pairs], torch.cat([tail for _, tail in pairs], dim=1)

    def init_state(self, batch: int, *, device: torch.device | None = None) -> State:
        c, weight = self.config, self.o_proj.weight
        device = weight.device if device is None else device
        shape, dtype = (batch, c.n_heads, c.head_dim, c.head_v_dim), wide_dtype(weight.dtype)
        state = {"S": torch.zeros(shape, device=device, dtype=dtype)}
        if c.conv:
            state["conv"] = torch.zeros(batch, sum(self.widths), c.conv - 1, device=device, dtype=weight.dtype)
        return state

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D] -> [B, D]."""
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        new_state: State = {}
        if self.config.conv:
            parts, new_state["conv"] = self._convolve([p.unsqueeze(1) for p in parts], state)
            parts = [part.squeeze(1) for part in parts]
        q, k, v = (wide(F.silu(p)).unflatten(-1, (self.config.n_heads, -1)) for p in parts)
        log_decay, beta_logit = self._gates(x)
        with torch.autocast(x.device.type, enabled=False):
            y, new_state["S"] = gated_delta_rule_step(q, k, v, log_decay, beta_logit, state["S"])
        return self._output(y, x), new_state

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log of the decay and logit of the write strength, both [..., H], float32 or wider."""
        a, b = wide(F.linear(x, torch.cat([self.a_proj.weight, self.b_proj.weight]))).chunk(2, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            return -torch.exp(self.A_log) * F.softplus(a + self.dt_bias), b

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        """The gated norm and the output projection of y [..., H, V]."""
        if self.g_proj is None:
            return self.o_proj(self.o_norm(y).flatten(-2))
        gate = self.g_proj(x).unflatten(-1, y.shape[-2:])
        return self.o_proj(self.o_norm(y, gate).flatten(-2))
