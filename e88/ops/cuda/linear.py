"""Products with few rows at the speed of reading the weights, with residual sum and norm before them (`linear.cu`).

B rows, D columns of the input, N of the output
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from e88.ops.cuda.compile import Kernel, compile_cubin, overlapping
from e88.ops.cuda.launch import pointer, submit
from e88.ops.differentiable import operator

# With more rows a library's products are faster: every block reads all of x.
MAX_ROWS = 2
ROWS_A_BLOCK = 16


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether x [B, D] and weight [N, D] are what the kernel is for."""
    D = x.shape[-1]
    suits = x.dim() == 2 and 1 <= x.shape[0] <= MAX_ROWS and D % 8 == 0 and weight.dtype == torch.bfloat16
    return suits and weight.is_contiguous() and weight.data_ptr() % 16 == 0 and shared_bytes(x.shape[0], D) <= 98304


def shared_bytes(B: int, D: int) -> int:
    """Dynamic shared memory: rows of x as bf16, a little apart."""
    return B * 2 * (-(-D // 64) * 64 + 32)


def defines(B: int, D: int, norm: bool, add: bool, many: bool) -> dict[str, int]:
    """What the host sets in `linear.cu`; smaller blocks where there are `many`, that is more than multiprocessors."""
    shape = {"WARPS": 4, "RESIDENT": 4} if many else {"WARPS": 16, "RESIDENT": 1}
    return {"B": B, "D": D, **shape, "NORM": int(norm), "ADD": int(add)}


@cache
def _kernel(device: int, B: int, D: int, norm: bool, add: bool, many: bool) -> tuple[Kernel, int]:
    """The kernel and its threads a block."""
    major, minor = torch.cuda.get_device_capability(device)
    chosen = defines(B, D, norm, add, many)
    code = compile_cubin("linear", f"sm_{major}{minor}", chosen)
    return Kernel(code, "e88_linear", device, shared_bytes(B, D)), 32 * chosen["WARPS"]


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    x: Tensor,
    update: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    y: Tensor,
    stream: Tensor | None,
    eps: float,
) -> None:
    device, (B, D), N = x.device.index, x.shape, weight.shape[0]
    pointers = [pointer(t) for t in (x, update, norm, weight, y, stream)]
    arguments: list[Any] = [*pointers, ctypes.c_int(N), ctypes.c_float(eps)]
    blocks = -(-N // ROWS_A_BLOCK)
    kernel, threads = _kernel(device, B, D, norm is not None, update is not None, blocks > _multiprocessors(device))
    submit(kernel, device, blocks, threads, arguments, overlap=overlapping(device))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, D] times weight [N, D] transposed, both bf16."""
    y = _product(x, weight)
    _launch(x.contiguous(), None, None, weight, y, None, 0.0)
    return y


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(x.shape[0], weight.shape[0])


def _norm_linear(h: Tensor, update: Tensor | None, norm: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h [B, D] float32, update [B, D] bf16 or None -> (h + update, its root-mean-square norm times weight^T in bf16).

    Without an update the first result is empty, since a result may not be an argument.
    """
    stream, y = _sum_and_product(h, update, norm, weight, eps)
    update = None if update is None else update.contiguous()
    _launch(h.contiguous(), update, norm, weight, y, None if update is None else stream, eps)
    return stream, y


def _sum_and_product(
    h: Tensor, update: Tensor | None, norm: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return h.new_empty(0 if update is None else h.shape), _product(h, weight)


linear = operator("e88::few_rows_linear", _linear, _product, device_types="cuda")
norm_linear = operator("e88::few_rows_norm_linear", _norm_linear, _sum_and_product, device_types="cuda")
