"""The page of a study: verdicts that lead to their runs, honest where there are none, bounded where there are many."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markup import Page, check

from e88.report import page as page_module
from e88.report.compare import comparisons
from e88.report.plots import figures
from e88.report.study import rounded
from e88.report.study_page import report_study
from e88.report.style import styles
from e88.report.sweeps import find_sweeps, sweep_figure
from e88.study.fits import fit_power_law
from e88.study.statistics import Estimate
from e88.study.store import Store


def read(path: Path) -> Page:
    return check(path.read_text(encoding="utf-8"))


def test_every_claim_leads_to_the_runs_behind_it(study_store: Any) -> None:
    experiment, store = study_store()
    report, path = report_study(experiment, store)
    assert path == store / "study-smoke.html"
    page = read(path)
    for verdict in report.verdicts:
        assert verdict.claim.says in page.text and f"claim-{verdict.claim.name}" in page.ids
    links = set(page.get("href"))
    for claim in experiment.claims:
        for model in claim.involved:
            for run in experiment.of(model, claim.budget).values():
                assert f"#run-{run.id}" in links
    assert {"#claim-wider", "#claim-rival"} <= links
    for run in experiment.runs:
        assert run.id in page.text
    # Two budgets of one limit are one comparison of the same runs.
    assert "Budgets run and again: 40 steps" in page.text and "Budget short: 20 steps" in page.text
    assert "the test of <this> & that" in page.text


def test_figures_of_a_study(study_store: Any) -> None:
    experiment, store = study_store()
    _, path = report_study(experiment, store)
    text = path.read_text(encoding="utf-8")
    for title in ("Held-out bits per byte against parameters", "Training loss against compute", "against state size",
                  "Held-out bits per byte along the window", "Scaling law over parameters"):  # fmt: skip
        assert title in text
    assert text.count('class="frontier"') == 3
    # The second budget is not exclusive: its runs shared their processor.
    first, second = text.split('<section id="comparison-2"')
    assert "Training speed" in first and "training time, seconds" in first
    assert "Training speed" not in second and "training time, seconds" not in second
    assert "shared their processor" in second and "shared their processor" not in first


def test_tables_beside_the_page(study_store: Any) -> None:
    experiment, store = study_store()
    report, _ = report_study(experiment, store)
    with open(store / "study-smoke.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({(m, json.dumps(experiment.study.budgets[b]["smoke"])) for m, b in experiment.arms})
    assert {run for row in rows for run in row["ids"].split()} == {run.id for run in experiment.runs}
    with open(store / "study-smoke-claims.csv", newline="") as file:
        claims = {row["claim"]: row for row in csv.DictReader(file)}
    wider = next(v for v in report.verdicts if v.claim.name == "wider")
    assert float(claims["wider"]["mean"]) == wider.estimate.mean and claims["wider"]["outcome"] == wider.outcome
    markdown = (store / "study-smoke.md").read_text()
    assert "| wider |" in markdown and "w48" in markdown.split("## Models")[1]


def test_nothing_has_run(study_store: Any) -> None:
    experiment, store = study_store(lambda *run: None)
    page = read(report_study(experiment, store)[1])
    assert "No run of this budget has ended yet; 15 are planned" in page.text
    assert "w48 has not run" in page.text and "counted" in page.text
    assert "svg" not in page.tags


def test_one_seed(study_store: Any) -> None:
    experiment, store = study_store(lambda model, budget, seed: "done" if seed == 0 else None)
    page = read(report_study(experiment, store)[1])
    assert "one seed has no interval" in page.text and "One seed: no band." in page.text
    assert "Not run yet: w16 (seeds 1, 2)" in page.text


def test_every_run_failed(study_store: Any) -> None:
    experiment, store = study_store(lambda *run: "failed")
    page = read(report_study(experiment, store)[1])
    assert "no model has a held-out figure" in page.text and "w48 failed: out of memory" in page.text
    assert "svg" not in page.tags


def test_some_diverged(study_store: Any) -> None:
    experiment, store = study_store(lambda model, budget, seed: "diverged" if model == "w48" else "done")
    page = read(report_study(experiment, store)[1])
    assert "w48 diverged in 3 of 3 seeds" in page.text and "the loss was not finite" in page.text


def test_many_runs_are_told_in_short(study_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MOST_DETAILED", 20)
    experiment, store = study_store()
    page = read(report_study(experiment, store)[1])
    assert "each has one line here" in page.text and "n_state" not in page.text.split("each has one line here")[-1]
    assert all(run.id in page.text for run in experiment.runs)


def test_many_models_are_cut_to_the_best(study_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MOST_MODELS", 2)
    experiment, store = study_store()
    page = read(report_study(experiment, store)[1])
    assert "The best 2 of 5 models are shown; the CSV beside has all." in page.text


def test_hostile_names_stay_text(study_store: Any) -> None:
    evil = "</script><b onclick=x>"

    def edit(spec: str) -> str:
        spec = spec.replace("Wider is better", evil).replace("claims.both]", 'claims."a \' b"]')
        return spec.replace("models.gdn]", "models.'g d>n']").replace('"gdn"', '"g d>n"')

    experiment, store = study_store(edit=edit)
    page = read(report_study(experiment, store)[1])
    assert page.text.count(evil) == 1 and "g d>n" in page.text


def sized(make_record: Any, name: str, seed: int = 0, params: int = 1000, **model: Any) -> dict[str, Any]:
    record = make_record(name, seed, params=params)
    mixer = record["config"]["model"]["mixer"] | {k: v for k, v in model.items() if k.startswith("n_")}
    record["config"]["model"] |= {"mixer": mixer} | {k: v for k, v in model.items() if not k.startswith("n_")}
    return record


def test_a_sweep_is_over_the_first_quantity_that_tells_models_apart(make_record: Any) -> None:
    def swept(*models: dict[str, Any]) -> list[str]:
        records = [sized(make_record, f"m{i}", **model) for i, model in enumerate(models)]
        (comparison,) = comparisons(records)
        names = [record["name"] for record in records]
        return [sweep.quantity for sweep in find_sweeps(comparison, [(names, False), (names[:3], False)])]

    assert swept(*({"n_state": n, "n_heads": 512 // n} for n in (16, 32, 64))) == ["n_state"]
    assert swept(*({"n_state": 32, "dim": d, "depth": 64 // d} for d in (16, 32, 48))) == ["dim"]
    assert swept(*({"dim": 64, "depth": d} for d in (2, 4, 8, 16))) == ["depth"]
    # Two of one value, two models only, and models of other sizes, which differ in more.
    assert swept({"n_state": 16}, {"n_state": 16}, {"n_state": 32}) == []
    assert swept({"n_state": 16}, {"n_state": 32}) == []
    assert swept(*({"dim": d, "params": 1000 * d} for d in (16, 32, 64))) == ["params"]


def test_the_sweep_passes_through_the_means(make_record: Any) -> None:
    records = [sized(make_record, f"m{n}", seed, n_state=n) for n in (16, 32, 64) for seed in range(3)]
    (comparison,) = comparisons(records)
    (sweep,) = find_sweeps(comparison, [([f"m{n}" for n in (16, 32, 64)], False)])
    figure = sweep_figure(sweep, styles(comparison.groups))
    assert figure is not None and figure.svg.count('class="hollow"') == 9 and figure.svg.count('class="mark"') == 3
    assert ">16</text>" in figure.svg and ">64</text>" in figure.svg


def test_models_off_the_frontier_are_hollow_only_where_that_is_decided(make_record: Any) -> None:
    def hollow(noise: float) -> int:
        good = [make_record("tiny-e88", seed, floor=1.2, state=1000, noise=noise) for seed in range(3)]
        bad = [make_record("tiny-gdn", seed, floor=1.3, state=2000, noise=noise) for seed in range(3)]
        (comparison,) = comparisons(good + bad)
        return next(f for f in figures(comparison) if "state size" in f.title).svg.count('class="hollow"')

    assert hollow(0.0005) == 1 and hollow(2.0) == 0


def test_the_band_of_a_law_holds_its_line() -> None:
    x = np.geomspace(1e5, 1e7, 12)
    y = 2 + 3 * (x / 1e6) ** -0.2 + 0.01 * np.random.default_rng(0).standard_normal(12)
    law = fit_power_law("params", list(x), list(y))
    assert law is not None
    at, low, mean, high = np.array(law.band).T
    assert at[0] == pytest.approx(x[0]) and at[-1] == pytest.approx(x[-1])
    assert mean == pytest.approx([law.predict(value) for value in at])
    assert (low < high).all() and np.mean((low <= mean) & (mean <= high)) > 0.9
    # The truth lies in most of it.
    truth = 2 + 3 * (at / 1e6) ** -0.2
    assert np.mean((low <= truth) & (truth <= high)) > 0.7


@pytest.mark.parametrize(
    "numbers, told",
    [
        ((-0.06481, -0.33461, 0.20499), "-0.065 (-0.335 to 0.205)"),
        ((380.9, -6861.2, 7623.0), "+380 (-6,860 to 7,620)"),
        ((1.90312, 1.90211, 1.90413), "+1.90312 (1.90211 to 1.90413)"),
        ((0.5, None, None), "+0.5"),
        ((0.5, 0.5, 0.5), "+0.5"),
    ],
)
def test_digits_follow_the_interval(numbers: tuple[float, float | None, float | None], told: str) -> None:
    mean, low, high = numbers
    assert rounded(Estimate(mean, 3, low, high, "seeds"), signed=True) == told


def test_curves_of_some_runs(make_record: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    records = [make_record("tiny-e88", seed, points=20) for seed in range(3)]
    for record in [*records, {**records[1], "curve": records[1]["curve"][:5]}]:
        store.append(record)
    found = store.curves({records[0]["id"], records[1]["id"], "absent"})
    assert {run: len(record["curve"]) for run, record in found.items()} == {records[0]["id"]: 20, records[1]["id"]: 5}
    assert store.curves([]) == {} and Store(tmp_path / "none").curves(["x"]) == {}
