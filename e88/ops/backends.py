"""Which backends there are, and which one serves a call."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from e88.errors import UserError, unknown_name
from e88.ops.contract import MAX_DIM, Problem


class Backend(NamedTuple):
    """A row of the table. `module` is imported on first use and has `run`, perhaps `run_fused`, `step`, `fused_step`.

    `supports` gives the reason why a problem cannot be served, or None; `missing` the same for this machine,
    whatever the problem.
    """

    name: str
    module: str
    supports: Callable[[Problem], str | None]
    missing: Callable[[], str | None] = lambda: None


def installed(package: str) -> bool:
    """Whether a package can be imported here."""
    return _found(package)


# Kept, because it is asked at every call, and a look at the disk takes as long as a small problem.
@lru_cache
def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# The compiler calls what is marked so while tracing and keeps the result, instead of tracing the look at the machine.
# torch.compiler.assume_constant_result sets the same, but would import the compiler here: a second for every program.
installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_serves(x: torch.Tensor) -> bool:
    """Whether the Triton kernels of a layer's other parts, which compute in float32, take x: wherever they can run."""
    return x.is_cuda and x.dtype != torch.float64 and installed("triton")


def _numba_supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"runs on CPU tensors only, not on {problem.device}"
    if problem.dtype == torch.float64:
        return "computes in float32, and the inputs are float64"
    return None


def _numba_missing() -> str | None:
    return None if installed("numba") else "numba is not installed; pip install numba"


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
    if not installed("cuda") or not installed("cuda.bindings"):
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
    if not installed("triton"):
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
_modules: dict[str, ModuleType] = {}
_SIZES = tuple(range(MAX_DIM + 1))


def available_backends() -> dict[str, str | None]:
    """For every backend: None where this machine can use it, or the reason why not."""
    return {row.name: row.missing() for row in BACKENDS}


@contextmanager
def record_backends() -> Iterator[set[str]]:
    """Collect the names of the backends that run inside the block, in this thread or task.

    Code under `torch.compile` counts when it is traced, not again when it runs.
    """
    used: set[str] = set()
    token = _recorders.set((*_recorders.get(), used))
    try:
        yield used
    finally:
        _recorders.reset(token)


def note(name: str) -> None:
    """Tell every `record_backends` block around this call that `name` ran."""
    for used in _recorders.get():
        used.add(name)


def choose(problem: Problem, backend: str) -> ModuleType:
    """The module that serves the problem; records its name. Raises UserError where `backend` cannot."""
    # As an index, a size that the compiler holds for variable becomes the number it is; a guard keeps it.
    K, V = _SIZES[problem.K], _SIZES[problem.V]
    return _modules[_chosen(K, V, problem.dtype, problem.device, problem.activation, backend)]


def _chosen(K: int, V: int, dtype: torch.dtype, device: str, activation: str, backend: str) -> str:
    problem = Problem(K, V, dtype, device, activation)
    row = _first(problem) if backend == "auto" else _named(problem, backend)
    note(row.name)
    if row.module not in _modules:
        _modules[row.module] = importlib.import_module(row.module)
    return row.module


# As `installed`.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        announce(f"no fast backend for this call, using the slow '{row.name}' ({'; '.join(refusals)})")
    return row


def announce(message: str) -> None:
    """Warn the user, once for each message."""
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, UserWarning, stacklevel=4)
