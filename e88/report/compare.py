"""From records to comparisons: which runs may be set side by side, and what each model scored over its seeds.

A comparison is the runs of one budget, one data set and one kind of hardware. In it a group is one model under one
training configuration, over its seeds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from e88.errors import UserError
from e88.study.statistics import Estimate, heldout_estimate, paired_difference
from e88.training.config import deciding

Record = dict[str, Any]
MISSING = "–"
LIBRARY_KINDS = ("gated_deltanet", "mamba2")


def dig(record: Any, *path: str) -> Any:
    """The value at a path of keys, None where any is absent."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def number(record: Any, *path: str) -> float | None:
    """The finite number at a path of keys, else None."""
    value = dig(record, *path)
    return float(value) if is_number(value) else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Group:
    """The runs of one model and training configuration, one for each seed. label: unique in its comparison."""

    label: str
    runs: tuple[Record, ...]

    @cached_property
    def done(self) -> tuple[Record, ...]:
        return tuple(run for run in self.runs if run.get("status") == "done")

    @property
    def done_seeds(self) -> set[int]:
        return {int(run.get("seed") or 0) for run in self.done}

    @property
    def kind(self) -> str:
        """The mixer's kind, "" where the record does not say."""
        return str(dig(self.runs[0], "config", "model", "mixer", "kind") or "")

    @property
    def status(self) -> str:
        """done where any seed is; else diverged where any is; else pruned; else failed."""
        statuses = {str(run.get("status")) for run in self.runs}
        return next((status for status in ("done", "diverged", "pruned") if status in statuses), "failed")

    def count(self, status: str) -> int:
        return sum(run.get("status") == status for run in self.runs)

    def reason(self, status: str) -> str:
        """Why the first run of that status ended as it did."""
        return next((str(run.get("reason") or "") for run in self.runs if run.get("status") == status), "")

    def by_seed(self, *path: str) -> dict[int, float]:
        """seed -> value, of the runs that are done and have the value."""
        values = {int(run.get("seed") or 0): number(run, *path) for run in self.done}
        return {seed: value for seed, value in values.items() if value is not None}

    def mean(self, *path: str) -> float | None:
        """The mean over the seeds that are done; where none is, over what the others reached; None where unknown."""
        values: Iterable[float | None] = self.by_seed(*path).values() or [number(run, *path) for run in self.runs]
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if known else None

    @cached_property
    def bpb(self) -> Estimate | None:
        """Held-out bits per byte over the seeds that are done."""
        values = list(self.by_seed("results", "heldout_bpb").values())
        if not values:
            return None
        windows = [pair(run, "results", "heldout_interval") for run in self.done]
        return heldout_estimate(values, next((window for window in windows if window), None))


def pair(record: Record, *path: str) -> tuple[float, float] | None:
    """The [low, high] at a path of keys, None where it is absent or not finite."""
    value = dig(record, *path)
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value)):
        return float(value[0]), float(value[1])
    return None


@dataclass(frozen=True)
class Comparison:
    """Groups that may be compared, the best first: by held-out bits per byte; pruned, diverged and failed ones last."""

    budget: dict[str, float]
    data: str
    hardware: str
    groups: tuple[Group, ...]
    warnings: tuple[str, ...] = field(default=())

    @cached_property
    def runs(self) -> list[Record]:
        return [run for group in self.groups for run in group.runs]

    @cached_property
    def ranked(self) -> list[Group]:
        """The groups that have a held-out figure, best first."""
        return [group for group in self.groups if group.bpb is not None]

    @property
    def title(self) -> str:
        return ", ".join(part for part in (budget_text(self.budget), self.data, self.hardware) if part)

    def to_best(self, group: Group) -> Estimate | None:
        """Bits per byte of the group above the best one, paired by seed; None for the best one itself."""
        ranked = self.ranked
        if not ranked or group is ranked[0]:
            return None
        return difference(group, ranked[0])


def difference(group: Group, other: Group) -> Estimate | None:
    """Held-out bits per byte of `group` less those of `other`, paired by seed."""
    path = ("results", "heldout_bpb")
    return paired_difference(group.by_seed(*path), other.by_seed(*path))


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """Every comparison that the records allow, the one with most runs first; UserError where there is no record."""
    if not records:
        raise UserError("there are no records to report; train a model first (e88 train), or give another folder")
    parts: dict[tuple[Any, ...], list[Record]] = {}
    # Some runs lack their data or hardware: those with most known come first and the others join a part they fit.
    settings = [(_setting(record), record) for record in records]
    for setting, record in sorted(settings, key=lambda pair: sum(part is None for part in pair[0])):
        home = next((key for key in parts if _fits(setting, key)), setting)
        parts.setdefault(home, []).append(record)
    return [_comparison(part) for part in sorted(parts.values(), key=len, reverse=True)]


def _setting(record: Record) -> tuple[Any, ...]:
    return (
        json.dumps(_budget(record), sort_keys=True) if _budget(record) else None,
        dig(record, "data", "hash"),
        dig(record, "data", "heldout_bytes"),
        # A failed run has measured nothing: where it failed does not set it apart.
        None if record.get("status") == "failed" else dig(record, "environment", "hardware"),
    )


def _budget(record: Record) -> dict[str, float]:
    budget = dig(record, "config", "training", "budget") or {}
    return {key: value for key, value in budget.items() if is_number(value)}


