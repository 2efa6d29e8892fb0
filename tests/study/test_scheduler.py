"""The scheduler under failures, divergence, kills and a second scheduler on the same store."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from scheduling import Quiet, alive, run, schedule, workers

from e88.data.corpus import open_corpus
from e88.study import warm
from e88.study.folder import RunFolder, try_lock
from e88.study.launchers import LOCKS, Job, LocalLauncher, cpu_slots
from e88.study.scheduler import KILLS
from e88.study.store import Store
from e88.training.loop import train

# Runs in a process that can be killed: `python -c SCRIPT TEXT OUT COUNT STEPS`.
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from scheduling import run, schedule
text, out, count, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
schedule([run(text, f"r{i}", steps=steps, seed=i, checkpoint_every=0.05) for i in range(count)], out)
"""


def command(text: Path, out: Path, count: int, steps: int) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(text), str(out), str(count), str(steps), str(Path(__file__).parent)]


def figures(record: dict[str, Any]) -> Any:
    """What a run on the CPU must reach exactly, however often it was killed."""
    results = record["results"]
    losses = [(point["step"], point["loss"]) for point in record["curve"]]
    points = [(point["step"], point["bpb"]) for point in record["heldout_curve"]]
    return record["status"], results["train_loss"], results["heldout_bpb"], results["steps"], losses, points


def test_failures_and_divergence_are_recorded_and_only_what_is_asked_for_runs_again(text: Path, tmp_path: Path) -> None:
    runs = [
        run(text, "good"),
        run(text, "wild", steps=400, lr=10.0, clip=0.0, warmup=0.0, weight_decay=10.0),
        run(text, "refused", backend="no-such-backend"),
        run(text, "alone", seed=1, exclusive=True),
        # The same run under another name is one run.
        run(text, "good again"),
    ]
    view, store = Quiet(), Store(tmp_path)
    records = schedule(runs, tmp_path, view)
    assert [records[r.id]["status"] for r in runs] == ["done", "diverged", "failed", "done", "done"]
    reason = records[runs[2].id]["reason"]
    assert "no-such-backend" in reason and "\n" not in reason and any(reason in line for line in view.lines)
    lines = store.path.read_text().splitlines()
    assert len(lines) == 4
    assert not RunFolder(tmp_path, runs[0].id).checkpoint.exists()
    assert (RunFolder(tmp_path, runs[1].id).path / "bad_step.safetensors").exists()

    assert schedule(runs, tmp_path) == records and store.path.read_text().splitlines() == lines
    again = schedule(runs, tmp_path, retry=("failed",))
    assert len(store.path.read_text().splitlines()) == 5
    assert again[runs[2].id]["status"] == "failed" and again[runs[2].id]["started"] > records[runs[2].id]["started"]
    again = schedule(runs, tmp_path, retry=("diverged",))
    assert len(store.path.read_text().splitlines()) == 6
    assert again[runs[1].id]["results"]["diverged_step"] == records[runs[1].id]["results"]["diverged_step"]


def test_a_worker_that_keeps_being_killed_fails_at_last_and_blocks_nobody(text: Path, tmp_path: Path) -> None:
    doomed, fine = run(text, "doomed", steps=100_000, checkpoint_every=0.0), run(text, "fine")
    killed = []

    class Killer(Quiet):
        def update(self, state: Any) -> None:
            for run_id, (_, handle) in state.running.items():
                if run_id == doomed.id and (RunFolder(tmp_path, doomed.id).path / "log.jsonl").exists():
                    handle.kill()
                    killed.append(handle)

    records = schedule([doomed, fine], tmp_path, Killer())
    assert records[fine.id]["status"] == "done"
    assert records[doomed.id]["status"] == "failed" and "SIGKILL" in records[doomed.id]["reason"]
    assert len(set(map(id, killed))) == KILLS
    assert Counter(r["id"] for r in map(json.loads, Store(tmp_path).path.read_text().splitlines()))[doomed.id] == 1


