"""One token on the CUDA backend: projections in, gated output and new state out, in one launch (`step.cu`).

Letters as in `e88.ops.contract`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e88.ops.cuda.compile import Kernel, compile_cubin, overlapping
from e88.ops.cuda.launch import pointer, submit
from e88.ops.cuda.linear import MAX_ROWS
from e88.ops.cuda.plan import DTYPES
from e88.ops.differentiable import operator

# Of one head, in a warp (`step.cu`).
COLUMNS = 16


def fused_step(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    activation: str,
    sizes: tuple[int, int, int],
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The backend's `fused_tanh_delta_rule_step`: y [B, H * V] and the new state; not differentiable."""
    H, K, V = sizes
    qkv, a = _row(qkv), _row(a if a.dtype in DTYPES else a.float())
    b, gate = (None if x is None else _row(x.to(qkv.dtype)) for x in (b, gate))
    A_log, dt_bias = (None if x is None else x.float().contiguous() for x in (A_log, dt_bias))
    tanh = activation == "tanh"
    x = Token(qkv, a, A_log, dt_bias, b, gate, state.float(), H, K, V, tanh)
    if inplace and state.dtype == torch.float32:
        return _step_in_place(*x), state
    y, new_state = _step(*x)
    return y, state.copy_(new_state) if inplace else new_state


class Token(NamedTuple):
    """One step of every row: projections as they come, A_log, dt_bias and the state in float32."""

    qkv: Tensor
    a: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    b: Tensor | None
    gate: Tensor | None
    state: Tensor
    H: int
    K: int
    V: int
    tanh: bool


class Results(NamedTuple):
    y: Tensor
    state: Tensor


def _packed(state: Tensor) -> Tensor:
    """The state as rows that start at multiples of 16 bytes; a copy only if needed."""
    state = state.contiguous()
    return state if state.data_ptr() % 16 == 0 else state.clone()


def _row(x: Tensor) -> Tensor:
    """`x` [B, C], each row packed; a copy only if needed."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


@cache
def _kernel(device: int, defines: tuple[tuple[str, int], ...]) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compile_cubin("step", f"sm_{major}{minor}", dict(defines)), "e88_step", device, 0)


def defines(
    K: int,
    V: int,
    dtype: torch.dtype,
    a_dtype: torch.dtype,
    *,
    tanh: bool,
    tied: bool,
    decay: bool,
    beta: bool,
    gate: bool,
) -> dict[str, int]:
    """What the host sets in `step.cu`; decay says whether `a` is raw."""
    return {
        "K": K,
        "V": V,
        "DTYPE": DTYPES[dtype],
        "A_DTYPE": DTYPES[a_dtype],
        "TANH": int(tanh),
        "TIED": int(tied),
        "DECAY": int(decay),
        "BETA": int(beta),
        "GATE": int(gate),
    }


def _launch(x: Token, y: Tensor, new_state: Tensor) -> None:
    """From x.state, which is packed, to `new_state`, which may be the same."""
    qkv, a, A_log, dt_bias, b, gate, state, H, K, V, tanh = x
    tied = qkv.shape[1] == 2 * H * K
    flags = {"tanh": tanh, "tied": tied, "decay": A_log is not None, "beta": b is not None, "gate": gate is not None}
    chosen = defines(K, V, qkv.dtype, a.dtype, **flags)
    warps = qkv.shape[0] * H * -(-V // COLUMNS)
    if warps == 0:
        return
    arguments: list[Any] = [pointer(t) for t in (*x[:7], y, new_state)]
    arguments += [ctypes.c_int64(0 if t is None else t.stride(0)) for t in (qkv, a, b, gate)]
    arguments += [ctypes.c_int(H), ctypes.c_int(warps)]
    device = qkv.device.index
    # Few warps are spread over all multiprocessors. After a library's product an early start gains nothing.
    threads = 32 if warps <= 1024 else 128
    overlap = qkv.shape[0] <= MAX_ROWS and overlapping(device)
    kernel = _kernel(device, tuple(chosen.items()))
    submit(kernel, device, -(-32 * warps // threads), threads, arguments, overlap=overlap)


def _empty_output(*values: Any) -> Tensor:
    x = Token(*values)
    return x.qkv.new_empty(x.qkv.shape[0], x.H * x.V)


def _empty(*values: Any) -> Results:
    state = Token(*values).state
    return Results(_empty_output(*values), state.new_empty(state.shape))


def _run(*values: Any) -> Results:
    x, out = Token(*values), _empty(*values)
    _launch(x._replace(state=_packed(x.state)), *out)
    return out


def _run_in_place(*values: Any) -> Tensor:
    x, y = Token(*values), _empty_output(*values)
    packed = _packed(x.state)
    _launch(x._replace(state=packed), y, packed)
    if packed is not x.state:
        x.state.copy_(packed)
    else:
        torch.autograd.graph.increment_version(packed)
    return y


_step = operator("e88::cuda_step", _run, _empty, Token, device_types="cuda")
_step_in_place = operator(
    "e88::cuda_step_in_place", _run_in_place, _empty_output, Token, device_types="cuda", mutates_args=("state",)
)
