"""Runs as SLURM jobs: on a real SLURM of one node where it can be started, else on submitit's local cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
from scheduling import Quiet, run

from e88.errors import UserError
from e88.study import slurm
from e88.study.folder import RunFolder, read_json
from e88.study.launchers import Job
from e88.study.plan import PlannedRun
from e88.study.scheduler import run_all
from e88.study.slurm import Queue, SlurmLauncher
from e88.study.status import statuses
from e88.study.store import Store
from e88.training.checkpoint import load_tensors

submitit = pytest.importorskip("submitit")
SMALL = {"gpus_per_node": 0, "cpus_per_task": 1, "timeout_min": 5}


@pytest.fixture(scope="module")
def real(tmp_path_factory: Any) -> Any:
    """A SLURM that runs while this module's tests do."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with (
        slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as configuration,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SLURM_CONF", str(configuration))
        patch.setattr(slurm, "RESULT_SECONDS", 2.0)
        yield configuration


def launcher(store: Path, **options: Any) -> SlurmLauncher:
    found = SlurmLauncher(store, options={**SMALL, **options})
    assert found.queue is not None
    found.queue.seconds = 0.5
    return found


def prepare(planned: PlannedRun, store: Path) -> Job:
    folder = RunFolder(store, planned.id)
    task = {
        "run": planned.spec.to_dict(),
        "device": "cpu",
        "parallel": "ddp",
        "keep_checkpoint": False,
        "replaces": None,
    }
    folder.write("task.json", task)
    return Job(folder, planned.title)


def wait(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_runs_are_jobs_and_several_gpus_are_torchrun(real: Any, text: Path, tmp_path: Path) -> None:
    runs = [run(text, "good"), run(text, "refused", backend="no-such-backend"), run(text, "two", seed=1, gpus=2)]
    records = run_all(runs, tmp_path, launcher(tmp_path, partition="debug"), Quiet(), device="cpu")
    assert [records[r.id]["status"] for r in runs] == ["done", "failed", "done"]
    assert records[runs[2].id]["environment"]["parallel"] == {"world": 2, "mode": "ddp", "backend": "gloo"}
    assert len(Store(tmp_path).records()) == 3


def test_a_job_in_the_queue_is_seen_taken_over_and_found_lost(real: Any, text: Path, tmp_path: Path) -> None:
    planned = run(text)
    job = prepare(planned, tmp_path)
    # Held back, as behind others' jobs.
    first = launcher(tmp_path, additional_parameters={"hold": True}).start(job)
    assert first is not None
    number = read_json(job.folder.path / "slurm.json")["job"]  # type: ignore[index]
    (row,) = statuses([planned], tmp_path)
    assert row.status == "queued" and row.queue == f"job {number} PENDING (JobHeldUser)" == first.where
    later = launcher(tmp_path)
    second = later.start(job)
    assert second is not None and second.where == first.where and second.poll() is None
    subprocess.run(["scancel", number], check=True)
    wait(lambda: second.poll() is not None)
    assert second.poll() == slurm.LOST and statuses([planned], tmp_path)[0].status == "waiting"
    third = later.start(job)
    assert third is not None and read_json(job.folder.path / "slurm.json")["job"] != number  # type: ignore[index]
    wait(lambda: third.poll() is not None)
    assert third.poll() == 0 and Store(tmp_path).records()[0]["status"] == "done"


def test_a_job_that_is_cut_off_goes_on_from_its_checkpoint(real: Any, text: Path, tmp_path: Path) -> None:
    planned = run(text, steps=4000, checkpoint_every=0.2)
    folder = RunFolder(tmp_path, planned.id)
    # The warning before a time limit or a preemption, a user, and a node that failed.
    ends = [["scancel", "--signal=USR2"], ["scancel"], ["scontrol", "requeue"]]
    cut: dict[str, int] = {}

    class Cutter(Quiet):
        def update(self, state: Any) -> None:
            number = (read_json(folder.path / "slurm.json") or {"job": ""})["job"]
            if len(cut) == len(ends) or number in cut or not folder.checkpoint.exists():
                return
            step = load_tensors(folder.path)[1]["step"]
            if step > max(cut.values(), default=0):
                subprocess.run([*ends[len(cut)], number], check=True)
                cut[number] = step

    record = run_all([planned], tmp_path, launcher(tmp_path), Cutter(), device="cpu")[planned.id]
    assert record["status"] == "done", record["reason"]
    assert len(cut) == len(ends) and 0 < min(cut.values()) and record["results"]["steps"] == 4000
    assert len(Store(tmp_path).path.read_text().splitlines()) == 1
    steps = [json.loads(line)["step"] for line in (folder.path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 4001))


def test_a_killed_scheduler_loses_no_job(real: Any, text: Path, tmp_path: Path) -> None:
    spec = tmp_path / "study.toml"
    spec.write_text(
        f"data = '{text}'\n[slurm]\npartition = 'debug'\ncpus_per_task = 1\ntimeout_min = 5\n"
        "[training]\nbatch_size = 4\nwindow = 16\nheldout_bytes = 2000\ncheckpoint_every = 0.2\n"
        "[scales.smoke]\n[budgets.run]\nsmoke = {steps = 1500}\n"
        "[models.a]\nkind = 'e88'\ndim = 16\ndepth = 2\nn_heads = 2\nn_state = 8\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "e88", "study", "run", str(spec), "--launcher", "slurm", "--device", "cpu",
               "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait(lambda: list(out.glob("runs/*/checkpoint.safetensors")))
    process.kill()
    process.wait()
    jobs = set(out.glob("slurm/*_submission.sh"))
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    # The job went on without its scheduler, and the next one took it over.
    assert set(out.glob("slurm/*_submission.sh")) == jobs and len(jobs) == 1
    assert len(Store(out).path.read_text().splitlines()) == 1


def test_what_slurm_refuses_is_a_one_line_error(real: Any, text: Path, tmp_path: Path) -> None:
    job = prepare(run(text), tmp_path)
    with pytest.raises(UserError, match="Invalid partition") as caught:
        launcher(tmp_path, partition="nowhere").start(job)
    assert "\n" not in str(caught.value)


def test_runs_go_through_submitit_on_its_local_cluster(text: Path, tmp_path: Path) -> None:
    runs = [run(text, "good"), run(text, "refused", backend="no-such-backend")]
    local = SlurmLauncher(tmp_path, most=1, options=SMALL, cluster="local")
    records = run_all(runs, tmp_path, local, Quiet(), device="cpu")
    assert [records[r.id]["status"] for r in runs] == ["done", "failed"]
    assert len(Store(tmp_path).records()) == 2


def test_a_queue_that_does_not_answer_says_nothing_of_a_job(tmp_path: Path, monkeypatch: Any) -> None:
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\necho '7|PENDING|(Priority)'\necho '8|RUNNING|node3'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    queue = Queue(seconds=0)
    assert [queue.state(job) for job in ("7", "8", "9")] == ["PENDING (Priority)", "RUNNING node3", ""]
    program.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    assert queue.state("7") is None
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.state("9") is None


def test_wrong_options_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="submitit cannot start"):
        SlurmLauncher(tmp_path, options={"partitoin": "gpu"}, cluster="local")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="srun|slurm"):
        SlurmLauncher(tmp_path)
