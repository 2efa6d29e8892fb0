"""Optimisers and learning-rate schedules. Decay parameters, norms and biases are really free of weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from e88.training.config import TrainingConfig
from e88.training.distributed import Group


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

    Of sharded parameters it steps this process's shards as plain tensors: a DTensor costs the host tens of microseconds
    for each operation on it.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        shards = {parameter: _shard(parameter) for parameter in model.parameters()}
        # In the model's order, in which a step that is repeated sums up its norm.
        self._stepped = list(shards.values())
        # Shard -> the parameter that it is of.
        self._whole: dict[nn.Parameter, Any] = {s: p for p, s in shards.items() if s is not p}
        matrices, decayed, free = ([shards[p] for p in part] for part in split_parameters(model))
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

    @torch.no_grad()
    def clip(self, limit: float, group: Group) -> Tensor:
        """Scale the gradient down to norm `limit` where it is longer; its norm over all processes' shards, before."""
        for shard, whole in self._whole.items():
            shard.grad = None if whole.grad is None else whole.grad.to_local()
        norm = group.norm(torch.nn.utils.get_total_norm([p.grad for p in self._stepped if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(self._stepped, limit, norm)
        return norm

    def step(self) -> None:
        """Take the step, after `clip`."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for whole in self._whole.values():
            whole.grad = None

    def owner(self, part: int, index: int) -> Tensor:
        """The model's parameter that entry `index` of a part's state is about."""
        parameters = [p for group in self.parts[part].param_groups for p in group["params"]]
        owner: Tensor = self._whole.get(parameters[index], parameters[index])
        return owner

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
        """The state of every part; what belongs to shards as DTensors."""
        return {i: self._each(i, part.state_dict(), _as_shard) for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(self._each(i, state[i], _plain))

    def _each(self, part: int, state: dict[str, Any], change: Callable[[Any, Tensor], Any]) -> dict[str, Any]:
        entries = {
            index: {key: change(value, self.owner(part, index)) for key, value in entry.items()}
            for index, entry in state["state"].items()
        }
        return {**state, "state": entries}


@torch.no_grad()
def _shard(parameter: nn.Parameter) -> nn.Parameter:
    """What is stepped for a parameter: this process's shard of it, in the same memory, or itself."""
    return nn.Parameter(parameter.to_local()) if _is_sharded(parameter) else parameter  # type: ignore[attr-defined]


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, whose module takes half a second to import."""
    return hasattr(tensor, "to_local")


def _as_shard(value: Any, like: Any) -> Any:
    """A tensor of the shape of a parameter's shard as a shard itself; anything else as it is."""
    if not _is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.to_local().shape:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _plain(value: Any, like: Tensor) -> Any:
    return value.to_local() if _is_sharded(value) else value
