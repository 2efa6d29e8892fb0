"""The forward and backward pass of one optimiser step: what training takes and forensics repeat."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from e88.models.lm import LanguageModel, LMState
from e88.training.config import TrainingConfig
from e88.training.distributed import last_part_only


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast where asked for, or on a GPU under `auto`; nothing otherwise."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


class Carry:
    """The states from which a step's windows go on, where they follow those of the step before.

    before: by number of the part of the batch; empty at the start of a block, where windows follow nothing. They stay
    as they are until `advance`, so that a step can be repeated.
    """

    def __init__(self, model: LanguageModel, before: dict[int, LMState] | None = None) -> None:
        self.model = model
        self.before = before or {}
        self._after: dict[int, LMState] = {}

    def nll(self, part: int, windows: Tensor) -> Tensor:
        """windows [B / parts, T + 1] of a part -> nll [B / parts, T]; keeps the state after them."""
        nll, state = self.model.nll_from(windows, self.before.get(part))
        self._after[part] = [{name: tensor.detach() for name, tensor in layer.items()} for layer in state]
        return nll

    def advance(self, *, jumps: bool) -> None:
        """The step was taken: the next goes on from where its windows ended, or `jumps` to new places."""
        self.before, self._after = {} if jumps else self._after, {}


def backward(
    nll: Callable[[Tensor], Tensor],
    windows: Tensor,
    config: TrainingConfig,
    ddp: nn.Module | None = None,
    carry: Carry | None = None,
) -> Tensor:
    """Accumulate the gradient of the mean loss over windows [B, T + 1], in `accumulate` parts; returns that mean.

    nll, ddp, carry: see `e88.training.run.Run`. Windows are this process's; the gradient becomes the mean over
    processes, which have equally many each.
    """
    count = windows.shape[0] * (windows.shape[1] - 1)
    total = torch.zeros((), device=windows.device)
    parts = windows.chunk(config.accumulate)
    for i, part in enumerate(parts):
        with last_part_only(ddp, i == len(parts) - 1):
            with autocast(windows.device, config.precision):
                loss = (nll(part) if carry is None else carry.nll(i, part)).sum() / count
            loss.backward()
        total += loss.detach()
    return total