def test_a_killed_scheduler_leaves_no_orphan_and_loses_nothing(text: Path, tmp_path: Path, popen: Any) -> None:
    out = tmp_path / "out"
    process = popen(command(text, out, 1, 100_000))
    deadline = time.monotonic() + 60
    while not (found := list(out.glob("runs/*/checkpoint.safetensors"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (worker,) = workers(out)
    process.kill()
    process.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    from e88.training.checkpoint import load_tensors

    step = load_tensors(found[0])[1]["step"]
    assert step > 0
    lines = (found[0].parent / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[step - 1])["step"] == step
    assert not Store(out).records()


def test_kills_at_random_moments_end_with_the_records_of_an_undisturbed_study(
    text: Path, tmp_path: Path, popen: Any
) -> None:
    count, steps, out = 2, 400, tmp_path / "out"
    corpus = open_corpus(text)
    undisturbed = [
        train(run.spec.model, run.spec.training, corpus, tmp_path / run.id)
        for run in (run(text, steps=steps, seed=seed) for seed in range(count))
    ]
    wanted = {r["id"]: figures(r) for r in undisturbed}
    rng = random.Random(0)
    for _ in range(3):
        process = popen(command(text, out, count, steps))
        time.sleep(rng.uniform(0.5, 3))
        # The scheduler, with none, some or all of its workers.
        found = workers(out)
        process.kill()
        for worker in rng.sample(found, rng.randint(0, len(found))):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command(text, out, count, steps), timeout=120).returncode == 0
    lines = [json.loads(line) for line in Store(out).path.read_text().splitlines()]
    assert Counter(r["id"] for r in lines) == Counter(list(wanted))
    assert {r["id"]: figures(r) for r in lines} == wanted


def test_two_schedulers_on_one_store_share_the_work(text: Path, tmp_path: Path, popen: Any) -> None:
    out = tmp_path / "out"
    both = [popen(command(text, out, 4, 150)) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    lines = [json.loads(line) for line in Store(out).path.read_text().splitlines()]
    assert sorted(r["name"] for r in lines) == ["r0", "r1", "r2", "r3"]
    # Nobody trained what another trained: every step is in the log once.
    for folder in (out / "runs").iterdir():
        assert len((folder / "log.jsonl").read_text().splitlines()) == 150


def test_a_record_that_did_not_reach_the_store_is_put_there_and_not_run_again(text: Path, tmp_path: Path) -> None:
    one = run(text)
    before = schedule([one], tmp_path)[one.id]
    Store(tmp_path).path.unlink()
    log = (RunFolder(tmp_path, one.id).path / "log.jsonl").stat().st_mtime_ns
    assert schedule([one], tmp_path)[one.id] == before
    assert (RunFolder(tmp_path, one.id).path / "log.jsonl").stat().st_mtime_ns == log


def test_an_exclusive_run_waits_for_others_and_others_for_it(text: Path, tmp_path: Path) -> None:
    launcher = LocalLauncher(cpu_slots(2), tmp_path)
    plain, alone = (Job(RunFolder(tmp_path, name), name, name == "alone") for name in ("plain", "alone"))
    machine = tmp_path / LOCKS / launcher.host
    for job, shared in ((plain, False), (alone, True)):
        held = try_lock(machine, shared=shared)
        assert held is not None and launcher.start(job) is None
        held.close()
    with try_lock(machine, shared=True) as _, try_lock(tmp_path / LOCKS / f"{launcher.host}-cpu0") as _:  # type: ignore
        assert [slot.name for slot in launcher._take(1, False)[0]] == ["cpu1"] and launcher._take(2, False) == ([], [])


def test_a_run_whose_data_changed_is_refused(text: Path, tmp_path: Path) -> None:
    changing = tmp_path / "text.txt"
    changing.write_bytes(text.read_bytes())
    planned = run(changing)
    changing.write_bytes(text.read_bytes()[::-1])
    record = schedule([planned], tmp_path / "out")[planned.id]
    assert record["status"] == "failed" and "are not those of run" in record["reason"]


def test_a_killed_server_of_warm_workers_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it breaks off while a process is being made."""
    failures: list[Exception] = [EOFError("unexpected EOF"), BrokenPipeError()]

    def start(_process: Any) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(ForkServerProcess, "start", start)
    monkeypatch.setattr(warm, "PRELOADED", [])
    folder = RunFolder(tmp_path, "a")
    assert warm.start_warm(folder, "cpu0", 0, []) is not None and not failures
    failures += [EOFError()] * warm.TRIES
    with pytest.raises(EOFError):
        warm.start_warm(folder, "cpu0", 0, [])
