"""From tensors to a launched kernel: which plan, which machine code, which pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from e88.ops.cuda.compile import Kernel, compile_cubin
from e88.ops.cuda.plan import Edges, Plan, make_plan


def plan_for(like: Tensor, sequences: int, sizes: tuple[int, int, int], tanh: bool, beta: bool, edges: Edges) -> Plan:
    """The plan for H, K, V and the dtype and device of `like`."""
    H, K, V = sizes
    return make_plan(K, V, like.dtype, tanh, beta, sequences * H, _shared_bytes(like.device.index or 0), edges)


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
    pointers: Sequence[Tensor | None],
    numbers: Sequence[int | ctypes.c_int64],
) -> None:
    """Launch blocks x threads of "forward", "backward" or "finish" on tensors (None: null) and numbers, in order."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        addresses = [pointer(x) for x in pointers]
        rest = [ctypes.c_int(x) if isinstance(x, int) else x for x in numbers]
        assert device.index is not None
        _launched[kernel] = _kernel(kernel, device.index, plan, save)
        _launched[kernel](*grid, stream, [*addresses, *rest])


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """A tensor as a kernel's argument; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def rows(x: Tensor) -> Tensor:
    """`x` [B, T, ...] with tokens evenly spaced and the rest of each packed and aligned to 16 bytes; a copy only if
    needed."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return x if aligned and evenly_spaced(x) else x.contiguous(memory_format=torch.contiguous_format).clone()


def evenly_spaced(x: Tensor) -> bool:
    """Whether consecutive tokens of `x` [B, T, ...] are equally far apart, across rows too, and the rest is packed."""
    packed = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != packed:
            return False
        packed *= size
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def checkpoint_rows(plan: Plan, tokens: int, sequences: int) -> int:
    """How many states forward keeps for each head."""
    return tokens // plan.segment + sequences
