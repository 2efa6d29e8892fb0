"""Runs of a study that ask for several GPUs, or slots of the processor where there are none."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from scheduling import Quiet, alive, run, schedule

from e88.errors import UserError
from e88.study.design import parse_study
from e88.study.folder import RunFolder
from e88.study.launchers import Job, LocalLauncher, cpu_slots, gpu_slots, worker_command
from e88.study.store import Store


def test_a_run_over_two_slots_has_the_losses_of_one_and_is_recorded_once(text: Path, tmp_path: Path) -> None:
    together = [run(text, "ddp", gpus=2), run(text, "fsdp", gpus=2, parallel="fsdp", seed=1)]
    refused = run(text, "refused", gpus=2, parallel="fsdp", optimizer="muon")
    records = schedule([*together, refused], tmp_path / "two")
    alone = schedule([run(text, "one"), run(text, "one", seed=1)], tmp_path / "one")
    for planned in together:
        # The same run, and so the same id, however it is spread.
        one, two = alone[planned.id]["results"], records[planned.id]["results"]
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert two["heldout_bpb"] == pytest.approx(one["heldout_bpb"], rel=1e-5)
        parallel = records[planned.id]["environment"]["parallel"]
        assert parallel == {"world": 2, "mode": planned.parallel, "backend": "gloo"}
    assert records[refused.id]["status"] == "failed" and "muon needs whole matrices" in records[refused.id]["reason"]
    assert len(Store(tmp_path / "two").path.read_text().splitlines()) == 3


def test_a_rank_that_is_killed_costs_no_run(text: Path, tmp_path: Path) -> None:
    planned = run(text, "killed", steps=300, gpus=2, checkpoint_every=0.01)
    folder = RunFolder(tmp_path, planned.id)
    victims: list[int] = []

    class Killer(Quiet):
        def update(self, state: Any) -> None:
            for _, handle in state.running.values():
                if not victims and folder.checkpoint.exists():
                    victims.extend(children(handle.process.pid)[-1:])
                    os.kill(victims[0], signal.SIGKILL)

    view = Killer()
    record = schedule([planned], tmp_path, view)[planned.id]
    assert victims and record["status"] == "done" and record["results"]["steps"] == 300
    assert any("goes on from its checkpoint" in line for line in view.lines)


def test_killed_torchrun_takes_its_processes_along(text: Path, tmp_path: Path) -> None:
    planned = run(text, "doomed", steps=100_000, gpus=2, checkpoint_every=0.01)
    folder = RunFolder(tmp_path, planned.id)
    folder.write(
        "task.json",
        {"run": planned.spec.to_dict(), "device": "cpu", "parallel": "ddp", "keep_checkpoint": False, "replaces": None},
    )
    handle = LocalLauncher(cpu_slots(2), tmp_path).start(Job(folder, "doomed", gpus=2))
    assert handle is not None and handle.where == "cpu0+cpu1"
    deadline = time.monotonic() + 90
    while not folder.checkpoint.exists():
        assert time.monotonic() < deadline and handle.poll() is None, (folder.path / "worker.log").read_text()
        time.sleep(0.05)
    ranks = children(handle.process.pid)  # type: ignore[attr-defined]
    handle.kill()
    # The lock goes with the last of them, a moment after it is gone from the table of processes.
    while any(map(alive, ranks)) or folder.busy():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(ranks) == 2


def test_slots_are_taken_together_and_gpus_named_to_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    from e88.study import launchers

    started: list[tuple[list[str], str]] = []

    class Process:
        pid = 0

        def __init__(self, command: list[str], *, env: dict[str, str], pass_fds: list[int], **_: Any) -> None:
            started.append((command, env["CUDA_VISIBLE_DEVICES"]))
            self.locks = [os.dup(number) for number in pass_fds]

    monkeypatch.setattr(launchers.subprocess, "Popen", Process)
    launcher = LocalLauncher(gpu_slots(["0", "1", "5"]), tmp_path)
    jobs = [Job(RunFolder(tmp_path, name), name, gpus=gpus) for name, gpus in (("a", 2), ("b", 2), ("c", 1), ("d", 4))]
    for job in jobs:
        job.folder.path.mkdir(parents=True)
    first = launcher.start(jobs[0])
    assert first is not None and first.where == "gpu0+gpu1" and started[0][1] == "0,1"
    assert "--processes" in started[0][0] and started[0][0][: len(worker_command(jobs[0]))] == worker_command(jobs[0])
    # One GPU is left: none for a run that wants two, and it stays free for a run that wants one.
    assert launcher.start(jobs[1]) is None
    third = launcher.start(jobs[2])
    assert third is not None and started[1][1] == "5" and "--processes" not in started[1][0]
    with pytest.raises(UserError, match="d asks for 4 GPUs or slots; there are 3"):
        launcher.start(jobs[3])


def test_a_spec_says_how_its_runs_are_spread(text: Path) -> None:
    table = {
        "data": str(text),
        "scales": {"smoke": {"gpus": 2, "parallel": "fsdp"}},
        "budgets": {"run": {"smoke": {"steps": 2}}},
        "models": {"wide": {"preset": "tiny-e88"}, "small": {"preset": "tiny-e88", "dim": 96, "gpus": 1}},
    }
    planned = parse_study("s", table).at("smoke").planned
    assert [(run.gpus, run.parallel) for run in planned.values()] == [(2, "fsdp"), (1, "fsdp")]
    for key, value, message in (("gpus", 0, "positive integer"), ("parallel", "dp", "is not one of ddp, fsdp")):
        table["models"] = {"wide": {"preset": "tiny-e88", key: value}}
        with pytest.raises(UserError, match=message):
            assert parse_study("s", table).at("smoke").planned


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
