"""What the operator accepts, which backends there are, and which one runs.

Letters used throughout `e88.ops`: B batch rows, T steps, H heads, K key rows of the state, V value columns,
N sequences (equal to B unless rows are packed with `cu_seqlens`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from e88.errors import UserError, unknown_name

ACTIVATIONS = ("tanh", "identity")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM = 256


@dataclass(frozen=True)
class Problem:
    """One call of the operator as backends see it: sizes, the dtype of q, k and v, and where it runs."""

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int
    packed: bool
    dtype: torch.dtype
    device: str
    activation: str
    needs_grad: bool


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
    N = B
    if cu_seqlens is not None:
        N = _check_cu_seqlens(cu_seqlens, B, T)
    _check_state("initial_state", initial_state, (N, H, K, V), v)
    return _problem((B, T, H, K, V, N), cu_seqlens is not None, (q, k, v, g, beta, initial_state), activation)


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
    return _problem((B, 1, H, K, V, B), False, (q, k, v, g, beta, state), activation)


def _problem(
    sizes: tuple[int, int, int, int, int, int],
    packed: bool,
    tensors: tuple[Tensor | None, ...],
    activation: str,
) -> Problem:
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    given = [tensor for tensor in tensors if tensor is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return Problem(*sizes, packed, given[2].dtype, given[2].device.type, activation, needs_grad)


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
    for name, size in (("K", k.shape[-1]), ("V", v.shape[-1])):
        if not 1 <= size <= MAX_DIM:
            raise UserError(f"{name} must be 1 to {MAX_DIM}, got {size}; use more heads of a smaller state")
    if v.dtype not in DTYPES:
        raise UserError(f"v is {v.dtype}; cast q, k and v to float16, bfloat16, float32 or float64")
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype != v.dtype:
            raise UserError(f"{name} is {tensor.dtype} but v is {v.dtype}; cast q, k and v to one dtype")
    for name, gate in (("g", g), ("beta", beta)):
        if gate is None:
            continue
        if gate.shape != lead:
            raise UserError(f"{name} must be [{letters}] = {list(lead)}, one per head, got {_shape(gate)}")
        if gate.dtype not in DTYPES:
            raise UserError(f"{name} is {gate.dtype}; cast it to float32")
    for name, other in (("q", q), ("k", k), ("g", g), ("beta", beta)):
        if other is not None and other.device != v.device:
            raise UserError(f"{name} is on {other.device} but v is on {v.device}; move them to one device")


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


class Backend(NamedTuple):
    """A row of the table. `module` is imported on first use and has `run` and perhaps `step`.

    `supports` gives the reason why a problem cannot be served, or None; `missing` the same for this machine,
    whatever the problem.
    """

    name: str
    module: str
    supports: Callable[[Problem], str | None]
    missing: Callable[[], str | None] = lambda: None


@lru_cache
def _installed(package: str) -> bool:
    # Asked at every call, and a look at the disk takes as long as a small problem.
    return importlib.util.find_spec(package) is not None


def _numba_supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"runs on CPU tensors only, not on {problem.device}"
    if problem.dtype == torch.float64:
        return "computes in float32, and the inputs are float64"
    return None


def _numba_missing() -> str | None:
    return None if _installed("numba") else "numba is not installed; pip install numba"


def _cuda_supports(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"runs on CUDA tensors only, not on {problem.device}"
    if problem.dtype == torch.float64:
        return "computes in float32, and the inputs are float64"
    if problem.K % 8 or problem.V % 8 or max(problem.K, problem.V) > 128:
        return f"K and V must be multiples of 8 up to 128, not {problem.K} and {problem.V}"
    return None


def _cuda_missing() -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA device that torch can use"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if not _installed("cuda") or not _installed("cuda.bindings"):
        return "cuda.bindings is not installed; pip install cuda-bindings"
    return None


def _triton_supports(problem: Problem) -> str | None:
    if problem.device not in (("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)):
        return f"runs on GPU tensors, or on the CPU's where TRITON_INTERPRET=1, not on {problem.device}"
    if problem.dtype == torch.float64:
        return "computes in float32, and the inputs are float64"
    if max(problem.K, problem.V) > 128:
        return f"K and V may be 128 at most, not {problem.K} and {problem.V}"
    return None


def _triton_missing() -> str | None:
    if not _installed("triton"):
        return "triton is not installed; pip install triton"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU that torch can use, and TRITON_INTERPRET is not 1"
    return None


# In order of preference: "auto" takes the first row that serves the problem.
BACKENDS: tuple[Backend, ...] = (
    Backend("numba", "e88.ops.cpu", _numba_supports, _numba_missing),
    Backend("cuda", "e88.ops.cuda.recurrence", _cuda_supports, _cuda_missing),
    Backend("triton", "e88.ops.triton", _triton_supports, _triton_missing),
    Backend("checkpointed", "e88.ops.checkpointed", lambda problem: None),
    Backend("reference", "e88.ops.reference", lambda problem: None),
)
_PLAIN = ("checkpointed", "reference")

_recorders: ContextVar[tuple[set[str], ...]] = ContextVar("e88_backend_recorders", default=())
_announced: set[str] = set()


def available_backends() -> dict[str, str | None]:
    """For every backend: None where this machine can use it, or the reason why not."""
    return {row.name: row.missing() for row in BACKENDS}


@contextmanager
def record_backends() -> Iterator[set[str]]:
    """Collect the names of the backends that run inside the block, in this thread or task."""
    used: set[str] = set()
    token = _recorders.set((*_recorders.get(), used))
    try:
        yield used
    finally:
        _recorders.reset(token)


def choose(problem: Problem, backend: str) -> ModuleType:
    """The module that serves the problem; records its name. Raises UserError where `backend` cannot."""
    row = _first(problem) if backend == "auto" else _named(problem, backend)
    for used in _recorders.get():
        used.add(row.name)
    return importlib.import_module(row.module)


def _refusal(row: Backend, problem: Problem) -> str | None:
    return row.supports(problem) or row.missing()


def _named(problem: Problem, backend: str) -> Backend:
    for row in BACKENDS:
        if row.name == backend:
            reason = _refusal(row, problem)
            if reason:
                raise UserError(f"backend '{backend}' cannot serve this call: {reason}; use backend='auto'")
            return row
    raise unknown_name("backend", backend, ["auto", *(row.name for row in BACKENDS)])


def _first(problem: Problem) -> Backend:
    refusals = []
    for row in BACKENDS:
        reason = _refusal(row, problem)
        if reason is None:
            break
        refusals.append(f"{row.name}: {reason}")
    # float64 is for checking results, where the plain backends are what is wanted.
    if row.name in _PLAIN and problem.dtype != torch.float64:
        _announce(f"no fast backend for this call, using the slow '{row.name}' ({'; '.join(refusals)})")
    return row


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, UserWarning, stacklevel=4)
