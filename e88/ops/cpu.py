"""The CPU backend: binds the numba kernels to torch. Float32 throughout; half precision is converted on the way.

Letters as in `e88.ops.contract`. The kernels release the interpreter lock, so workers are plain threads: as many as
`torch.get_num_threads()` says at each call, whatever numba's own settings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from e88.ops import cpu_backward, cpu_forward
from e88.ops.cpu_blocks import SEGMENT
from e88.ops.cpu_simd import HALF, LANES


def _compile(sources: int) -> tuple[Any, Any]:
    """The kernels without the interpreter lock, cached on disk for as long as `sources` stays the same."""

    @njit(nogil=True, cache=True)
    def forward(*arguments: Any) -> None:
        # Numba's cache notices changes to this file and to what a closure holds, but not to other files.
        _ = sources
        cpu_forward.forward(*arguments)

    @njit(nogil=True, cache=True)
    def backward(*arguments: Any) -> None:
        _ = sources
        cpu_backward.backward(*arguments)

    return forward, backward


_inlined = sorted(Path(__file__).parent.glob("cpu_*.py"))
_forward, _backward = _compile(crc32(b"".join(path.read_bytes() for path in _inlined)))

# Less work than this (about 20 microseconds) is not worth waking a thread for.
VECTORS_PER_WORKER = 4096
_pools: dict[int, ThreadPoolExecutor] = {}
# A forked process inherits pools without their threads. Windows does not fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


class Plan(NamedTuple):
    """How heads are grouped into blocks of columns; see `cpu_blocks`."""

    ends: np.ndarray
    groups: np.ndarray
    slots: np.ndarray
    blocks: int
    steps: int
    checkpoints: int
    arguments: tuple[int, ...]


@lru_cache(maxsize=256)
def plan(lengths: tuple[int, ...], H: int, V: int) -> Plan:
    """Group the heads of sequences of these lengths.

    `steps` counts a block's steps over all blocks, `checkpoints` the saved ones, of K vectors each; `arguments` is the
    plan as kernels take it.
    """
    N = len(lengths)
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    halves = -(-V // HALF)
    if halves % 2 == 0:
        groups = np.arange(N * H).reshape(N * H, 1)
    else:
        # Two heads of equal length share a block: any two neighbours, or those of one sequence.
        rows = np.arange(N * H).reshape((1, -1) if len(set(lengths)) == 1 else (N, H))
        rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)), constant_values=-1)
        groups = rows.reshape(-1, 2)
    blocks = (halves * groups.shape[1] + 1) // 2
    steps = np.asarray(lengths, dtype=np.int64)[groups[:, 0] // H]
    slots = np.concatenate(([0], np.cumsum(-(-steps // SEGMENT))))
    groups, count, slots = groups.astype(np.int64), int(slots[-1]) * blocks, slots[:-1]
    arguments = (*(x.ctypes.data for x in (ends, groups, slots)), *groups.shape, blocks)
    return Plan(ends, groups, slots, blocks, int(steps.sum()) * blocks, count, arguments)


def _launch(kernel: Callable[..., None], tasks: int, vectors: int, size: int, arguments: tuple[Any, ...]) -> None:
    """Run a kernel on torch's number of threads, each with `size` floats of scratch of its own."""
    workers = max(1, min(torch.get_num_threads(), tasks, vectors // VECTORS_PER_WORKER))
    counter = torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty(workers, size)
    calls = [(*arguments, counter.data_ptr(), part.data_ptr()) for part in scratch]
    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="e88")
    others = [_pools[workers].submit(kernel, *call) for call in calls[1:]]
    kernel(*calls[0])
    for other in others:
        # By now no task is left, so that a worker that has not begun is not needed.
        if not other.cancel():
            other.result()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


class _Recurrence(torch.autograd.Function):
    # Not a torch.library operator, whose dispatch costs 70 microseconds more per forward and backward: as much as
    # a small layer's recurrence.

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
        initial_state: Tensor | None,
        lengths: tuple[int, ...],
        nonlinear: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        H, K, V = v.shape[2], k.shape[3], v.shape[3]
        work = plan(lengths, H, V)
        inputs = [_plain(q), _plain(k), _plain(v), _plain(g).exp()]
        gate = None if beta is None else _plain(beta)
        initial = None if initial_state is None else _plain(initial_state)
        y = torch.empty(v.shape, dtype=torch.float32)
        final_state = torch.empty(len(lengths), H, K, V, dtype=torch.float32)
        saved = torch.empty(work.checkpoints * K * LANES, dtype=torch.float32) if save else None
        tensors = _addresses(*inputs, gate, initial, y, final_state, saved)
        arguments = (*tensors, *work.arguments, H, K, V, nonlinear)
        _launch(_forward, len(work.groups) * work.blocks, work.steps * K, cpu_forward.scratch_size(K), arguments)
        ctx.save_for_backward(q, k, v, g, beta, saved)
        ctx.lengths, ctx.nonlinear = lengths, nonlinear
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return y.to(v.dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, saved = ctx.saved_tensors
        H, K, V = v.shape[2], k.shape[3], v.shape[3]
        work = plan(ctx.lengths, H, V)
        inputs = [_plain(q), _plain(k), _plain(v), _plain(g).exp()]
        gate = None if beta is None else _plain(beta)
        cotangents = [_plain(dy), _plain(d_final)]
        dq, dk, dv, dg, d_initial = (torch.empty_like(x) for x in (*inputs, cotangents[1]))
        d_gate = None if gate is None else torch.empty_like(gate)
        tensors = _addresses(*inputs, gate, saved, *cotangents, dq, dk, dv, dg, d_gate, d_initial)
        arguments = (*tensors, *work.arguments, H, K, V, ctx.nonlinear)
        _launch(_backward, len(work.groups), work.steps * K, cpu_backward.scratch_size(K), arguments)
        return (
            dq.to(q.dtype),
            dk.to(k.dtype),
            dv.to(v.dtype),
            dg.mul_(inputs[3]).to(g.dtype),
            None if d_gate is None else d_gate.to(beta.dtype),
            None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
            None,
            None,
            None,
        )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The backend entry: y [B, T, H, V] in v's dtype and the final state [N, H, K, V] in float32."""
    # The compiler cannot trace numba. Only then, since the import behind `disable` takes as long as that of torch.
    call = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return call(q, k, v, g, beta, initial_state, cu_seqlens, activation == "tanh")


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    nonlinear: bool,
) -> tuple[Tensor, Tensor]:
    lengths = (v.shape[1],) * v.shape[0] if cu_seqlens is None else tuple(cu_seqlens.diff().tolist())
    tensors = (q, k, v, g, beta, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _Recurrence.apply(*tensors, lengths, nonlinear, save)


def warmup() -> None:
    """Compile the kernels, or load them from numba's cache, so that no timed call has to."""
    x = torch.zeros(1, 1, 1, 1, requires_grad=True)
    with torch.enable_grad():
        y, _ = run(x, x, x, x[..., 0], x[..., 0], x, None, "tanh")
        y.sum().backward()
