"""What the operator accepts.

Letters used throughout `e88.ops`: B batch rows, T steps, H heads, K key rows of the state, V value columns,
N sequences (equal to B unless rows are packed with `cu_seqlens`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from e88.errors import UserError, unknown_name

ACTIVATIONS = ("tanh", "identity")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM = 256


class Problem(NamedTuple):
    """What the choice of a backend depends on: the state's shape, the dtype of q, k and v, where it runs, and how."""

    K: int
    V: int
    dtype: torch.dtype
    device: str
    activation: str


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state and of every reduction for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Problem:
    """Check a parallel call and describe it. Raises UserError with a remedy."""
    if v.dim() != 4:
        raise UserError(f"v must be [B, T, H, V], got {_shape(v)}; reshape it to one vector per head")
    B, T, H, V = v.shape
    _check_tensors(q, k, v, g, beta, (B, T, H), "B, T, H")
    K = k.shape[-1]
    N = B if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, B, T)
    _check_state("initial_state", initial_state, (N, H, K, V), v)
    return _problem(K, V, v, activation)


def check_fused(
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
) -> Problem:
    """Check a call from raw projections and describe it. Raises UserError with a remedy."""
    B, T = _check_projections(qkv, a, A_log, dt_bias, b, gate, sizes, "B, T")
    N = B if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, B, T)
    _check_state("initial_state", initial_state, (N, *sizes), qkv)
    return _problem(*sizes[1:], qkv, activation)


def check_fused_step(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    activation: str,
    sizes: tuple[int, int, int],
) -> Problem:
    """Check a one-token call from raw projections and describe it. Raises UserError with a remedy."""
    (B,) = _check_projections(qkv, a, A_log, dt_bias, b, gate, sizes, "B")
    _check_state("state", state, (B, *sizes), qkv)
    return _problem(*sizes[1:], qkv, activation)


def _check_projections(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
    gate: Tensor | None,
    sizes: tuple[int, int, int],
    letters: str,
) -> tuple[int, ...]:
    """The leading sizes, named by `letters`, that all have in common."""
    H, K, V = sizes
    if H < 1:
        raise UserError(f"n_heads must be at least 1, got {H}; pass the number of heads")
    _check_sizes(K, V)
    if qkv.dim() != letters.count(",") + 2:
        raise UserError(f"qkv must be [{letters}, H*(2K+V)], got {_shape(qkv)}; reshape it to one row per token")
    *lead, width = qkv.shape
    if width != H * (2 * K + V) and not (K == V and width == 2 * H * K):
        tied = f", or {2 * H * K} with tied k and v" if K == V else ""
        raise UserError(f"qkv must have {H * (2 * K + V)} channels for H, K, V = {H}, {K}, {V}{tied}, got {width}")
    if qkv.dtype not in DTYPES:
        raise UserError(f"qkv is {qkv.dtype}; cast it to float16, bfloat16, float32 or float64")
    if (A_log is None) != (dt_bias is None):
        raise UserError("A_log and dt_bias go together; pass both, or neither where a is the log decay itself")
    for name, vector in (("A_log", A_log), ("dt_bias", dt_bias)):
        if vector is not None:
            _check_gate(name, vector, (H,), "H", qkv, "qkv")
    for name, scalar in (("a", a), ("b", b)):
        if scalar is not None:
            _check_gate(name, scalar, (*lead, H), f"{letters}, H", qkv, "qkv")
    if gate is not None:
        _check_gate("gate", gate, (*lead, H * V), f"{letters}, H*V", qkv, "qkv")
        if gate.dtype != qkv.dtype:
            raise UserError(f"gate is {gate.dtype} but qkv is {qkv.dtype}; cast them to one dtype")
    return tuple(lead)


def check_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, activation: str
) -> Problem:
    """Check a one-token call and describe it. Raises UserError with a remedy."""
    if v.dim() != 3:
        raise UserError(f"v must be [B, H, V] for one token, got {_shape(v)}; drop the time dimension")
    B, H, V = v.shape
    _check_tensors(q, k, v, g, beta, (B, H), "B, H")
    K = k.shape[-1]
    _check_state("state", state, (B, H, K, V), v)
    return _problem(K, V, v, activation)


def _problem(K: int, V: int, like: Tensor, activation: str) -> Problem:
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    return Problem(K, V, like.dtype, like.device.type, activation)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, lead: tuple[int, ...], letters: str
) -> None:
    depth = len(lead)
    if k.dim() != depth + 1 or k.shape[:depth] != lead:
        raise UserError(f"k must be [{letters}, K] with v's {letters} = {list(lead)}, got {_shape(k)}")
    if q.shape != k.shape:
        raise UserError(f"q must have the shape of k, {_shape(k)}, got {_shape(q)}")
    _check_sizes(k.shape[-1], v.shape[-1])
    if v.dtype not in DTYPES:
        raise UserError(f"v is {v.dtype}; cast q, k and v to float16, bfloat16, float32 or float64")
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype != v.dtype:
            raise UserError(f"{name} is {tensor.dtype} but v is {v.dtype}; cast q, k and v to one dtype")
        if tensor.device != v.device:
            raise UserError(f"{name} is on {tensor.device} but v is on {v.device}; move them to one device")
    for name, gate in (("g", g), ("beta", beta)):
        if gate is not None:
            _check_gate(name, gate, lead, letters, v, "v")


def _check_sizes(K: int, V: int) -> None:
    for name, size in (("K", K), ("V", V)):
        if not 1 <= size <= MAX_DIM:
            raise UserError(f"{name} must be 1 to {MAX_DIM}, got {size}; use more heads of a smaller state")


def _check_gate(name: str, x: Tensor, shape: tuple[int, ...], letters: str, like: Tensor, like_name: str) -> None:
    if x.shape != shape:
        raise UserError(f"{name} must be [{letters}] = {list(shape)}, got {_shape(x)}")
    if x.dtype not in DTYPES:
        raise UserError(f"{name} is {x.dtype}; cast it to float32")
    if x.device != like.device:
        raise UserError(f"{name} is on {x.device} but {like_name} is on {like.device}; move them to one device")


def _check_state(name: str, state: Tensor | None, shape: tuple[int, int, int, int], v: Tensor) -> None:
    if state is None:
        return
    if state.shape != shape:
        raise UserError(f"{name} must be [N, H, K, V] = {list(shape)}, got {_shape(state)}")
    if state.dtype not in DTYPES:
        raise UserError(f"{name} is {state.dtype}; cast it to {state_dtype(v.dtype)}")
    if state.device != v.device:
        raise UserError(f"{name} is on {state.device} but v is on {v.device}; move them to one device")


def _check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int) -> int:
    if B != 1:
        raise UserError(f"cu_seqlens needs packed rows with B = 1, got B = {B}; concatenate rows along T")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserError(
            f"cu_seqlens must be [N + 1] integers, got {_shape(cu_seqlens)} of {cu_seqlens.dtype}; "
            "pass int32 or int64 boundaries 0, ..., T"
        )
    # Reading the values of a device tensor would stall the device; under the compiler there are none to read.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != T or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise UserError(f"cu_seqlens must rise from 0 to T = {T} without falling; check the boundaries")
    return cu_seqlens.shape[0] - 1
