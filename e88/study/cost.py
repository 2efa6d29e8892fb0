"""What runs would cost, from throughput that was measured. No torch."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from e88.sizing.closed_form import flops_per_token
from e88.study.plan import PlannedRun
from e88.study.store import Record
from e88.training.config import deciding

MEASURED, BY_FLOPS, BY_BUDGET, UNKNOWN = "measured", "by FLOPs", "by budget", "unknown"


@dataclass(frozen=True)
class Cost:
    """seconds: of one run on one slot, with start, evaluation and checkpoints; None where nothing was measured.

    basis: `by budget` (it is in seconds), `measured` (the same model's tok/s), `by FLOPs` (from the FLOP/s that other
    models of its kind reached) or `unknown`.
    """

    seconds: float | None
    basis: str


class Throughput:
    """Measured speed of training on one kind of hardware, from records."""

    def __init__(self, records: Iterable[Record], hardware: str = "") -> None:
        """hardware: part of its name; without it, the hardware that most records are from."""
        done = [r for r in records if r["status"] == "done" and r["results"].get("tokens_per_second")]
        done = [r for r in done if hardware.lower() in str(r["environment"].get("hardware")).lower()]
        names = [str(record["environment"].get("hardware")) for record in done]
        self.hardware = statistics.mode(names) if names else ""
        self._rates: dict[str, list[float]] = defaultdict(list)
        self._flops: dict[str, list[float]] = defaultdict(list)
        extra = []
        for record, name in zip(done, names, strict=True):
            if name != self.hardware:
                continue
            results, config = record["results"], record["config"]
            rate = results["tokens_per_second"]
            self._rates[_key(config["model"], config["training"])].append(rate)
            self._flops[config["model"]["mixer"]["kind"]].append(rate * record["model"]["flops_per_token"])
            extra.append(results["wall_seconds"] - results["seconds"])
        self.overhead = statistics.median(extra) if extra else 0.0

    def cost(self, run: PlannedRun) -> Cost:
        """What a run would take."""
        training, model = run.spec.training, run.spec.model
        budget = training.budget
        if budget.seconds is not None:
            return Cost(budget.seconds + self.overhead, BY_BUDGET)
        flops = flops_per_token(model, training.span)
        measured = self._rates.get(_key(model.to_dict(), training.to_dict()))
        reached = self._flops.get(model.mixer.kind)
        if measured:
            rate, basis = statistics.median(measured), MEASURED
        elif reached:
            rate, basis = statistics.median(reached) / flops, BY_FLOPS
        else:
            return Cost(None, UNKNOWN)
        by_steps = (budget.steps or 0) * training.batch_size * training.window
        tokens = budget.tokens or (budget.flops or 0) / flops or by_steps
        return Cost(tokens / rate + self.overhead, basis)


def _key(model: dict[str, object], training: dict[str, Any]) -> str:
    """What a run's speed depends on."""
    keys = ("batch_size", "window", "carry", "accumulate", "optimizer", "precision", "backend")
    shape = [deciding(training)[key] for key in keys]
    return json.dumps([model, shape], sort_keys=True)
