"""Runs that do not fit in memory: refused before they start where that is certain, else told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from e88 import runtime
from e88.errors import UserError
from e88.models.config import ModelConfig
from e88.sizing.closed_form import count_params
from e88.sizing.memory import token_values, training_memory
from e88.sizing.units import human_bytes, human_count
from e88.training.config import TrainingConfig
from e88.training.distributed import Group


def refuse_hopeless(model: ModelConfig, config: TrainingConfig, group: Group) -> None:
    """UserError where the least that the run can take is more than the device's memory.

    That is weights and gradients in float32 and the optimiser's moments: two, of which Muon keeps one. On a CPU it is
    the activations as well, of which layers there keep more than a GPU's kernels, E88's states apart: a process that
    takes too much is killed there, without a word.
    """
    params, there = count_params(model), runtime.memory_bytes(group.device)
    if there is None:
        return
    share = params // group.world if group.mode == "fsdp" else params
    fixed, gradients = (8 if config.optimizer == "muon" else 12) * share, 4 * share
    where = f"this {'GPU' if group.device.type == 'cuda' else 'machine'} has {human_bytes(there)}"
    if fixed + gradients > there:
        raise UserError(
            f"{human_count(params)} parameters take {human_bytes(fixed + gradients)} with gradients and optimiser, and "
            f"{where}; take a smaller model, or --parallel fsdp over more GPUs"
        )
    rows = _rows_at_once(config, group)
    activations = (2 if config.precision == "bf16" else 4) * rows * config.window * token_values(model)
    # Gradients come as activations go.
    need = fixed + max(activations, gradients)
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
        rows = _rows_at_once(config, group)
        want = training_memory(model, rows, config.window)["total"]
        raise UserError(
            f"the GPU is out of memory: {rows} windows of {config.window} tokens at once want about "
            f"{human_bytes(want)}; cut the batch into more parts with --accumulate, or lower --batch-size or --window"
        ) from None


def _rows_at_once(config: TrainingConfig, group: Group) -> int:
    """Windows in one part of a process's batch."""
    return config.batch_size // group.world // config.accumulate