def _fits(setting: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    return all(mine is None or mine == theirs for mine, theirs in zip(setting, known, strict=True))


def _comparison(records: list[Record]) -> Comparison:
    by_config: dict[str, list[Record]] = {}
    for record in records:
        by_config.setdefault(json.dumps([record.get("name"), _without_seed(record)], sort_keys=True), []).append(record)
    members = list(by_config.values())
    groups = [
        Group(label, tuple(sorted(runs, key=lambda run: int(run.get("seed") or 0))))
        for label, runs in zip(_labels(members), members, strict=True)
    ]
    groups.sort(key=_rank)
    first = records[0]
    data, hardware = (str(dig(first, *path) or "") for path in (("data", "name"), ("environment", "hardware")))
    return Comparison(_budget(first), data, hardware, tuple(groups), tuple(_warnings(groups)))


def _rank(group: Group) -> tuple[int, float, str]:
    order = {"done": 0, "pruned": 1, "diverged": 2, "failed": 3}[group.status]
    score = group.bpb.mean if group.bpb else math.inf
    return order, score, group.label


def _without_seed(record: Record) -> dict[str, Any]:
    """The configuration less what makes no other model: the seed, and how often the run was saved or looked into."""
    training = {key: value for key, value in _training(record).items() if key != "seed"}
    return {**(record.get("config") or {}), "training": training}


def _training(record: Record) -> dict[str, Any]:
    return deciding(dig(record, "config", "training") or {})


def _labels(members: list[list[Record]]) -> list[str]:
    """The name of each group; where a name is shared, with the settings that tell its groups apart."""
    names = [str(runs[0].get("name") or runs[0]["id"]) for runs in members]
    counts = Counter(names)
    shared = {i: dict(flatten(_without_seed(members[i][0]))) for i, name in enumerate(names) if counts[name] > 1}
    labels = names.copy()
    for index, config in shared.items():
        name = names[index]
        others = [other for i, other in shared.items() if names[i] == name and i != index]
        differing = [key for key in config if any(other.get(key) != config[key] for other in others)]
        told = ", ".join(f"{key.rsplit('.', 1)[-1]}={config[key]}" for key in differing[:3])
        labels[index] = f"{name} ({told or members[index][0]['id']})"
    repeated = Counter(labels)
    return [
        label if repeated[label] == 1 else f"{label} {runs[0]['id']}"
        for label, runs in zip(labels, members, strict=True)
    ]


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested mappings, as ("a.b.c", value)."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _warnings(groups: list[Group]) -> Iterable[str]:
    runs = [run for group in groups for run in group.runs]
    done = [run for run in runs if run.get("status") == "done"]

    def several(*path: str) -> list[str]:
        return sorted({str(value) for run in done if (value := dig(run, *path)) is not None})

    for what, key, so in (
        ("batch sizes", "batch_size", "did not see the same bytes in order"),
        ("window lengths", "window", "did not see the same bytes in order"),
        ("windows to a carried state", "carry", "did not see the same bytes in order"),
        ("ways to sample the text", "sampling", "did not see the same bytes in order"),
        ("held-out windows", "heldout_window", "were not scored on the same slice"),
        ("held-out context", "heldout_context", "did not read equally much before what was scored"),
    ):
        if len(values := sorted({str(_training(run).get(key)) for run in done})) > 1:
            yield f"The runs differ in their {what} ({', '.join(values)}), so they {so}."
    if len(values := several("data", "bytes_per_token")) > 1:
        yield "The runs use tokens of different lengths: compare bits per byte, not the loss in nats per token."
    if len(values := several("environment", "commit")) > 1:
        yield f"The runs come from {len(values)} commits: {', '.join(values)}."
    if any(commit.endswith("-dirty") for commit in values):
        yield "Some runs come from a source tree with uncommitted changes (commit ends in -dirty)."
    if len(values := several("environment", "versions", "torch")) > 1:
        yield f"The runs used different versions of torch: {', '.join(values)}."
    if len({frozenset(group.done_seeds) for group in groups if group.done}) > 1:
        yield "The models did not finish the same seeds: their means are not over the same data, only differences are."
    for group in groups:
        # Only runs on a GPU carry a check of their layer.
        plain = [run for run in group.done if dig(run, "environment", "layer_check") and group.kind in LIBRARY_KINDS]
        if any(dig(run, "environment", "backends") == ["torch"] for run in plain):
            yield f"{group.label} ran without its library's kernels: its speed and its loss at equal time suffer."
        lost = len(group.runs) - len(group.done)
        if group.done and lost:
            yield (
                f"{group.label}: {lost} of {len(group.runs)} seeds did not finish, "
                "so its mean is over the seeds that did."
            )


def budget_text(budget: dict[str, float]) -> str:
    """A budget in words: "10 min of training", "500 steps"."""
    for key, value in budget.items():
        if key == "seconds":
            return f"{duration(value)} of training"
        return f"{count(value)} {'FLOPs' if key == 'flops' else key}"
    return ""


def duration(seconds: float) -> str:
    """12.3 s, 10 min, 2.5 h."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (math.inf, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return MISSING


def count(value: float) -> str:
    """A count in three digits: 950, 57.3K, 1.20M, 504M, 2.1e15."""
    if abs(value) < 1e4:
        return f"{value:.0f}"
    for size, unit in ((1e3, "K"), (1e6, "M"), (1e9, "B")):
        # From 999.5 up three digits would round to 1000 of this unit.
        if abs(value) < 999.5 * size:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.3g}".replace("e+", "e")
