"""Claims: what is refused, and what synthetic records make of each form."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e88.errors import UserError
from e88.study.design import Experiment, parse_study
from e88.study.judge import judge
from e88.study.statistics import mean_interval, seeds_to_decide
from e88.study.verdict import CONFIRMED, REFUTED, UNDECIDED, Verdict

MODEL = {"kind": "e88", "dim": 16, "n_heads": 2, "n_state": 8}


def study(
    text: Path, claims: dict[str, Any], seeds: int = 4, of_a: dict[str, Any] | None = None, models: str = "abc"
) -> Experiment:
    """Models a, b, c of one, two and three layers, and those claims. of_a: training keys of the first."""
    claims = {name: {"says": "", "source": "", **claim} for name, claim in claims.items()}
    table: dict[str, Any] = {
        "data": str(text),
        "training": {"batch_size": 4, "window": 16, "heldout_bytes": 2000},
        "scales": {"smoke": {"seeds": seeds}},
        "budgets": {"steps": {"smoke": {"steps": 3}}, "speed": {"smoke": {"steps": 2}, "exclusive": True}},
        "models": {name: {**MODEL, "depth": depth} for depth, name in enumerate(models, 1)},
        "claims": claims,
    }
    table["models"]["a"]["training"] = of_a or {}
    return parse_study("test", table).at("smoke")


def records(experiment: Experiment, values: dict[str, list[Any]], **results: Any) -> dict[str, Any]:
    """values: model -> held-out bits per byte by seed; None: diverged; a text: failed for that reason."""
    found = {}
    for (model, _, seed), run in experiment.planned.items():
        if seed >= len(values.get(model, ())):
            continue
        value = values[model][seed]
        status = "diverged" if value is None else "failed" if isinstance(value, str) else "done"
        found[run.id] = {
            "id": run.id, "name": model, "status": status, "reason": value if status == "failed" else None,
            "config": {"model": run.spec.model.to_dict(), "training": run.spec.training.to_dict()},
            "data": {"hash": "h", "window": 16, "bytes_per_token": 1.0},
            "environment": {"hardware": "a CPU"},
            "results": {"heldout_bpb": value if status == "done" else None, "tokens_per_second": value, **results},
        }  # fmt: skip
    return found


def verdict(text: Path, claim: dict[str, Any], values: dict[str, list[Any]], **results: Any) -> Verdict:
    experiment = study(text, {"it": claim})
    (found,) = judge(experiment, records(experiment, values, **results))
    assert found.scale in ("smoke", "exact")
    return found


LOW, HIGH, NOISY = [2.0, 2.1, 1.9, 2.05], [3.0, 3.1, 2.95, 3.05], [2.5, 1.0, 4.0, 2.0]


@pytest.mark.parametrize(
    ("claim", "outcome"),
    [
        ({"lower": ["a", "b"]}, CONFIRMED),
        ({"lower": ["b", "a"]}, REFUTED),
        ({"higher": ["b", "a"]}, CONFIRMED),
        ({"lower": ["a", "b"], "by": 0.5}, CONFIRMED),
        ({"lower": ["a", "b"], "by": 1.5}, REFUTED),
        ({"lower": ["a", "b"], "by": 1.0}, UNDECIDED),
        ({"higher": ["b", "a"], "factor": 1.3}, CONFIRMED),
        ({"higher": ["b", "a"], "factor": 1.7}, REFUTED),
        ({"lower": ["a", "c"]}, UNDECIDED),
        ({"close": ["a", "b"], "by": 1.5}, CONFIRMED),
        ({"close": ["a", "b"], "by": 0.5}, REFUTED),
        ({"close": ["a", "c"], "by": 0.5}, UNDECIDED),
        ({"best": ["a"], "of": ["a", "b"]}, CONFIRMED),
        ({"best": ["b"], "of": ["*"]}, REFUTED),
        ({"best": ["a"], "of": ["*"]}, UNDECIDED),
        ({"best": ["a", "b"], "of": ["*"]}, UNDECIDED),
        ({"order": ["a", "b"]}, CONFIRMED),
        ({"order": ["b", "a"]}, REFUTED),
        ({"order": ["a", "b", "c"]}, UNDECIDED),
        ({"order": ["b", "a"], "metric": "tokens_per_second", "budget": "speed"}, CONFIRMED),
        ({"trains": ["a", "b", "c"]}, CONFIRMED),
        ({"diverges": ["a"]}, REFUTED),
        ({"lower": ["a", "b"], "metric": "params"}, CONFIRMED),
        ({"lower": ["a", "b"], "metric": "params", "factor": 3}, REFUTED),
        ({"equals": ["a"], "metric": "state_per_layer", "value": 128}, CONFIRMED),
        ({"equals": ["a"], "metric": "state_per_layer", "value": 130}, REFUTED),
        ({"order": ["a", "b", "c"], "metric": "params"}, CONFIRMED),
        ({"best": ["c"], "of": ["*"], "metric": "params"}, REFUTED),
        ({"close": ["a", "b"], "metric": "state_per_layer", "by": 1}, CONFIRMED),
        ({"lower": ["a", "b"], "hardware": "RTX 4090"}, UNDECIDED),
    ],
)
def test_each_form(text: Path, claim: dict[str, Any], outcome: str) -> None:
    found = verdict(text, claim, {"a": LOW, "b": HIGH, "c": NOISY})
    assert found.outcome == outcome, found
    if outcome == UNDECIDED:
        assert found.reason


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "outcome"),
    [
        # a is shown to beat c alone, b to beat d alone.
        ([2.0, 2.01], [0.9, 1.9, 1.5, 1.6], [3.0, 3.01, 1.0, 1.5], [1.9, 2.9, 2.5, 2.6], UNDECIDED),
        # c is shown to beat a alone, d to beat b alone.
        (LOW, [4.0, 2.0, 3.0, 2.5], [x - 1 for x in LOW], [3.0, 1.0, 2.0, 1.5], REFUTED),
    ],
)
def test_one_claimed_model_must_beat_every_rival(text: Path, a: Any, b: Any, c: Any, d: Any, outcome: str) -> None:
    experiment = study(text, {"it": {"best": ["a", "b"], "of": ["*"]}}, models="abcd")
    (found,) = judge(experiment, records(experiment, {"a": a, "b": b, "c": c, "d": d}))
    assert found.outcome == outcome, found


def test_counts_are_over_the_windows_of_training() -> None:
    table: dict[str, Any] = {
        "training": {"window": 16},
        "scales": {"smoke": {}, "full": {"training": {"window": 64}}},
        "budgets": {"steps": {"smoke": {"steps": 3}, "full": {"steps": 3}}},
        "models": {
            "a": {"kind": "attention", "dim": 16, "depth": 1, "n_heads": 2},
            "b": {"kind": "attention", "dim": 16, "depth": 1, "n_heads": 2, "training": {"carry": 3}},
        },
        "claims": {name: {"says": "", "source": "", "equals": [name], "metric": "state_per_layer", "value": 2 * 16 * 16}
                   for name in "ab"},
    }  # fmt: skip
    table["claims"]["b"]["value"] *= 3
    told = {scale: [v.outcome for v in judge(parse_study("test", table).at(scale), {})] for scale in table["scales"]}
    assert told == {"smoke": [CONFIRMED, CONFIRMED], "full": [REFUTED, REFUTED]}


def test_runs_that_diverged_failed_or_are_missing(text: Path) -> None:
    claim = {"lower": ["a", "b"]}
    assert verdict(text, claim, {"a": LOW, "b": [None] * 4}).outcome == CONFIRMED
    assert verdict(text, claim, {"a": [None] * 4, "b": LOW}).outcome == REFUTED
    some = verdict(text, claim, {"a": LOW, "b": [3.0, None, 3.0, 3.1]})
    assert some.outcome == UNDECIDED and "b diverged in 1 of 4 seeds" in some.reason
    failed = verdict(text, claim, {"a": LOW, "b": ["no memory"] * 4})
    assert failed.outcome == UNDECIDED and "no memory" in failed.reason
    assert "has not run" in verdict(text, claim, {"a": LOW, "b": []}).reason
    assert verdict(text, {"diverges": ["a"]}, {"a": [None] * 4, "b": [], "c": []}).outcome == CONFIRMED
    assert verdict(text, {"diverges": ["a"]}, {"a": [9.0, 8.5], "b": [], "c": []}).outcome == CONFIRMED
    one = verdict(text, {"trains": ["a"]}, {"a": [2.0], "b": [], "c": []})
    assert one.outcome == UNDECIDED and one.more_seeds == 1
    assert verdict(text, {"trains": ["a", "b"]}, {"a": LOW, "b": [2.0, 8.5], "c": []}).outcome == REFUTED
    # What has run to the contrary decides, whatever has not run.
    assert verdict(text, {"diverges": ["a", "b"]}, {"a": [2.0], "b": [], "c": []}).outcome == REFUTED
    waits = verdict(text, {"trains": ["a", "b"]}, {"a": LOW, "b": [], "c": []})
    assert waits.outcome == UNDECIDED and "b has not run" in waits.reason
    # One seed that both have gives no interval.
    assert verdict(text, claim, {"a": LOW, "b": [3.0]}).more_seeds is None


def test_runs_that_cannot_be_compared(text: Path) -> None:
    experiment = study(text, {"it": {"lower": ["a", "b"], "metric": "tokens_per_second", "budget": "speed"}})
    found = records(experiment, {"a": LOW, "b": HIGH})
    first = next(iter(found.values()))
    first["environment"] = {"hardware": "another CPU"}
    assert "different hardware" in judge(experiment, found)[0].reason
    first["environment"], first["data"] = {"hardware": "a CPU"}, {**first["data"], "hash": "other"}
    assert "same data" in judge(experiment, found)[0].reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 32, "batch_size": 2, "heldout_window": 16}, None),
        ({"carry": 4, "heldout_context": 48}, None),
        ({"window": 32, "batch_size": 2}, "same held-out windows"),
        ({"heldout_bytes": 1000}, "same held-out windows"),
        ({"window": 32, "heldout_window": 16}, "equally much data"),
    ],
)
def test_windows_and_carries_compare_at_equal_tokens_a_step_on_one_slice(
    text: Path, options: dict[str, Any], reason: str | None
) -> None:
    experiment = study(text, {"it": {"lower": ["a", "b"]}}, of_a=options)
    (found,) = judge(experiment, records(experiment, {"a": LOW, "b": HIGH}))
    assert found.outcome == CONFIRMED if reason is None else reason in found.reason


def test_claims_together(text: Path) -> None:
    simple = {"low": {"lower": ["a", "b"]}, "wrong": {"lower": ["b", "a"]}, "open": {"lower": ["a", "c"]}}
    both = {name: {"all": parts} for name, parts in (("x", ["low", "open"]), ("y", ["low", "wrong", "open"]))}
    experiment = study(text, {**simple, **both, "z": {"all": ["low"]}})
    outcomes = {v.claim.name: v for v in judge(experiment, records(experiment, {"a": LOW, "b": HIGH, "c": NOISY}))}
    assert [outcomes[name].outcome for name in "xyz"] == [UNDECIDED, REFUTED, CONFIRMED]
    assert outcomes["x"].more_seeds == outcomes["open"].more_seeds


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(3, 6), st.floats(0.05, 0.5))
def test_the_seeds_that_would_decide_do(seed: int, n: int, mean: float) -> None:
    rng = random.Random(seed)
    values = [mean + rng.gauss(0, 1) for _ in range(n)]
    needed = seeds_to_decide(values, 0.0)
    if needed is None:
        return
    # The same values again and again keep the mean, and about the spread.
    many = mean_interval([values[i % n] for i in range(max(2 * needed, 4 * n))])
    assert many.excludes_zero
    if needed > n:
        assert not mean_interval(values).excludes_zero


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({}, "exactly one of"),
        ({"lower": ["a", "b"], "higher": ["a", "b"]}, "exactly one of"),
        ({"lower": ["a"]}, "two models"),
        ({"lower": ["a", "d"]}, "unknown model"),
        ({"lower": "a"}, "list of names"),
        ({"lower": ["a", "b"], "metric": "loss"}, "unknown metric"),
        ({"lower": ["a", "b"], "budget": "time"}, "unknown budget"),
        ({"lower": ["a", "b"], "margin": 1}, "unknown key"),
        ({"lower": ["a", "b"], "by": 1, "factor": 2}, "a ratio"),
        ({"lower": ["a", "b"], "by": "much"}, "must be a number"),
        ({"lower": ["a", "b"], "metric": "tokens_per_second"}, "exclusive"),
        ({"close": ["a", "b"]}, "positive 'by'"),
        ({"best": ["a"], "of": ["*"], "by": 0.1}, "neither 'by' nor 'factor'"),
        ({"order": ["a", "b"], "factor": 1.1}, "neither 'by' nor 'factor'"),
        ({"best": ["a"]}, "'of'"),
        ({"best": ["a"], "of": ["b"]}, "'of'"),
        ({"equals": ["a"], "metric": "params"}, "'value'"),
        ({"equals": ["a"], "value": 1}, "metric of size"),
        ({"all": ["it"]}, "simple claims"),
        ({"all": ["nothing"]}, "simple claims"),
        ({"all": ["elsewhere"]}, "'elsewhere' is not tested at smoke"),
        ({"trains": ["a"], "metric": "params"}, "'trains' needs runs"),
        ({"lower": ["a", "b"], "says": 3}, "the text 'says'"),
    ],
)
def test_wrong_claims_are_refused_in_one_line(text: Path, claim: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        study(text, {"it": claim, "elsewhere": {"trains": ["a"], "scales": ["full"]}})
    assert "\n" not in str(error.value) and "it" in str(error.value)


def test_a_factor_is_a_ratio_and_its_interval_too(text: Path) -> None:
    found = verdict(text, {"higher": ["b", "a"], "factor": 1.3}, {"a": [1.0, 2.0], "b": [2.0, 4.2], "c": []})
    assert found.estimate is not None and found.threshold == pytest.approx(1.3) and found.unit.startswith("ratio")
    assert found.estimate.mean == pytest.approx(math.sqrt(2 * 2.1))
    assert found.estimate.low is not None and 0 < found.estimate.low < found.estimate.mean
