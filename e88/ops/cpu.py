"""The CPU backend: binds the numba kernels to torch. Float32 throughout; half precision is converted on the way.

Letters as in `e88.ops.contract`. The kernels release the interpreter lock, so workers are plain threads: as many as
`torch.get_num_threads()` says at each call, whatever numba's own settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e88.ops import cpu_kernels as kernels
from e88.ops.cpu_simd import HALF, LANES

_pools: dict[int, ThreadPoolExecutor] = {}


class Plan(NamedTuple):
    """How heads are grouped into blocks of columns; see `cpu_kernels`."""

    ends: np.ndarray
    groups: np.ndarray
    slots: np.ndarray
    checkpoints: int
    blocks: int


@lru_cache(maxsize=256)
def plan(lengths: tuple[int, ...], H: int, V: int) -> Plan:
    """Group the heads of sequences of these lengths. `checkpoints` counts saved blocks of K vectors."""
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
    slots = np.concatenate(([0], np.cumsum(-(-steps // kernels.SEGMENT))))
    return Plan(ends, groups.astype(np.int64), slots[:-1], int(slots[-1]) * blocks, blocks)


def _launch(kernel: Callable[..., None], tasks: int, size: int, arguments: Sequence[Any]) -> None:
    """Run a kernel's tasks on torch's number of threads, each with `size` floats of scratch."""
    workers = max(1, min(torch.get_num_threads(), tasks))
    scratch = torch.empty(workers, size).numpy()
    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="e88")
    others = [_pools[workers].submit(kernel, *arguments, scratch, w, workers) for w in range(1, workers)]
    kernel(*arguments, scratch, 0, workers)
    for other in others:
        other.result()


_NOTHING = np.empty(0, dtype=np.float32)


def _flat(tensor: Tensor | None) -> np.ndarray:
    return _NOTHING if tensor is None else tensor.detach().float().contiguous().view(-1).numpy()


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
        ends, groups, slots, checkpoints, blocks = plan(lengths, H, V)
        y = torch.empty(v.shape, dtype=torch.float32)
        final_state = torch.empty(len(lengths), H, K, V, dtype=torch.float32)
        saved = torch.empty(checkpoints * K * LANES if save else 0, dtype=torch.float32)
        decay = g.float().exp()
        inputs = [_flat(x) for x in (q, k, v, decay, beta, initial_state)]
        outputs = [_flat(x) for x in (y, final_state, saved)]
        arguments = (*inputs, ends, groups, slots, H, K, V, nonlinear, *outputs)
        _launch(kernels.forward, len(groups) * blocks, kernels.forward_size(K), arguments)
        ctx.save_for_backward(q, k, v, g, beta, decay, saved)
        ctx.lengths, ctx.nonlinear = lengths, nonlinear
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return y.to(v.dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, decay, saved = ctx.saved_tensors
        H, K, V = v.shape[2], k.shape[3], v.shape[3]
        ends, groups, slots, _, _ = plan(ctx.lengths, H, V)
        # Sums over a head's blocks of columns start at zero, and the rest is written once.
        dq, dk, dg = (torch.zeros(x.shape, dtype=torch.float32) for x in (q, k, g))
        d_beta = None if beta is None else torch.zeros(beta.shape, dtype=torch.float32)
        dv = torch.empty(v.shape, dtype=torch.float32)
        d_initial = torch.empty(d_final.shape, dtype=torch.float32)
        inputs = [_flat(x) for x in (q, k, v, decay, beta)]
        outputs = [_flat(x) for x in (saved, dy, d_final, dq, dk, dv, dg, d_beta, d_initial)]
        arguments = (*inputs, ends, groups, slots, H, K, V, ctx.nonlinear, *outputs)
        _launch(kernels.backward, len(groups), kernels.backward_size(K), arguments)
        grads = [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.mul_(decay).to(g.dtype)]
        d_gate = None if beta is None or d_beta is None else d_beta.to(beta.dtype)
        d_state = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
        return *grads, d_gate, d_state, None, None, None


# Numba cannot be traced: under torch.compile the call is left as it is.
@torch.compiler.disable
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
    lengths = (v.shape[1],) * v.shape[0] if cu_seqlens is None else tuple(cu_seqlens.diff().tolist())
    tensors = (q, k, v, g, beta, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _Recurrence.apply(*tensors, lengths, activation == "tanh", save)


def warmup() -> None:
    """Compile the kernels, or load them from numba's cache, so that no timed call has to."""
    x = torch.zeros(1, 1, 1, 1, requires_grad=True)
    with torch.enable_grad():
        y, _ = run(x, x, x, x[..., 0], x[..., 0], x, None, "tanh")
        y.sum().backward()
