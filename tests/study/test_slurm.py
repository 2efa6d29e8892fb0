"""The SLURM launcher on submitit's local cluster, which runs jobs as processes of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scheduling import Quiet, run

from e88.errors import UserError
from e88.study.folder import read_json
from e88.study.scheduler import run_all
from e88.study.slurm import SlurmLauncher
from e88.study.store import Store

submitit = pytest.importorskip("submitit")
LOCAL = {"gpus_per_node": 0, "cpus_per_task": 1}


def test_runs_go_through_submitit_and_their_failures_too(text: Path, tmp_path: Path) -> None:
    runs = [run(text, "good"), run(text, "refused", backend="no-such-backend")]
    launcher = SlurmLauncher(tmp_path, most=1, options=LOCAL, cluster="local")
    records = run_all(runs, tmp_path, launcher, Quiet(), device="cpu")
    assert [records[r.id]["status"] for r in runs] == ["done", "failed"]
    assert len(Store(tmp_path).records()) == 2


def test_a_job_that_an_earlier_scheduler_left_is_taken_over(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    launcher = SlurmLauncher(tmp_path, options=LOCAL, cluster="local")
    planned = run(text)
    from e88.study.folder import RunFolder
    from e88.study.launchers import Job

    folder = RunFolder(tmp_path, planned.id)
    sent: list[str] = []

    class Queued:
        """A job in a queue that never gets to run."""

        def __init__(self, _folder: Any, job_id: str) -> None:
            self.job_id, self.state = job_id, "PENDING"

        def done(self) -> bool:
            return self.state == "CANCELLED"

        def result(self) -> int:
            raise launcher.uncompleted("cancelled")

    def submit(_function: Any, *arguments: Any) -> Queued:
        sent.append(str(arguments))
        return Queued(None, f"job-{len(sent)}")

    monkeypatch.setattr(launcher.executor, "submit", submit)
    monkeypatch.setattr(launcher, "job_type", Queued)
    first = launcher.start(Job(folder, "it"))
    assert first is not None and read_json(folder.path / "slurm.json") == {"job": "job-1"}
    second = launcher.start(Job(folder, "it"))
    assert second is not None and second.where == first.where and len(sent) == 1
    second.job.state = "CANCELLED"  # type: ignore[attr-defined]
    assert second.poll() == 1
    monkeypatch.setattr(launcher, "job_type", lambda *_: second.job)  # type: ignore[attr-defined]
    third = launcher.start(Job(folder, "it"))
    assert third is not None and third.where == "job job-2"


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="submitit cannot start"):
        SlurmLauncher(tmp_path, options={"partitoin": "gpu"}, cluster="local")
    with pytest.raises(UserError, match="srun|slurm"):
        SlurmLauncher(tmp_path)
