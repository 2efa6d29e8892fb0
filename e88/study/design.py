"""A study as it is written down: models, budgets, scales and claims in one TOML file.

title, source, data, tokenizer
[slurm]            options of jobs under --launcher slurm, see `e88.study.slurm.SlurmLauncher`
[training]         training keys of every run
[scales.NAME]      seeds, shrink = {width, depth, tolerance}, training, kinds.KIND (training keys of a kind of mixer),
                   gpus (how many a run is spread over), parallel (ddp or fsdp)
[budgets.NAME]     for each scale a budget such as {steps = 200}; exclusive = true, or the scales at which its runs
                   are alone on their processor (on a GPU they always are)
[models.NAME]      see `e88.study.shapes`; training (keys of its runs; under a scale's name those at that scale alone);
                   for a scale's name, a table to use there instead; gpus, parallel and seeds, in place of the
                   scale's; vary = {key = [values]} with {key} in NAME makes a grid
[claims.NAME]      see `e88.study.claims`
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from e88.data.tokenizer import Tokenizer
from e88.errors import UserError, unknown_name
from e88.models.config import ModelConfig, build_config
from e88.sizing.closed_form import count_params
from e88.study.claims import Claim, expand, parse_claim
from e88.study.plan import PlannedRun, Planner, distinct
from e88.study.shapes import Shrink, build
from e88.study.spec import DEFAULT_DATA, RunSpec, read_toml
from e88.training.config import MODES, TrainingConfig

KEYS = ("title", "source", "data", "tokenizer", "slurm", "training", "scales", "budgets", "models", "claims")
SPREAD = ("gpus", "parallel")
FULL = Shrink()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How big a study is run: its models by a rule, its budgets by name, its seeds. kinds: training keys by mixer.
    gpus, parallel: how many a run is spread over, and how."""

    name: str
    seeds: int = 1
    shrink: Shrink = FULL
    training: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gpus: int = 1
    parallel: str = "ddp"


