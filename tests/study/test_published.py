"""The specs of the 500M tables say what the documents' rows were."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from e88.sizing.closed_form import count_params
from e88.study.design import load_study
from e88.training.config import config_hash

FOLDER = Path(__file__).resolve().parent.parent.parent / "studies"
WINDOWS = ("wide", *(f"wide-{of}" for of in ("window-half", "window-2", "window-4", "carry-4", "carry-16", "context",
                                             "carry-4-context")))  # fmt: skip


@pytest.mark.parametrize("name", ["benchmark_500m", "failing_500m"])
@pytest.mark.parametrize("scale", ["smoke", "full"])
def test_every_run_of_a_table_is_planned(name, scale):
    study = load_study(FOLDER / f"{name}.toml")
    runs = study.at(scale).runs
    assert {run.spec.training.window for run in runs} == {512 if scale == "full" else 128}
    if scale == "full":
        assert {run.spec.training.batch_size for run in runs} == {32}
        assert all(480e6 < count_params(run.spec.model) < 540e6 for run in runs)
        assert {run.spec.training.seed for run in runs} == {0, 1, 2}


def test_the_benchmark_is_two_tables_of_all_rows_and_one_of_the_main_ones():
    study = load_study(FOLDER / "benchmark_500m.toml").at("full", seeds=1)
    rows = {}
    for model, budget in study.arms:
        rows.setdefault(budget, []).append(model)
    assert rows["data"] == rows["minute"] and len(rows["data"]) == 15
    main = {"e88-wide", "e88-narrow", "e88-memory", "e88-dim1792", "gdn-strong", "gdn-doc", "mamba2", "transformer"}
    assert set(rows["headline"]) == main < set(rows["data"])
    assert {run.spec.training.budget.seconds for run in study.runs} == {None, 60, 600}
    # What E88_b56n32 had read when the documents stopped it: 421 steps of 32 windows of 512.
    assert {run.spec.training.budget.tokens for run in study.runs} == {None, 6_900_000}
    assert all(run.exclusive == (run.spec.training.budget.seconds is not None) for run in study.runs)


def test_the_published_runs_of_the_recipe_are_runs_of_its_study():
    study = load_study(FOLDER / "recipe_500m.toml")
    specs = [run.spec for scale in ("small", "medium", "full") for run in study.at(scale).runs]
    path = FOLDER.parent / "results" / "recipe_500m" / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    (data,) = {record["data"]["hash"] for record in records}
    planned = {config_hash(spec.model.to_dict(), spec.training.to_dict(), data) for spec in specs}
    assert {record["id"] for record in records} <= planned
    # The models that differ in windows, carry or context differ in nothing else, tokens a step included.
    for scale in ("smoke", "small", "medium", "full"):
        wide, *others = (study.at(scale, seeds=1).planned[name, "minute", 0].spec for name in WINDOWS)
        assert len({config_hash(s.model.to_dict(), s.training.to_dict(), data) for s in (wide, *others)}) == 8
        for other in others:
            t = other.training
            assert other.model == wide.model
            assert t.window * t.batch_size == wide.training.window * wide.training.batch_size
            same = {key: getattr(wide.training, key) for key in ("window", "batch_size", "carry", "heldout_context")}
            assert replace(t, **same) == wide.training


def test_the_failing_rows_run_in_one_part_and_in_four():
    runs = load_study(FOLDER / "failing_500m.toml").at("full", seeds=1).runs
    shapes = {}
    for run in runs:
        mixer = run.spec.model.mixer
        shapes.setdefault((mixer.n_heads, mixer.n_state), []).append(run.spec.training.accumulate)
    assert shapes == {shape: [1, 4] for shape in [(36, 48), (72, 48), (81, 32), (5, 128), (100, 64)]}
