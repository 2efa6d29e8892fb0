"""Runs that do not fit in memory: refused before they start where that is certain, else told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from e88 import runtime
from e88.errors import UserError
from e88.models.config import ModelConfig
from e88.sizing.closed_form import count_params
from e88.sizing.memory import training_memory
from e88.sizing.units import human_bytes, human_count
from e88.training.config import TrainingConfig
from e88.training.distributed import Group

# Weights and AdamW's two moments in float32; gradients come as activations go.
FIXED, GRADIENT = 12, 4


def refuse_hopeless(model: ModelConfig, config: TrainingConfig, group: Group) -> None:
    """UserError where the least that the run can take is more than the device's memory.

    On a CPU that includes the activations, counted as if they had 16 bits: a process that takes more is killed there,
    without a word.
    """
    params, there = count_params(model), runtime.memory_bytes(group.device)
    share = params // group.world if group.mode == "fsdp" else params
    need = (FIXED + GRADIENT) * share
    if there is None:
        return
    where = f"this {'GPU' if group.device.type == 'cuda' else 'machine'} has {human_bytes(there)}"
    if need > there:
        raise UserError(
            f"{human_count(params)} parameters take {human_bytes(need)} with gradients and optimiser, and {where}; "
            "take a smaller model, or --parallel fsdp over more GPUs"
        )
    rows, activations = _at_once(model, config, group)
    need = FIXED * share + max(activations, GRADIENT * share)
    if group.device.type == "cpu" and need > there:
        raise UserError(
            f"{rows} windows of {config.window} tokens at once take at least {human_bytes(need)} with "
            f"{human_count(params)} parameters, and {where}; cut the batch into more parts with --accumulate, lower "
            "--batch-size or --window, or take a smaller model"
        )


@contextmanager
def told_of_lack(model: ModelConfig, config: TrainingConfig, group: Group) -> Iterator[None]:
    """Turn a GPU's lack of memory into a UserError that says how much was wanted and what wants less."""
    try:
        yield
    except torch.OutOfMemoryError:
        rows, _ = _at_once(model, config, group)
        want = training_memory(model, rows, config.window)["total"]
        raise UserError(
            f"the GPU is out of memory: {rows} windows of {config.window} tokens at once want about "
            f"{human_bytes(want)}; cut the batch into more parts with --accumulate, or lower --batch-size or --window"
        ) from None


def _at_once(model: ModelConfig, config: TrainingConfig, group: Group) -> tuple[int, int]:
    """Windows in one part of a process's batch, and the bytes of their activations."""
    rows = config.batch_size // group.world // config.accumulate
    return rows, training_memory(model, rows, config.window)["activations"]
