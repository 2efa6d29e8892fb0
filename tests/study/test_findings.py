"""Scaling laws against laws that are known, frontiers against brute force, costs against records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import run

from e88.study.cost import BY_BUDGET, BY_FLOPS, MEASURED, UNKNOWN, Throughput
from e88.study.fits import fit_joint, fit_power_law
from e88.study.frontier import Point, frontier
from e88.study.store import Store


@settings(max_examples=15)
@given(st.floats(0.1, 1.0), st.floats(0.0, 2.0), st.floats(0.5, 3.0))
def test_an_exact_law_is_found_again(exponent: float, floor: float, scale: float) -> None:
    x = np.geomspace(1e6, 1e9, 8)
    y = floor + scale * (x / 1e7) ** -exponent
    law = fit_power_law("params", list(x), list(y))
    assert law is not None
    assert law.exponents[0].mean == pytest.approx(exponent, rel=0.02)
    assert law.predict(3e7) == pytest.approx(floor + scale * 3**-exponent, rel=0.01)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(np.geomspace(1e6, 1e9, 6), 3)
    held = 0
    for _ in range(40):
        y = 1.0 + 2.0 * (x / 3e7) ** -0.3 + rng.normal(0, 0.02, len(x))
        law = fit_power_law("params", list(x), list(y))
        assert law is not None
        (exponent,) = law.exponents
        assert exponent.low is not None and exponent.high is not None
        held += exponent.low <= 0.3 <= exponent.high
    # 38 are expected; 33 or fewer would come with a chance of about 1 in 50.
    assert held >= 33


def test_a_joint_law_is_found_again_and_too_little_carries_none() -> None:
    rng = np.random.default_rng(1)
    params, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e10, 5)))
    y = 0.8 + (params / 3e7) ** -0.3 + 0.7 * (tokens / 3e8) ** -0.4 + rng.normal(0, 0.002, 25)
    law = fit_joint(("params", "tokens"), list(params), list(tokens), list(y))
    assert law is not None and not law.at_edge
    assert [e.mean for e in law.exponents] == pytest.approx([0.3, 0.4], rel=0.15)
    assert law.predict(1e8, 1e9) == pytest.approx(0.8 + (1 / 0.3) ** -0.3 + 0.7 * (1 / 0.3) ** -0.4, rel=0.01)
    assert fit_power_law("params", [1e6, 1e6, 1e9], [3.0, 2.0, 1.0]) is None
    assert fit_power_law("params", [1.0, 1.1, 1.2, 1.3], [3.0, 2.0, 1.0, 0.5]) is None
    assert fit_power_law("params", [1e6, 1e7, 1e8, 1e9], [1.0, 2.0, 3.0, 4.0]) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_frontier_is_what_nobody_beats(pairs: list[tuple[int, int]]) -> None:
    points = [Point(str(i), float(cost), {0: float(loss)}) for i, (cost, loss) in enumerate(pairs)]
    places = {place.name: place for place in frontier(points)}
    for i, (cost, loss) in enumerate(pairs):
        beaten = any(c <= cost and v < loss for c, v in pairs)
        assert places[str(i)].on_frontier != beaten


def test_being_off_the_frontier_is_decided_over_seeds() -> None:
    small = Point("small", 1.0, {0: 2.0, 1: 2.1, 2: 1.9})
    worse = Point("worse", 2.0, {0: 2.5, 1: 2.61, 2: 2.39})
    maybe = Point("maybe", 2.0, {0: 2.6, 1: 1.9, 2: 2.2})
    places = {place.name: place for place in frontier([small, worse, maybe])}
    assert places["worse"].by == "small" and places["worse"].decided
    assert places["maybe"].by == "small" and not places["maybe"].decided


def test_costs_come_from_the_same_model_or_from_its_kind(text: Path) -> None:
    one, wide = run(text, steps=10), run(text, steps=10, seed=1)
    timed = run(text, budget={"seconds": 60.0})
    other = run(text, steps=10, batch_size=8)
    assert Throughput([]).cost(one).basis == UNKNOWN
    record = {
        "id": "x", "status": "done", "environment": {"hardware": "GPU A"}, "model": {"flops_per_token": 1e4},
        "config": {"model": one.spec.model.to_dict(), "training": one.spec.training.to_dict()},
        "results": {"tokens_per_second": 64.0, "wall_seconds": 15.0, "seconds": 10.0},
    }  # fmt: skip
    throughput = Throughput([record, {**record, "environment": {"hardware": "GPU B"}}], "gpu a")
    assert throughput.hardware == "GPU A"
    # 10 steps of 4 x 16 tokens at 64 tok/s, and 5 s of overhead.
    assert throughput.cost(one).seconds == throughput.cost(wide).seconds == pytest.approx(15.0)
    assert throughput.cost(one).basis == MEASURED
    assert throughput.cost(timed) == type(throughput.cost(timed))(65.0, BY_BUDGET)
    assert throughput.cost(other).basis == BY_FLOPS


def test_summaries_are_the_records_without_their_curves(tmp_path: Path) -> None:
    store = Store(tmp_path)
    curve = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(5)]
    lines = [
        {"id": "a", "curve": curve, "heldout_curve": curve, "results": {"interval": [1, 2]}},
        {"id": "b", "heldout_curve": [], "curve": [], "reason": 'it says "curve":[ and ] here'},
        {"id": "c", "curve": None, "results": {"interval": [1, 2]}},
        {"id": "d", "curve": [[1, 2], [3]], "results": {"interval": [1, 2]}},
        {"id": "e", "results": {"interval": [1, 2]}},
    ]
    text = [json.dumps(line, separators=(",", ":")) for line in lines] + [
        json.dumps({**lines[0], "id": "f"}, indent=None)
    ]
    store.path.write_text("\n".join(text) + "\n")
    full, short = store.records(), store.summaries()
    assert [r["id"] for r in short] == list("abcdef")
    for record, summary in zip(full, short, strict=True):
        assert summary == {k: [] if k in ("curve", "heldout_curve") else v for k, v in record.items()}
