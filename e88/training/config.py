"""Training configuration: frozen dataclasses, no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from e88.errors import UserError
from e88.models.config import build_config

OPTIMIZERS = ("adamw", "schedulefree", "muon")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "bf16", "fp32")
SAMPLINGS = ("passes", "draws")
# How often a run is saved or looked into decides nothing.
UNDECIDING = ("checkpoint_every", "layers_every", "eval_points")
# Keys that configurations saved earlier lack, and what they mean there. An id leaves them out where they say no more.
LATER = {"carry": 1, "heldout_window": 0, "heldout_context": 0, "sampling": "draws"}
# How several processes share a run: a whole model each, or a part of every tensor.
MODES = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much training is allowed: exactly one of seconds (on the training clock), steps, tokens or FLOPs."""

    seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            raise UserError(f"give exactly one budget (seconds, steps, tokens or flops), got {len(given)}")
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise UserError(f"the budget in {name} must be a positive number, got {value!r}")

    def to_dict(self) -> dict[str, float]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def used(self, *, seconds: float, steps: int, tokens: int, flops: float) -> float:
        """The fraction of the budget used, 0 at the start, 1 or more when it is spent."""
        spent = {"seconds": seconds, "steps": steps, "tokens": tokens, "flops": flops}
        ((name, limit),) = self.to_dict().items()
        return spent[name] / limit


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides a run besides the model and the data.

    lr: peak learning rate. warmup: fraction of the budget over which it rises linearly; the schedule then falls to
    `final_lr` times the peak at the end of the budget (schedulefree: constant after warm-up, by construction).
    muon_lr: peak rate of the matrices under `muon`. accumulate: parts a step's batch is cut into.
    sampling: `passes`, all windows of the text in a random order before any comes again, or `draws`, each window
    independently of all others.
    carry: windows of a row that follow one another in the text, one a step, each from the state that the one before
    left (no gradient crosses over), before the row jumps to a new place from nothing.
    heldout_window: tokens scored in a held-out window, 0 for `window`. heldout_context: tokens before it that are read
    first and not scored; the scored ones are the same whatever it is.
    eval_every: seconds of training between held-out evaluations on the way, 0 for only at the end.
    eval_points: held-out evaluations on the way at equal shares of the budget.
    backend: what runs the mixer, `auto` or a name from `e88 doctor`: E88's operator backend, or a rival's library.
    checkpoint_every: likewise between checkpoints, 0 for only at the end.
    layers_every: steps between samples of the layers' states, decays and gradients (see e88.training.layers), 0 for
    none.
    """

    budget: Budget
    batch_size: int = 16
    window: int = 256
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-3
    muon_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.1
    clip: float = 1.0
    precision: str = "auto"
    backend: str = "auto"
    seed: int = 0
    heldout_bytes: int = 262_144
    eval_every: float = 0.0
    checkpoint_every: float = field(default=60.0)
    layers_every: int = 50
    eval_points: int = 0
    carry: int = 1
    heldout_window: int = 0
    heldout_context: int = 0
    sampling: str = "passes"

    def __post_init__(self) -> None:
        for name in ("batch_size", "window", "accumulate", "heldout_bytes", "carry"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive integer, got {value!r}")
        for name, none in (
            ("layers_every", "never"), ("eval_points", "never"), ("heldout_window", "the window"),
            ("heldout_context", "none"),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"{name} must be a whole number, 0 for {none}, got {value!r}")
        if self.batch_size % self.accumulate:
            raise UserError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        for name, known in (
            ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS), ("sampling", SAMPLINGS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(f"{name} '{getattr(self, name)}' is not one of {', '.join(known)}")
        for name, low, high in (
            ("lr", 0, 10), ("muon_lr", 0, 10), ("beta1", 0, 1), ("beta2", 0, 1), ("weight_decay", 0, 10),
            ("warmup", 0, 1), ("final_lr", 0, 1), ("clip", 0, 1e9), ("eval_every", 0, 1e9),
            ("checkpoint_every", 0, 1e9),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise UserError(f"{name} must be a number from {low} to {high:g}, got {value!r}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")

    @property
    def span(self) -> int:
        """Tokens of a row that follow one another."""
        return self.carry * self.window

    def points_passed(self, used: float) -> int:
        """How many of the `eval_points` a run has passed that has used this fraction of its budget."""
        # A fraction times a whole number may fall short of a whole one by rounding.
        return min(self.eval_points, math.floor(used * (self.eval_points + 1) + 1e-9))

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "budget": self.budget.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingConfig:
        """The config of a mapping; unknown keys raise UserError naming the nearest known key."""
        data = dict(data)
        budget = data.get("budget")
        if not isinstance(budget, Mapping):
            raise UserError("the training configuration needs a budget, for instance {seconds = 60}")
        data["budget"] = build_config(Budget, budget)
        config: TrainingConfig = build_config(cls, data)
        return config

    @classmethod
    def from_saved(cls, data: Mapping[str, Any]) -> TrainingConfig:
        """The config of a record or checkpoint, however old."""
        return cls.from_dict({**LATER, **data})


def deciding(training: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run, of a saved training configuration however old, each key as what it means."""
    whole = {**LATER, **training}
    whole["heldout_window"] = whole["heldout_window"] or whole.get("window")
    return {key: value for key, value in whole.items() if key not in UNDECIDING}


def identity(model: Mapping[str, Any], training: Mapping[str, Any], data_hash: str) -> dict[str, Any]:
    """Everything that decides a run."""
    return {"model": model, "training": deciding(training), "data": data_hash}


def config_hash(model: Mapping[str, Any], training: Mapping[str, Any], data_hash: str) -> str:
    """A run's id: 12 hex digits over its identity."""
    whole = identity(model, training, data_hash)
    plain = {**LATER, "heldout_window": training.get("window")}
    whole["training"] = {k: v for k, v in whole["training"].items() if k not in plain or v != plain[k]}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
