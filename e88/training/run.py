"""What a training run carries from step to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e88.data.corpus import Corpus
from e88.models.config import ModelConfig
from e88.models.lm import LanguageModel
from e88.training.budget import Clock
from e88.training.config import TrainingConfig
from e88.training.distributed import Group
from e88.training.optimizer import Optimizer
from e88.training.step import Carry
from e88.training.steplog import StepLog


@dataclass
class Run:
    """model: the bare one. nll: from windows to nll in training, through the module `ddp` where that mode is on. carry:
    in its place where windows go on from states. size: what `e88.sizing.closed_form.describe` says of the model.
    heldout: the evaluations so far. due: whether one comes before the next step. check: the layer's error on a GPU."""

    name: str
    model_config: ModelConfig
    config: TrainingConfig
    corpus: Corpus
    folder: Path
    group: Group
    model: LanguageModel
    nll: Callable[[Tensor], Tensor]
    ddp: nn.Module | None
    carry: Carry | None
    optimizer: Optimizer
    clock: Clock
    log: StepLog
    started: str
    wall_start: float
    size: dict[str, Any]
    step: int = 0
    tokens: int = 0
    heldout: list[dict[str, Any]] = field(default_factory=list)
    due: bool = False
    backends: set[str] = field(default_factory=set)
    check: dict[str, Any] | None = None

    @property
    def device(self) -> torch.device:
        return self.group.device

    @property
    def rows(self) -> int:
        """Windows that this process takes at once."""
        return self.config.batch_size // self.group.world // self.config.accumulate

    @property
    def used(self) -> float:
        """The fraction of the budget used so far."""
        flops = self.tokens * self.size["flops_per_token"]
        seconds = self.clock.seconds["train"]
        return self.config.budget.used(seconds=seconds, steps=self.step, tokens=self.tokens, flops=flops)
