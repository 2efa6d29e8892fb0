"""Repeating the step at which a run diverged, from the file that it left."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from e88.errors import UserError
from e88.models.config import ModelConfig
from e88.models.lm import LanguageModel
from e88.training.checkpoint import load_tensors, restore_model
from e88.training.config import TrainingConfig
from e88.training.distributed import Group
from e88.training.forensics import TensorStats, Trace, trace
from e88.training.state import BAD_STEP, carried
from e88.training.step import Carry, backward

# The layer statistics of a block that E88 layers have and others do not.
OF_E88 = ("state_max", "saturated")


@dataclass(frozen=True)
class Replay:
    """meta: of the file, with name, seed, step, loss and grad_norm as the run had them. trace: the step repeated."""

    meta: dict[str, Any]
    trace: Trace

    @property
    def repeats(self) -> bool:
        """Whether loss and gradient norm are the run's, bit for bit."""
        then, now = ((x["loss"], x["grad_norm"]) for x in (self.meta, vars(self.trace)))
        return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(then, now, strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One for each layer in order of computation: layer, output (what it adds to or leaves in the residual
        stream), grad_norm, and for an E88 layer state_max and saturated (see `e88.training.layers.LayerStats`)."""
        layers, depth = self.trace.layers, self.meta["model"]["depth"]
        rows = [self._row("embedding", grad_norm=layers["embedding_grad_norm"])]
        for index in range(depth):
            own = {key: layers[key][index] for key in ("grad_norm", *OF_E88) if key in layers}
            rows.append(self._row(f"blocks.{index}", **{key: value for key, value in own.items() if value is not None}))
        return [*rows, self._row("norm")]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        keys = ("name", "seed", "step", "loss", "grad_norm")
        first = self.trace.first
        return {
            "run": {key: self.meta[key] for key in keys},
            "now": {"loss": self.trace.loss, "grad_norm": self.trace.grad_norm, "repeats": self.repeats},
            "first": asdict(first) if first else None,
            "layers": [{**row, "output": asdict(row["output"])} for row in self.rows()],
        }

    def _row(self, layer: str, **columns: float) -> dict[str, Any]:
        output: TensorStats = self.trace.tensors[f"the output of {layer}"]
        return {"layer": layer, "output": output, **columns}


def replay(path: str | Path, device: torch.device) -> Replay:
    """Repeat the bad step in a run's folder, or in the file itself, in this process alone.

    Raises UserError where there is none.
    """
    path = Path(path)
    file = path / BAD_STEP if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(f"{path} holds no {BAD_STEP}; give the folder of a run that diverged")
    tensors, meta = load_tensors(file)
    if meta.get("kind") != "bad step":
        raise UserError(f"{file} is not a bad step; give the folder of a run that diverged")
    config = TrainingConfig.from_saved(meta["training"])
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.from_dict(meta["model"]))
    restore_model(model, tensors, file)
    model.to(device).train()
    model.set_backend(config.backend)
    windows = tensors["batch"].to(device)
    # One process takes what each of several took, part by part.
    world = meta["parallel"]["world"] if meta["parallel"] else 1
    config = replace(config, accumulate=config.accumulate * world)
    carry = Carry(model, carried(tensors, meta, device)) if config.carry > 1 else None
    repeat = partial(backward, model.nll, windows, config, carry=carry)
    return Replay(meta, trace(model, windows, config, Group(device), repeat, carry))
