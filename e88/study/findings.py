"""What a study's records say beyond its claims: scaling laws of each kind of model, efficient frontiers. No torch."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from e88.study.design import Experiment
from e88.study.fits import PowerLaw, fit_joint, fit_power_law
from e88.study.frontier import Place, Point, frontier
from e88.study.store import Record

LOSS = "heldout_bpb"


@dataclass(frozen=True)
class ScalingLaw:
    """How held-out bits per byte fall for one kind of mixer. where: the budget, or "all budgets" together."""

    kind: str
    where: str
    law: PowerLaw


@dataclass(frozen=True)
class Frontier:
    """Models of one budget by one cost: `state per layer` (elements) or `tok/s` (of which more is better)."""

    budget: str
    cost: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Final:
    """Where one run ended."""

    kind: str
    budget: str
    params: float
    tokens: float
    flops: float
    loss: float


def kinds_of(record: Record) -> str:
    """The kind of a run's mixer, or both of a hybrid's, such as `e88+attention`."""
    model = record["config"]["model"]
    return "+".join(model[key]["kind"] for key in ("mixer", "hybrid") if key in model)


def scaling_laws(experiment: Experiment, records: Mapping[str, Record]) -> list[ScalingLaw]:
    """Every law that the runs which are done can carry: over parameters at each budget, over tokens, over compute, and
    over parameters and tokens together."""
    finals: dict[str, list[_Final]] = defaultdict(list)
    for (_, budget, _), run in experiment.planned.items():
        record = records.get(run.id)
        if record is None or record["status"] != "done" or record["results"].get(LOSS) is None:
            continue
        size, results = record["model"], record["results"]
        kind = kinds_of(record)
        flops = size["flops_per_token"] * results["tokens"]
        finals[kind].append(_Final(kind, budget, size["params"], results["tokens"], flops, results[LOSS]))
    laws = []
    for kind, ends in finals.items():
        for budget in dict.fromkeys(end.budget for end in ends):
            part = [end for end in ends if end.budget == budget]
            laws.append((kind, budget, fit_power_law("params", [e.params for e in part], [e.loss for e in part])))
        losses = [end.loss for end in ends]
        params, tokens = [end.params for end in ends], [end.tokens for end in ends]
        laws.append((kind, "all budgets", fit_power_law("FLOPs", [end.flops for end in ends], losses)))
        laws.append((kind, "all budgets", fit_joint(("params", "tokens"), params, tokens, losses)))
    return [ScalingLaw(kind, where, law) for kind, where, law in laws if law is not None]


def frontiers(experiment: Experiment, records: Mapping[str, Record]) -> list[Frontier]:
    """Quality against state, and against throughput where runs had their processor to themselves."""
    found = []
    for budget in dict.fromkeys(budget for _, budget in experiment.arms):
        state, speed = [], []
        for model in [m for m, b in experiment.arms if b == budget]:
            runs = {seed: records.get(run.id) for seed, run in experiment.of(model, budget).items()}
            done = {seed: record for seed, record in runs.items() if record and record["status"] == "done"}
            if not done:
                continue
            loss = {seed: record["results"][LOSS] for seed, record in done.items()}
            state.append(Point(model, next(iter(done.values()))["model"]["state_per_layer"], loss))
            rate = statistics.median(record["results"]["tokens_per_second"] for record in done.values())
            # Less of a cost is better.
            speed.append(Point(model, -rate, loss))
        if len(state) > 1:
            found.append(Frontier(budget, "state per layer", tuple(frontier(state))))
        if len(speed) > 1 and experiment.study.is_exclusive(budget, experiment.scale):
            places = tuple(frontier(speed))
            found.append(Frontier(budget, "tok/s", tuple(_positive(place) for place in places)))
    return found


def _positive(place: Place) -> Place:
    return Place(place.name, -place.cost, place.loss, place.by, place.decided)
