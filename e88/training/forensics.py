"""Repeating a step to find the first tensor that is not finite: a weight, an output going forward, a gradient going
back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from e88.models.lm import LanguageModel
from e88.training.config import TrainingConfig
from e88.training.distributed import Group
from e88.training.layers import LayerStats
from e88.training.step import Carry, autocast


@dataclass(frozen=True)
class TensorStats:
    """name: what it is and of which module. nan, inf: shares of its elements. largest: finite magnitude."""

    name: str
    largest: float
    nan: float
    inf: float

    @property
    def finite(self) -> bool:
        return self.nan == 0 and self.inf == 0

    def __str__(self) -> str:
        parts = [f"{share:.2%} {what}" for share, what in ((self.nan, "NaN"), (self.inf, "infinite")) if share]
        return f"{self.name} ({', '.join([*parts, f'largest finite {self.largest:.3g}'])})"


@dataclass
class Trace:
    """One step taken apart. loss: mean, nats per token. grad_norm: of all gradients. first: the first tensor that is
    not finite, None where all are. tensors: by name, in the order in which they came. layers: see `LayerStats`."""

    loss: float = math.nan
    grad_norm: float = math.nan
    first: TensorStats | None = None
    tensors: dict[str, TensorStats] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, values: object) -> None:
        """Measure the floating tensors among a module's inputs or outputs; of a name seen before, keep the worse."""
        found = _measure(name, values if isinstance(values, Sequence) else (values,))
        if found is None:
            return
        if self.first is None and not found.finite:
            self.first = found
        old = self.tensors.get(name, found)
        self.tensors[name] = TensorStats(
            name, max(old.largest, found.largest), max(old.nan, found.nan), max(old.inf, found.inf)
        )

    def note_bad(self, name: str, values: object) -> None:
        """As `note`, of what is of interest only where it is the first to be wrong."""
        found = _measure(name, values if isinstance(values, Sequence) else (values,))
        if self.first is None and found is not None and not found.finite:
            self.note(name, values)

    def explain(self, step: int) -> str:
        """One line for a record."""
        what = f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g} at step {step}"
        if self.first is None:
            return f"{what}; repeated, every tensor of the step is finite"
        return f"{what}; the first tensor that is not finite is {self.first}"


def trace(
    model: LanguageModel,
    windows: Tensor,
    config: TrainingConfig,
    group: Group,
    repeat: Callable[[], Tensor],
    carry: Carry | None = None,
) -> Trace:
    """Take the step on windows [B, T + 1] apart, without an update; leaves no gradient.

    repeat: the training's own pass there and back, which returns the loss. carry: the run's. Every process of a group
    takes part, and finds what is wrong with its own windows and its own shards.

    The order is that of the computation: the weights as they are before the step, then a forward pass in which every
    module runs by itself (fused projections do not name the one that is wrong), then the training's own pass there and
    back.
    """
    result, stats = Trace(), LayerStats(model, group)
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        result.note_bad(f"the weight {name}, before the step", parameter)
    with _watched(model, result), torch.no_grad():
        for i, part in enumerate(windows.chunk(config.accumulate)):
            with autocast(windows.device, config.precision):
                _ = model.nll(part) if carry is None else carry.nll(i, part)
    with _watched(model, result), stats.watching():
        loss = repeat()
    result.note("the loss", loss)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = group.whole(get_total_norm(gradients))
    result.note("the norm of all gradients", norm)
    result.loss, result.grad_norm, result.layers = loss.item(), norm.item(), stats.read()
    model.zero_grad(set_to_none=True)
    return result


@contextmanager
def _watched(model: LanguageModel, result: Trace) -> Iterator[None]:
    """Note what goes into and comes out of every module, and where gradients are asked for, these on the way back."""
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            result.note_bad(f"the input of {name}", inputs)

        def after(_module: nn.Module, _inputs: object, output: object) -> None:
            result.note(f"the output of {name}", output)
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda grad: result.note(f"the gradient at the output of {name}", grad))

        handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    def watch_gradient(name: str, parameter: nn.Parameter) -> None:
        def accumulated(p: Tensor) -> None:
            result.note(f"the gradient of {name}", p.grad)

        handles.append(parameter.register_post_accumulate_grad_hook(accumulated))

    for name, module in model.named_modules():
        if name:
            watch(name, module)
    for name, parameter in model.named_parameters():
        watch_gradient(name, parameter)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _measure(name: str, values: Sequence[object]) -> TensorStats | None:
    given = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
    # Of a tensor in shards, the one that is here.
    tensors = [t for t in (t.to_local() if hasattr(t, "to_local") else t for t in given) if t.numel()]
    if not tensors:
        return None
    count = sum(t.numel() for t in tensors)
    rows = [(t.isnan().sum(), t.isinf().sum(), t.nan_to_num(0.0, 0.0, 0.0).abs().amax()) for t in tensors]
    sums = torch.stack([torch.stack([value.double() for value in row]) for row in rows]).tolist()
    nan, inf = (sum(row[i] for row in sums) / count for i in (0, 1))
    return TensorStats(name, max(row[2] for row in sums), nan, inf)