@dataclass(frozen=True)
class Study:
    """What a spec says. name: the file's."""

    name: str
    title: str
    source: str
    data: str
    tokenizer: str | None
    training: Mapping[str, Any]
    scales: Mapping[str, Scale]
    budgets: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any]]
    claims: tuple[Claim, ...]
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def at(self, scale: str, *, claims: Sequence[str] = (), seeds: int | None = None) -> Experiment:
        """The study at one scale, all of it or what the claims of these names (with * and ?) need."""
        if scale not in self.scales:
            raise unknown_name("scale", scale, self.scales)
        chosen = tuple(claim for claim in self.claims if not claim.scales or scale in claim.scales)
        if claims:
            wanted = expand(claims, [claim.name for claim in chosen], "claim")
            parts = {part for claim in chosen if claim.name in wanted for part in claim.models}
            chosen = tuple(c for c in chosen if c.name in wanted or c.name in parts)
        counts = {name: seeds or self._seeds(name, self.scales[scale]) for name in self.models}
        return Experiment(self, self.scales[scale], chosen, counts, partial=bool(claims))

    def _seeds(self, model: str, scale: Scale) -> int:
        count: int = self.models[model].get("seeds", scale.seeds)
        if type(count) is not int or count < 1:
            raise UserError(f"model '{model}': seeds must be a positive integer, got {count!r}")
        return count

    def model(self, name: str, scale: Scale | None = None, *, matching: tuple[str, ...] = ()) -> ModelConfig:
        """A model of the study, at full size where no scale is given. matching: those whose match has led to it."""
        if name not in self.models:
            raise unknown_name("model", name, self.models)
        if name in matching:
            raise UserError(f"match goes in a circle: {' -> '.join((*matching, name))}; give one of them its own size")
        try:
            table = dict(self.models[name])
            for key in ("training", "seeds", *SPREAD):
                table.pop(key, None)
            own = {key: table.pop(key) for key in self.scales if key in table}
            rule = scale.shrink if scale else FULL
            full_size = rule.is_none
            if scale is not None and scale.name in own:
                table, rule = dict(own[scale.name]), Shrink(tolerance=rule.tolerance)
            if self.vocab_size is not None:
                table["vocab_size"] = self.vocab_size
            return build(table, rule, self._params_at(scale, (*matching, name)), full_size=full_size)
        except UserError as error:
            raise UserError(f"model '{name}': {error}") from error

    @cached_property
    def vocab_size(self) -> int | None:
        """The tokenizer's, which every model has; None where there is none."""
        return Tokenizer.load(self.tokenizer).vocab_size if self.tokenizer else None

    def _params_at(self, scale: Scale | None, matching: tuple[str, ...]) -> Callable[[str], int]:
        return lambda other: count_params(self.model(other, scale, matching=matching))

    def run(self, model: str, budget: str, seed: int, scale: Scale, config: ModelConfig) -> RunSpec:
        """One run of a model under a budget."""
        if scale.name not in self.budgets[budget]:
            raise UserError(f"the budget '{budget}' says nothing of scale '{scale.name}'; add {scale.name} = {{...}}")
        options = {"budget": self.budgets[budget][scale.name], "seed": seed}
        training = self._training(model, scale, config.mixer.kind, options)
        return RunSpec(name=model, model=config, training=training, data=self.data, tokenizer=self.tokenizer)

    def span(self, model: str, scale: Scale) -> int:
        """Tokens that follow one another in a model's training."""
        return self._training(model, scale, self.model(model).mixer.kind, {"budget": {"steps": 1}}).span

    def _training(self, model: str, scale: Scale, kind: str, options: Mapping[str, Any]) -> TrainingConfig:
        given = self.models[model].get("training", {})
        own = {key: value for key, value in given.items() if key not in self.scales}
        shared = {**self.training, **scale.training, **scale.kinds.get(kind, {})}
        return TrainingConfig.from_dict({**shared, **own, **given.get(scale.name, {}), **options})

    def spread(self, model: str, scale: Scale) -> dict[str, Any]:
        """gpus and parallel of a model's runs."""
        found = {key: self.models[model].get(key, getattr(scale, key)) for key in SPREAD}
        if type(found["gpus"]) is not int or found["gpus"] < 1:
            raise UserError(f"model '{model}': gpus must be a positive integer, got {found['gpus']!r}")
        if found["parallel"] not in MODES:
            raise UserError(f"model '{model}': parallel '{found['parallel']}' is not one of {', '.join(MODES)}")
        return found

    def is_exclusive(self, budget: str, scale: Scale) -> bool:
        return scale.name in _exclusive_at(self.budgets[budget], self.scales)


@dataclass(frozen=True)
class Experiment:
    """A study at one scale. counts: model -> its number of seeds. partial: only what some claims need."""

    study: Study
    scale: Scale
    claims: tuple[Claim, ...]
    counts: Mapping[str, int]
    partial: bool = False

    def of(self, model: str, budget: str) -> dict[int, PlannedRun]:
        """seed -> run of one series."""
        return {seed: self.planned[model, budget, seed] for seed in range(self.counts[model])}

    @cached_property
    def arms(self) -> tuple[tuple[str, str], ...]:
        """(model, budget) of every series of runs: those that claims need, and under the first budget those that
        no claim names."""
        needed = {(model, claim.budget): None for claim in self.claims for model in claim.involved}
        if not self.partial:
            named = {model for claim in self.study.claims for model in (*claim.models, *claim.of)}
            first = next(iter(self.study.budgets))
            needed |= {(model, first): None for model in self.study.models if model not in named}
        order = list(self.study.models)
        return tuple(sorted(needed, key=lambda arm: (list(self.study.budgets).index(arm[1]), order.index(arm[0]))))

    @cached_property
    def configs(self) -> dict[str, ModelConfig]:
        """The models that run, at this scale."""
        return {name: self.study.model(name, self.scale) for name in dict.fromkeys(model for model, _ in self.arms)}

    @cached_property
    def planned(self) -> dict[tuple[str, str, int], PlannedRun]:
        """(model, budget, seed) -> its run. Seed by seed, so that an interruption leaves whole comparisons. Two models
        that are the same have the same runs."""
        planner, study, scale = Planner(), self.study, self.scale
        return {
            (model, budget, seed): planner.plan(
                study.run(model, budget, seed, scale, self.configs[model]),
                study.is_exclusive(budget, scale),
                **study.spread(model, scale),
            )
            for seed in range(max(self.counts.values()))
            for model, budget in self.arms
            if seed < self.counts[model]
        }

    @cached_property
    def runs(self) -> list[PlannedRun]:
        """Every run once."""
        return distinct(self.planned.values())


