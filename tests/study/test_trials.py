"""Searches of seconds: what is told to Optuna, pruning, going on after a kill."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scheduling import Quiet, run, schedule, workers

from e88.errors import UserError
from e88.sizing.closed_form import count_params
from e88.study import worker
from e88.study.folder import RunFolder, replace_file
from e88.study.launchers import LocalLauncher, cpu_slots
from e88.study.scheduler import State, run_all
from e88.study.search import JOURNAL, Search, Space, lock_store, rows
from e88.study.spec import make_spec, to_toml
from e88.study.store import Store

optuna = pytest.importorskip("optuna")

SPACE = Space(depth=(1, 3), ratio=(0.5, 2.0), n_state=(8, 16), lr=(1e-3, 1e-1))


def search(text: Path, out: Path, trials: int = 3, space: Space = SPACE, **options: Any) -> Search:
    steps = options.pop("steps", 3)
    base = run(text, steps=steps, eval_points=2).spec
    return Search(base, 12_000, 0.05, space, out, trials=trials, **options)


def go(found: Search, out: Path, view: Any = None) -> None:
    run_all(
        [], out, LocalLauncher(cpu_slots(found.slots), out), view or Quiet(), device="cpu", feed=found.feed
    )  # fmt: skip


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_every_trial_is_a_run_of_the_count_and_the_best_is_the_lowest(sampler: str, text: Path, tmp_path: Path) -> None:
    found = search(text, tmp_path, sampler=sampler, slots=2)
    go(found, tmp_path)
    listed, records = rows(found), {r["id"]: r for r in Store(tmp_path).records()}
    assert len(listed) == len(found.ended()) == 3 and {row["run"] for row in listed} == set(records)
    for row in listed:
        record = records[row["run"]]
        assert abs(record["model"]["params"] - 12_000) <= 600 and record["model"]["params"] == row["params"]
        assert record["results"]["heldout_bpb"] == row["bpb"] and record["status"] == row["status"] == "done"
        config = record["config"]
        assert config["training"]["lr"] == row["lr"] and config["model"]["depth"] == row["depth"]
        assert len(record["heldout_curve"]) == 3
    best = found.best()
    assert best is not None and best.user_attrs["bpb"] == min(row["bpb"] for row in listed) == listed[0]["bpb"]
    assert best.value == best.user_attrs["bpb"]
    spec = found.spec(best.params, "best")
    assert spec is not None and count_params(spec.model) == best.user_attrs["params"]
    # As a file it is the same run, whose record is there.
    (tmp_path / "best.toml").write_text(to_toml(spec))
    again = make_spec(str(tmp_path / "best.toml"), {})
    assert again == spec
    # The same command has nothing left to do; more trials go on with others.
    size = Store(tmp_path).path.stat().st_size
    go(search(text, tmp_path, sampler=sampler), tmp_path)
    assert Store(tmp_path).path.stat().st_size == size
    go(search(text, tmp_path, trials=4, sampler=sampler), tmp_path)
    lrs = [row["lr"] for row in rows(search(text, tmp_path, trials=4))]
    assert len(lrs) == len(set(lrs)) == 4


class Fed:
    """What the scheduler does with a feed, without running anything: a trial ends as the test says."""

    def __init__(self, found: Search) -> None:
        self.found, self.state = found, State([])

    def next(self) -> str:
        (planned,) = self.found.feed(self.state)
        folder = RunFolder(self.found.store, planned.id)
        folder.path.mkdir(parents=True, exist_ok=True)
        self.state.running[planned.id] = None  # type: ignore[assignment]
        return planned.id

    def progress(self, run_id: str, *points: tuple[float, float]) -> None:
        heldout = [{"used": used, "bpb": bpb} for used, bpb in points]
        replace_file(RunFolder(self.found.store, run_id).path / "progress.json", json.dumps({"heldout": heldout}))

    def end(self, run_id: str, status: str, bpb: float | None = None) -> None:
        reason = None if status == "done" else f"it was {status}"
        record = {"id": run_id, "status": status, "reason": reason, "results": {"heldout_bpb": bpb}}
        RunFolder(self.found.store, run_id).write("record.json", record)
        self.state.ended[run_id] = status


def test_what_became_of_each_trial_is_told(text: Path, tmp_path: Path) -> None:
    found = search(text, tmp_path, trials=9)
    fed = Fed(found)
    for value in (5.0, 4.0, 4.5, 5.5):
        run_id = fed.next()
        fed.progress(run_id, (0.34, value + 1), (0.67, value + 0.5))
        assert found.feed(fed.state) == []
        assert RunFolder(tmp_path, run_id).pruned() is None
        fed.end(run_id, "done", value)
    # The medians of the four are 5.75 and 5.25.
    good = fed.next()
    fed.progress(good, (0.34, 5.7))
    found.feed(fed.state)
    assert RunFolder(tmp_path, good).pruned() is None
    fed.progress(good, (0.34, 5.7), (0.68, 5.3))
    found.feed(fed.state)
    reason = RunFolder(tmp_path, good).pruned()
    assert reason == "5.3000 bits per byte at 2/3 of the budget is above the median there"
    fed.end(good, "pruned")
    fed.end(fed.next(), "diverged")
    fed.end(fed.next(), "failed")
    fed.end(fed.next(), "done", 3.0)
    fed.next()
    told = {t.user_attrs["status"]: (t.state.name, t.value) for t in found.ended()[4:]}
    assert told == {
        "pruned": ("PRUNED", 5.3), "diverged": ("COMPLETE", math.inf), "failed": ("FAIL", None),
        "done": ("COMPLETE", 3.0),
    }  # fmt: skip
    listed = rows(found)
    assert [row["status"] for row in listed] == ["done"] * 5 + ["running", "pruned", "diverged", "failed"]
    assert listed[0]["bpb"] == 3.0 and found.best().value == 3.0  # type: ignore[union-attr]


def test_without_pruning_none_is_asked_for(text: Path, tmp_path: Path) -> None:
    found = search(text, tmp_path, trials=6, prune=False)
    fed = Fed(found)
    for value in (5.0, 4.0, 4.5, 5.5, 9.0):
        run_id = fed.next()
        fed.progress(run_id, (0.34, value))
        found.feed(fed.state)
        assert RunFolder(tmp_path, run_id).pruned() is None
        fed.end(run_id, "done", value)


def test_a_worker_that_is_asked_to_prunes_its_run_and_says_why(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = run(text, steps=50, eval_points=1)
    folder = RunFolder(tmp_path, planned.id)
    task = {"run": planned.spec.to_dict(), "device": "cpu", "keep_checkpoint": False, "replaces": None}
    folder.path.mkdir(parents=True)
    folder.write("task.json", task)
    evaluated = worker.Heartbeat.evaluated

    def ask(self: Any, point: dict[str, Any], used: float) -> None:
        evaluated(self, point, used)
        folder.prune("it is no good")

    monkeypatch.setattr(worker.Heartbeat, "evaluated", ask)
    assert worker.main(folder) == 0
    (record,) = Store(tmp_path).records()
    assert record["status"] == "pruned" and record["reason"] == "it is no good"
    assert record["results"]["heldout_bpb"] is None and record["results"]["diverged_step"] is None
    (point,) = record["heldout_curve"]
    assert 25 <= point["step"] <= record["results"]["steps"] < 50
    assert not folder.checkpoint.exists()
    # A study that wants the run does it whole.
    monkeypatch.setattr(worker.Heartbeat, "evaluated", evaluated)
    done = schedule([planned], tmp_path)[planned.id]
    assert done["status"] == "done" and done["results"]["steps"] == 50


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_trials import go, search
out = Path(sys.argv[2])
go(search(Path(sys.argv[1]), out, trials=4, steps=300), out)
"""


