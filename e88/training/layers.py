"""What goes on inside the layers at a step: states, decays and gradients, sampled now and then as a run trains.

The passes are the training's own: an E88 layer is asked for its final state, which the operator has anyway, so that
a sampled step has the numbers of any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from e88.layers.e88 import E88Layer
from e88.models.lm import LanguageModel
from e88.ops.edges import log_decay
from e88.training.distributed import Group

# A tanh this near to its bounds passes 2 % of a gradient at most.
SATURATED = 0.99
# Between them lie the shares of the decays d_t, from those that forget within a step to those of 1,000 steps and more.
DECAY_EDGES = (0.1, 0.5, 0.9, 0.99, 0.999)
DIGITS = 5


class LayerStats:
    """Statistics of one step, in `watching`'s passes and the gradients that they left.

    For each block: grad_norm (of its parameters, before clipping). For each E88 layer: state_max (the largest |S|
    after a window), saturated (share of |S| above SATURATED; none for a linear state), decay (shares of d_t between
    0, DECAY_EDGES and 1); None for the other blocks of a hybrid. And embedding_grad_norm. All processes of a group take
    part, each with its windows.
    """

    def __init__(self, model: LanguageModel, group: Group) -> None:
        self.model, self.group = model, group
        self._noted: dict[str, list[list[Tensor]]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the E88 layers do in the enclosed forward passes."""
        self._noted = defaultdict(lambda: [[] for _ in self.model.blocks])
        handles = []
        for index, block in enumerate(self.model.blocks):
            if isinstance(block.mixer, E88Layer):
                handles.append(block.mixer.register_forward_pre_hook(_with_state, with_kwargs=True))
                handles.append(block.mixer.register_forward_hook(self._note(index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self) -> dict[str, Any]:
        """The statistics as lists over the blocks; to be called while the gradients are there, before clipping."""
        columns: dict[str, Tensor] = {
            "grad_norm": torch.stack([self._grad_norm(block) for block in self.model.blocks]),
            "embedding_grad_norm": self._grad_norm(self.model.embedding),
        }
        noted, self._noted = self._noted, {}
        for name, layers in noted.items():
            parts = torch.stack([torch.stack(layer) for layer in layers if layer])
            columns[name] = parts.amax(1) if name == "state_max" else parts.mean(1)
        # One copy from the device for all.
        own = torch.cat([column.flatten().float() for column in columns.values()]).tolist()
        processes = self.group.gather(own)
        result = {}
        at = 0
        for name, column in columns.items():
            together = max if name == "state_max" else fmean
            end = at + column.numel()
            values = [together(of) for of in zip(*(values[at:end] for values in processes), strict=True)]
            result[name] = _shaped([float(f"{value:.{DIGITS}g}") for value in values], column.shape)
            at = end
        for name, layers in noted.items():
            found = iter(result[name])
            result[name] = [next(found) if layer else None for layer in layers]
        return result

    def _grad_norm(self, module: nn.Module) -> Tensor:
        return self.group.whole(get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))

    def _note(self, index: int) -> Any:
        @torch.no_grad()
        def hook(layer: E88Layer, inputs: tuple[Tensor, ...], output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
            size = output[1]["S"].detach().abs()
            self._noted["state_max"][index].append(size.amax())
            if not layer.config.linear_state:
                self._noted["saturated"][index].append((size > SATURATED).float().mean())
            self._noted["decay"][index].append(_decay_shares(layer, inputs[0]))

        return hook


def _with_state(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return inputs, {**options, "return_state": True}


def _decay_shares(layer: E88Layer, x: Tensor) -> Tensor:
    a = None if layer.a_proj is None else layer.a_proj(x)
    decay = log_decay(*layer.decay(x, a)).exp()
    below = [(decay < edge).float().mean() for edge in DECAY_EDGES]
    one = torch.ones_like(below[0])
    return torch.stack([*below, one]) - torch.stack([torch.zeros_like(one), *below])


def _shaped(values: list[float], shape: torch.Size) -> Any:
    if not shape:
        return values[0]
    width = len(values) // shape[0]
    return values if len(shape) == 1 else [values[i : i + width] for i in range(0, len(values), width)]


def summarise(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a record keeps of the samples in a log: the last of each statistic, and the largest where that can be worse.

    None where nothing was sampled.
    """
    sampled = [entry for entry in entries if "layers" in entry]
    if not sampled:
        return None
    series = [entry["layers"] for entry in sampled]
    summary = {"samples": len(sampled), "last_step": sampled[-1]["step"], **series[-1]}
    for name in ("grad_norm", "state_max", "saturated"):
        if name in series[-1]:
            blocks = zip(*(s[name] for s in series), strict=True)
            summary[f"largest_{name}"] = [None if None in values else max(values) for values in blocks]
    return summary