def load_study(path: str | Path, *, data: str | None = None) -> Study:
    """The study of a TOML file; `data` replaces the data it names. UserError for whatever is wrong with it."""
    path = Path(path)
    try:
        return parse_study(path.stem, read_toml(path), data=data)
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from error


def parse_study(name: str, table: Mapping[str, Any], *, data: str | None = None) -> Study:
    """The study of a parsed spec."""
    for key in table:
        if key not in KEYS:
            raise unknown_name("key", key, KEYS)
    for key in ("scales", "budgets", "models"):
        if not isinstance(table.get(key), Mapping) or not table[key]:
            raise UserError(f"the study needs [{key}.NAME] tables")
    scales = {key: _scale(key, value) for key, value in table["scales"].items()}
    for budget, values in table["budgets"].items():
        for key in values:
            if key != "exclusive" and key not in scales:
                raise unknown_name(f"scale in budget '{budget}':", key, ("exclusive", *scales))
    models = _grid(table["models"])
    shared = {key: set(scales) & set(value) - _exclusive_at(value, scales) for key, value in table["budgets"].items()}
    claims = tuple(parse_claim(key, value, list(models), shared) for key, value in table.get("claims", {}).items())
    simple = {claim.name: claim for claim in claims if claim.form != "all"}
    for claim in claims:
        for part in claim.models if claim.form == "all" else ():
            if part not in simple:
                raise UserError(f"claim '{claim.name}': 'all' names simple claims of this study, '{part}' is none")
            untested = set(claim.scales or scales) - set(simple[part].scales or scales)
            if untested:
                raise UserError(f"claim '{claim.name}': '{part}' is not tested at {min(untested)}; set 'scales' alike")
    return Study(
        name=name,
        title=str(table.get("title", name)),
        source=str(table.get("source", "")),
        data=data or str(table.get("data", DEFAULT_DATA)),
        tokenizer=table.get("tokenizer"),
        training=table.get("training", {}),
        scales=scales,
        budgets=table["budgets"],
        models=models,
        claims=claims,
        slurm=table.get("slurm", {}),
    )


def _exclusive_at(budget: Mapping[str, Any], scales: Iterable[str]) -> set[str]:
    """The scales at which a budget's runs are alone on their processor."""
    value = budget.get("exclusive", False)
    if value is True:
        return set(scales)
    if value is False:
        return set()
    if not isinstance(value, list) or not set(value) <= set(scales):
        raise UserError(f"exclusive must be true, false or a list of scales ({', '.join(scales)}), got {value!r}")
    return set(value)


def _scale(name: str, table: Mapping[str, Any]) -> Scale:
    values = dict(table)
    shrink = build_config(Shrink, values.pop("shrink", {}))
    scale: Scale = build_config(Scale, {"name": name, "shrink": shrink, **values})
    if scale.seeds < 1:
        raise UserError(f"scale '{name}': seeds must be at least 1, got {scale.seeds}")
    return scale


def _grid(tables: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """name -> table of every model, those with `vary` multiplied out."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise UserError(f"model '{name}' must be a table, for instance {{preset = 'tiny-e88'}}")
        values = dict(table)
        vary = values.pop("vary", {})
        for combination in itertools.product(*vary.values()):
            chosen = dict(zip(vary, combination, strict=True))
            try:
                full_name = name.format(**chosen)
            except (KeyError, IndexError, ValueError) as error:
                raise UserError(f"model '{name}': its name may hold {{key}} of vary only ({error})") from error
            if full_name in found:
                raise UserError(f"two models are named '{full_name}'; put {{key}} of each key of vary in the name")
            found[full_name] = {**values, **chosen}
    return found
