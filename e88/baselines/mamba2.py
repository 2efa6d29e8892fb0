"""Mamba2 (Dao and Gu, 2024), with the parameters of mamba-ssm's layer.

    B batch, T time, D model width, H heads, P = head_dim, N = d_state, G = n_groups
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e88.baselines.libraries import PLAIN, choose, mamba_is_fused, mamba_mode
from e88.baselines.ssd import ssd, ssd_step
from e88.layers.common import GatedRMSNorm, ShortConv, decay_parameters, exempt_from_decay
from e88.layers.mixer import Mixer, State
from e88.models.config import Mamba2Config
from e88.ops.backends import note
from e88.ops.norms import wide, wide_dtype

# The fastest on a CPU: longer chunks cost more in pairs of tokens, shorter ones in states.
CPU_CHUNK = 32


class Mamba2(Mixer):
    """out = W_o norm(y * silu(z)), y the state space recurrence of x, B, C = silu(conv(W x)), and a skip D x.

    The step is softplus(W_dt x + dt_bias), the decay exp(-exp(A_log) step). Parameters carry the names and shapes of
    `mamba_ssm.modules.mamba2.Mamba2`, with its defaults (SiLU, norm after the gate, bias in the convolution only), and
    start as there.

    `backend`: on a GPU in half precision the library's kernels run (`mamba-ssm`), else our PyTorch code (`torch`),
    whose recurrence is float32 (float64 for float64 parameters) under any autocast; `auto` is the library where it
    serves.
    """

    backends = ("mamba-ssm", PLAIN)

    def __init__(self, dim: int, config: Mamba2Config, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.d_inner = config.expand * dim
        self.n_heads = self.d_inner // config.head_dim
        self.conv_dim = self.d_inner + 2 * config.n_groups * config.d_state
        self.in_proj = nn.Linear(dim, self.d_inner + self.conv_dim + self.n_heads, bias=False)
        self.conv1d = ShortConv(self.conv_dim, config.conv, bias=True)
        self.A_log, self.dt_bias = decay_parameters(self.n_heads)
        self.D = nn.Parameter(torch.ones(self.n_heads))
        exempt_from_decay(self.D)
        self.norm = GatedRMSNorm(self.d_inner, gate_first=True, groups=config.n_groups)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False)

    def extra_repr(self) -> str:
        return str(self.config)

    def forward(
        self, x: Tensor, state: State | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """x [B, T, D] -> y [B, T, D]; the state holds S [B, H, P, N] and the convolution's tail `conv`."""
        if choose(self.backend, x, mamba_ssm=self._misfit()) != PLAIN:
            if state is None and not return_state and mamba_is_fused():
                return self._fused_forward(x), None
            return self._scan_forward(x, state, return_state)
        z, xbc, dt = self._project(x)
        xbc, tail = self.conv1d(xbc, None if state is None else state["conv"])
        xbc = F.silu(xbc)
        given = self.init_state(len(x), device=x.device) if state is None else state
        chunk = min(self.config.chunk, CPU_CHUNK) if x.device.type == "cpu" else self.config.chunk
        with torch.autocast(x.device.type, enabled=False):
            dt, log_decay = self._steps(dt)
            D, groups = self.D.to(dt.dtype), self.config.n_groups
            y, final = ssd(wide(xbc), dt, log_decay, D, given["S"], groups=groups, chunk=chunk)
        out = self.out_proj(self.norm(y.flatten(2), z))
        return out, {"S": final, "conv": tail} if return_state else None

    def _misfit(self) -> str | None:
        """Why the library's kernels cannot serve this model, or None."""
        if self.config.conv > 4:
            return f"its convolution is 2 to 4 wide, not {self.config.conv}"
        return None if self.conv_dim % 8 == 0 else f"its convolution has a multiple of 8 channels, not {self.conv_dim}"

    def _fused_forward(self, x: Tensor) -> Tensor:
        """The same function through mamba-ssm's fused pass, from the input projection to the output projection."""
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

        return mamba_split_conv1d_scan_combined(
            self.in_proj(x), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, -torch.exp(self.A_log),
            self.D, self.config.chunk, activation="silu", headdim=self.config.head_dim, ngroups=self.config.n_groups,
            rmsnorm_weight=self.norm.weight, rmsnorm_eps=self.norm.eps, norm_before_gate=False,
            outproj_weight=self.out_proj.weight,
        )  # fmt: skip

    def _scan_forward(self, x: Tensor, state: State | None, return_state: bool) -> tuple[Tensor, State | None]:
        """The same function through mamba-ssm's scan and gated norm, for what its fused pass cannot do."""
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        note(mamba_mode(fused=False))
        c = self.config
        z, xbc, dt = self.in_proj(x).split([self.d_inner, self.conv_dim, self.n_heads], dim=-1)
        xbc, tail = self.conv1d(xbc, None if state is None else state["conv"])
        shared = c.n_groups * c.d_state
        values, B, C = F.silu(xbc).split([self.d_inner, shared, shared], dim=-1)
        y, final = mamba_chunk_scan_combined(
            values.unflatten(-1, (self.n_heads, -1)), dt, -torch.exp(self.A_log), B.unflatten(-1, (c.n_groups, -1)),
            C.unflatten(-1, (c.n_groups, -1)), c.chunk, D=self.D, dt_bias=self.dt_bias, dt_softplus=True,
            initial_states=None if state is None else state["S"], return_final_states=True,
        )  # fmt: skip
        y = rmsnorm_fn(
            y.flatten(2), self.norm.weight, None, z=z, eps=self.norm.eps, group_size=self.d_inner // c.n_groups,
            norm_before_gate=False,
        )  # fmt: skip
        return self.out_proj(y), {"S": final, "conv": tail} if return_state else None

    def init_state(self, batch: int, *, device: torch.device | None = None) -> State:
        weight = self.out_proj.weight
        device = weight.device if device is None else device
        shape = (batch, self.n_heads, self.config.head_dim, self.config.d_state)
        state = torch.zeros(shape, device=device, dtype=wide_dtype(weight.dtype))
        return {"S": state, "conv": self.conv1d.init_tail(batch, device=device)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D] -> [B, D]."""
        z, xbc, dt = self.in_proj(x).split([self.d_inner, self.conv_dim, self.n_heads], dim=-1)
        xbc, tail = self.conv1d(xbc.unsqueeze(1), state["conv"])
        xbc = F.silu(xbc.squeeze(1))
        with torch.autocast(x.device.type, enabled=False):
            dt, log_decay = self._steps(dt)
            D, groups = self.D.to(dt.dtype), self.config.n_groups
            y, final = ssd_step(wide(xbc), dt, log_decay, D, state["S"], groups=groups)
        return self.out_proj(self.norm(y.flatten(1), z)), {"S": final, "conv": tail}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z, the convolution's input and the raw step; the weight is split, so no activation is copied."""
        parts = self.in_proj.weight.split([self.d_inner, self.conv_dim, self.n_heads])
        z, xbc, dt = (F.linear(x, weight) for weight in parts)
        return z, xbc, dt

    def _steps(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """The step and the log of the decay, [..., H], of the raw step."""
        dt = F.softplus(wide(dt) + self.dt_bias)
        return dt, dt * -torch.exp(self.A_log)
