"""What a sequence mixer is, and where each kind is found.

B batch, T time, D model width
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from e88.errors import unknown_name
from e88.models.config import MixerConfig

State = dict[str, Tensor]

# Dotted "module:class" names, resolved on request, so that nothing imports a baseline it does not use.
MIXERS = {
    "e88": "e88.layers.e88:E88Layer",
    "gated_deltanet": "e88.baselines.gated_deltanet:GatedDeltaNet",
    "mamba2": "e88.baselines.mamba2:Mamba2",
    "attention": "e88.baselines.transformer:Attention",
}


LIBRARIES = "e88.baselines.libraries:status"


class Mixer(nn.Module):
    """A causal map [B, T, D] -> [B, T, D] that can also run one token at a time from a state.

    Subclasses are built as `cls(dim, config)`, leave every parameter initialised, and name their output projection
    `o_proj` or `out_proj` (the model scales it with depth). Parameters with `_no_weight_decay = True` are exempt
    from weight decay. One that can run in several ways names them in `backends`, has one of them or `auto` as its
    `backend`, and notes which one ran.

    Where `join_projections` finds several projections of the same input, decoding makes one product of them:
    `step_joined(x @ joined.T, state)` is `step(x, state)`.
    """

    backends: tuple[str, ...] = ()
    backend: str = "auto"
    joined: Tensor | None = None

    def forward(
        self, x: Tensor, state: State | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """The parallel pass over x [B, T, D], continuing from `state`; the second value is None unless asked for."""
        raise NotImplementedError

    def init_state(self, batch: int, *, device: torch.device | None = None) -> State:
        """The state before the first token: named tensors, batch first; on the weights' device where none is given."""
        raise NotImplementedError

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D] -> ([B, D], new state). Equals the parallel pass at that position."""
        y, new_state = self.forward(x.unsqueeze(1), state, return_state=True)
        assert new_state is not None
        return y.squeeze(1), new_state

    def join_projections(self) -> None:
        """Lay the projections of the input side by side in one matrix `joined` [P, D], for decoding only."""

    def step_joined(self, p: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, State]:
        """`step` from the joined projections p [B, P]; `inplace` may write the new state over the old one."""
        raise NotImplementedError


def build_mixer(dim: int, config: MixerConfig) -> Mixer:
    """The mixer of `config` at model width `dim`."""
    mixer: Mixer = _resolve(MIXERS[config.kind])(dim, config)
    return mixer


def backends_for(kinds: Iterable[str], name: str) -> dict[str, str]:
    """For every kind of mixer the backend that it has where `name` is asked for: that, or `auto` if it knows no such.

    Raises UserError for a name that none of them knows.
    """
    known = {kind: ("auto", *_resolve(MIXERS[kind]).backends) for kind in kinds}
    if not any(name in names for names in known.values()):
        raise unknown_name("backend", name, {one for names in known.values() for one in names})
    return {kind: name if name in names else "auto" for kind, names in known.items()}


def rival_libraries() -> dict[str, str]:
    """For every library that runs a rival on a GPU: "ready" and its mode here, or "no" and the reason."""
    libraries: dict[str, str] = _resolve(LIBRARIES)()
    return libraries


def _resolve(dotted: str) -> Any:
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)
