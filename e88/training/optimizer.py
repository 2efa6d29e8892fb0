"""Optimisers and learning-rate schedules. Decay parameters, norms and biases are really free of weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from e88.training.config import TrainingConfig


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside the blocks, other decayed parameters, parameters free of weight decay).

    Free: everything that is not a matrix (norms, biases, convolutions) or is marked `_no_weight_decay`.
    """
    matrices, decayed, free = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or getattr(parameter, "_no_weight_decay", False):
            free.append(parameter)
        elif name.startswith("embedding."):
            decayed.append(parameter)
        else:
            matrices.append(parameter)
    return matrices, decayed, free


def lr_factor(config: TrainingConfig, used: float) -> float:
    """The learning rate at a used fraction of the budget, as a multiple of the peak."""
    if config.warmup > 0 and used < config.warmup:
        return max(used / config.warmup, 1e-3)
    if config.schedule == "constant" or config.optimizer == "schedulefree":
        return 1.0
    rest = min((used - config.warmup) / max(1 - config.warmup, 1e-9), 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * rest)) if config.schedule == "cosine" else 1 - rest
    return config.final_lr + (1 - config.final_lr) * fall


class Optimizer:
    """One or two torch optimisers stepped as one, with learning rates set from the budget used.

    adamw: torch's AdamW. schedulefree: AdamW without a schedule (Defazio et al., 2024), whose averaged weights are
    in place inside `averaged()`. muon: Muon (Jordan et al., 2024) for the matrices inside the
    blocks, AdamW for the rest.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        matrices, decayed, free = split_parameters(model)
        betas, wd = (config.beta1, config.beta2), config.weight_decay
        self.parts: list[torch.optim.Optimizer] = []
        self.peaks: list[float] = []
        if config.optimizer == "muon":
            self._add(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=wd), config.muon_lr)
            matrices = []
        groups = [{"params": matrices + decayed, "weight_decay": wd}, {"params": free, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "schedulefree":
            from schedulefree import AdamWScheduleFree

            self._add(AdamWScheduleFree(groups, lr=config.lr, betas=betas), config.lr)
        else:
            self._add(torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True), config.lr)
        if self.averages:
            self._switch("train")

    def _add(self, optimizer: torch.optim.Optimizer, peak: float) -> None:
        self.parts.append(optimizer)
        self.peaks.append(peak)

    def set_used(self, used: float) -> float:
        """Set the learning rates for a used fraction of the budget; returns the main one."""
        factor = lr_factor(self.config, used)
        for part, peak in zip(self.parts, self.peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * factor
        return self.peaks[-1] * factor

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @property
    def averages(self) -> bool:
        """Whether the weights to evaluate differ from those that are trained."""
        return self.config.optimizer == "schedulefree"

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Put the weights to evaluate and save in place; yields copies of the trained ones (none where they are the
        same) and puts exactly these back, so that looking at a run never changes it."""
        if not self.averages:
            yield {}
            return
        trained = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._switch("eval")
        try:
            yield trained
        finally:
            self._switch("train")
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(trained[name])

    def _switch(self, mode: str) -> None:
        for part in self.parts:
            getattr(part, mode)()

    def state_dict(self) -> dict[int, Any]:
        return {i: part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[i])
