"""From tensors to a launched kernel: which plan, which machine code, which pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from e88.ops.cuda.compile import Kernel, compile_cubin
from e88.ops.cuda.plan import Edges, Plan, make_plan


def plan_for(like: Tensor, sequences: int, sizes: tuple[int, int, int], tanh: bool, beta: bool, edges: Edges) -> Plan:
    """The plan for H, K, V and the dtype and device of `like`."""
    H, K, V = sizes
    heads = sequences * H
    # Under the compiler sizes may be symbols, which cannot be looked up.
    make = _made if type(heads) is type(K) is type(V) is int else make_plan
    return make(K, V, like.dtype, tanh, beta, heads, _shared_bytes(like.device.index or 0), edges)


_made = lru_cache(maxsize=256)(make_plan)


@cache
def _shared_bytes(device: int) -> int:
    # Missing from torch's stubs.
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


@cache
def _kernel(kernel: str, device: int, plan: Plan, save: bool) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    backward = kernel == "backward"
    name = f"{kernel}_float" if plan.precise else kernel
    code = compile_cubin(name, f"sm_{major}{minor}", plan.defines(backward, save))
    return Kernel(code, f"e88_{kernel}", device, plan.shared_bytes if backward else 0)


# The kernel of each name that was launched last.
_launched: dict[str, Kernel] = {}


def resources() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of a thread in the kernels launched last, "forward" and "backward"."""
    return {name: kernel.resources() for name, kernel in _launched.items()}


def launch(
    kernel: str,
    plan: Plan,
    save: bool,
    device: torch.device,
    grid: tuple[int, int],
    pointers: Sequence[Tensor | int | None],
    numbers: Sequence[int | ctypes.c_int64],
) -> None:
    """Launch blocks x threads of "forward", "backward" or "finish" on tensors or addresses, None for null, and numbers,
    in order."""
    assert device.index is not None
    _launched[kernel] = _kernel(kernel, device.index, plan, save)
    rest = [ctypes.c_int(x) if isinstance(x, int) else x for x in numbers]
    submit(_launched[kernel], device.index, *grid, [*(pointer(x) for x in pointers), *rest])


def submit(
    kernel: Kernel, device: int, blocks: int, threads: int, arguments: list[Any], *, overlap: bool = False
) -> None:
    """Launch a kernel on the device's current stream."""
    # What is behind torch.cuda.current_stream, and no device made current that is so already: half of the host's time.
    stream = torch._C._cuda_getCurrentRawStream(device)
    with nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device):
        kernel(blocks, threads, stream, arguments, overlap=overlap)


def pointer(x: Tensor | int | None) -> ctypes.c_void_p:
    """A tensor or an address as a kernel's argument; null for None."""
    return ctypes.c_void_p(x if x is None or isinstance(x, int) else x.data_ptr())


def column(x: Tensor, first: int) -> int:
    """The address of `x` [..., C] from its column `first` on."""
    return x.data_ptr() + first * x.element_size()


def rows(x: Tensor) -> Tensor:
    """`x` [B, T, ...] with tokens evenly spaced and the rest of each packed and aligned to 16 bytes; a copy only if
    needed."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return x if aligned and evenly_spaced(x) else x.contiguous(memory_format=torch.contiguous_format).clone()


def evenly_spaced(x: Tensor) -> bool:
    """Whether consecutive tokens of `x` [B, T, ...] are equally far apart, across rows too, and the rest is packed."""
    shape, strides = x.shape, x.stride()
    packed = 1
    for i in range(len(shape) - 1, 1, -1):
        if strides[i] != packed and shape[i] != 1:
            return False
        packed *= shape[i]
    return shape[0] == 1 or strides[0] == shape[1] * strides[1]


def checkpoint_rows(plan: Plan, tokens: int, sequences: int) -> int:
    """How many states forward keeps for each head."""
    return tokens // plan.segment + sequences
