"""`e88 study`: plan, run, status, report and retry on a study of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e88.study.store import Store

SPEC = """
title = "A small study"
data = "{data}"
[training]
batch_size = 4
window = 16
heldout_bytes = 2000
lr = 1e-2
[scales.smoke]
seeds = 2
[budgets.data]
smoke = {{ steps = 3 }}
[models.a]
kind = "e88"
dim = 16
depth = 1
n_heads = 2
n_state = 8
[models.b]
kind = "e88"
dim = 16
depth = 2
n_heads = 2
n_state = 8
[models.broken]
kind = "e88"
dim = 16
depth = 1
n_heads = 2
n_state = 8
training = {{ backend = "no-such-backend" }}
[claims.deeper]
says = "two layers are better than one"
source = "a test"
lower = ["b", "a"]
[claims.bigger]
says = "two layers have more parameters"
source = "a test"
metric = "params"
higher = ["b", "a"]
"""


@pytest.fixture
def study(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SPEC.format(data=text))
    return path


def test_a_study_from_plan_to_verdicts(e88: Any, study: Path, tmp_path: Path) -> None:
    where = (study, "--out", tmp_path / "out")
    code, out, _ = e88("study", "plan", *where, "--json")
    assert code == 0
    plan = json.loads(out)["models"]
    assert [(row["model"], row["left"], row["basis"]) for row in plan] == [
        ("a", 2, "unknown"), ("b", 2, "unknown"), ("broken", 2, "unknown"),
    ]  # fmt: skip
    code, out, err = e88("study", "run", *where, "--device", "cpu", "--json")
    assert code == 1 and "no-such-backend" in err and "Traceback" not in err
    report = json.loads(out)
    assert report["ended"] == {"done": 4, "failed": 2}
    deeper, bigger = report["verdicts"]
    assert deeper["scale"] == "smoke" and deeper["seeds"] == 2
    assert bigger["outcome"] == "confirmed" and bigger["scale"] == "exact"
    assert "bigger" in (tmp_path / "out" / "study-smoke.md").read_text()

    code, out, _ = e88("study", "status", *where, "--json")
    assert [(row["name"], row["status"]) for row in json.loads(out)] == [
        ("a", "done"), ("b", "done"), ("broken", "failed"),
    ] * 2  # fmt: skip
    code, out, _ = e88("study", "plan", *where)
    assert code == 0 and "0 runs left" in out and "measured" in out
    size = Store(tmp_path / "out").path.stat().st_size
    code, out, _ = e88("study", "run", *where, "--device", "cpu", "--claim", "deeper")
    assert code == 0 and "deeper" in out and Store(tmp_path / "out").path.stat().st_size == size
    code, out, _ = e88("study", "report", *where)
    assert code == 0 and "4 done, 2 failed" in out


def test_wrong_use_is_one_line(e88: Any, study: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("plan", study, "--scale", "huge"), "unknown scale 'huge'"),
        (("plan", study, "--claim", "wider"), "unknown"),
        (("plan", tmp_path / "none.toml"), "cannot read"),
        (("run", study, "--launcher", "magic"), "unknown launcher"),
    ):
        code, _, err = e88("study", *arguments)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
