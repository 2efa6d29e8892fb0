"""Runs as SLURM jobs, through submitit. The store must lie on a file system that all nodes share and that has flock."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e88.errors import UserError
from e88.study.folder import RunFolder, read_json
from e88.study.launchers import Handle, Job

# What a job asks for unless told otherwise, in submitit's names.
DEFAULTS = {"gpus_per_node": 1, "cpus_per_task": 8, "timeout_min": 120}
ACTIVE = ("PENDING", "REQUEUED", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")
# The exit code of a job of which SLURM knows no result.
LOST = 1


class SlurmLauncher:
    """One job for each run, at most `most` in the queue at a time.

    options: of the jobs, in submitit's names (timeout_min, mem_gb) or SLURM's (partition, account). cluster: submitit's
    name of the kind of cluster; `local` starts processes here. Raises UserError where submitit or SLURM is missing, or
    an option is unknown.
    """

    def __init__(
        self, store: Path, *, most: int = 64, options: Mapping[str, Any] | None = None, cluster: str = "slurm"
    ) -> None:
        try:
            import submitit
        except ModuleNotFoundError as error:
            if error.name != "submitit":
                raise
            raise UserError("--launcher slurm needs submitit; pip install 'e88[cluster]'") from error
        self.most = most
        try:
            self.executor = submitit.AutoExecutor(store.resolve() / "slurm", cluster=cluster)
            common = self.executor._valid_parameters()
            values = {**DEFAULTS, **(options or {})}
            named = {key if key in common else f"slurm_{key}": value for key, value in values.items()}
            self.executor.update_parameters(name="e88", **named)
        except (RuntimeError, NameError, AssertionError, ValueError) as error:
            raise UserError(f"submitit cannot start SLURM jobs: {str(error).splitlines()[0]}") from error
        self.uncompleted: type[Exception] = submitit.core.utils.UncompletedJobError
        self.job_type: Any = submitit.SlurmJob
        self.handles: list[SlurmHandle] = []

    def start(self, job: Job) -> Handle | None:
        self.handles = [handle for handle in self.handles if handle.poll() is None]
        if len(self.handles) >= self.most:
            return None
        handle = self._left_behind(job.folder) or self._submit(job.folder)
        self.handles.append(handle)
        return handle

    def describe(self) -> str:
        return f"SLURM, at most {self.most} jobs in the queue"

    def _left_behind(self, folder: RunFolder) -> SlurmHandle | None:
        """The job that an earlier scheduler has in the queue for this run."""
        before = read_json(folder.path / "slurm.json")
        if before is None:
            return None
        job = self.job_type(self.executor.folder, before["job"])
        return SlurmHandle(job, self.uncompleted) if job.state in ACTIVE else None

    def _submit(self, folder: RunFolder) -> SlurmHandle:
        job = self.executor.submit(work, str(folder.store.resolve()), folder.id)
        folder.write("slurm.json", {"job": job.job_id})
        return SlurmHandle(job, self.uncompleted)


class SlurmHandle:
    """A job in SLURM's queue or on a node."""

    def __init__(self, job: Any, uncompleted: type[Exception]) -> None:
        self.job, self.uncompleted = job, uncompleted
        self.where = f"job {job.job_id}"
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None and self.job.done():
            try:
                self.code = int(self.job.result())
            except self.uncompleted:
                self.code = LOST
        return self.code

    def stop(self) -> None:
        # SLURM sends SIGTERM, and SIGKILL where that has not helped in time.
        self.job.cancel(check=False)

    def kill(self) -> None:
        self.job.cancel(check=False)


def work(store: str, run_id: str) -> int:
    """What a job does: the run's worker, in the job's own process; returns its exit code."""
    from e88.study import worker

    def stop(_number: int, _frame: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    # SLURM's warning before the time limit or a preemption: stop with a checkpoint; the scheduler sends a new job.
    signal.signal(signal.SIGUSR2, stop)
    os.environ["E88_SLOT"] = f"job {os.environ.get('SLURM_JOB_ID', os.getpid())}"
    return worker.main(RunFolder(Path(store), run_id))
