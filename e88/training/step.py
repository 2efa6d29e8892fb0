"""The forward and backward pass of one optimiser step: what training takes and forensics repeat."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from e88.training.config import TrainingConfig
from e88.training.distributed import last_part_only


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast where asked for, or on a GPU under `auto`; nothing otherwise."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def backward(
    nll: Callable[[Tensor], Tensor], windows: Tensor, config: TrainingConfig, ddp: nn.Module | None = None
) -> Tensor:
    """Accumulate the gradient of the mean loss over windows [B, T + 1], in `accumulate` parts; returns that mean.

    nll, ddp: see `e88.training.run.Run`. Windows are this process's; the gradient becomes the mean over processes,
    which have equally many each.
    """
    count = windows.shape[0] * (windows.shape[1] - 1)
    total = torch.zeros((), device=windows.device)
    parts = windows.chunk(config.accumulate)
    for i, part in enumerate(parts):
        with last_part_only(ddp, i == len(parts) - 1):
            with autocast(windows.device, config.precision):
                loss = nll(part).sum() / count
            loss.backward()
        total += loss.detach()
    return total