def test_a_killed_search_goes_on_with_the_trials_it_had_begun(text: Path, tmp_path: Path, popen: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(text), str(out), str(Path(__file__).parent)]
    for _ in range(2):
        before = len(Store(out).records())
        process = popen(command)
        deadline = time.monotonic() + 60
        while len(Store(out).records()) == before or not workers(out):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    # A line torn by a kill costs itself alone.
    with open(out / JOURNAL, "ab") as journal:
        journal.write(b'{"op_code": 4, "wor')
    go(found := search(text, out, trials=4, steps=300), out)
    records = Store(out).records()
    assert len(found.ended()) == 4
    assert {t.user_attrs["run"] for t in found.ended()} == {r["id"] for r in records}
    lines = [json.loads(line)["id"] for line in Store(out).path.read_text().splitlines()]
    assert len(lines) == len(set(lines)) == len(records)
    assert not [row for row in rows(found) if row["status"] == "running"]


def test_wrong_use_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search(text, tmp_path)
    for options, message in (
        ({"space": replace(SPACE, lr=(1e-3, 1e-2))}, "a search with other options"),
        ({"steps": 4}, "a search with other options"),
        ({"sampler": "grid"}, "unknown sampler"),
    ):
        with pytest.raises(UserError, match=message):
            search(text, tmp_path, **options)  # type: ignore[arg-type]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no shape within"):
        search(text, tmp_path / "none", space=replace(SPACE, depth=(100, 120))).feed(State([]))
    with lock_store(tmp_path), pytest.raises(UserError, match="another search"):
        lock_store(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for sampler, package in (("tpe", "optuna"), ("cmaes", "optuna")):
        with pytest.raises(UserError, match=rf"needs the {package} package; pip install 'e88\[search\]'"):
            search(text, tmp_path, sampler=sampler)
    assert os.listdir(tmp_path / "none") == [JOURNAL]
