"""Runs as SLURM jobs, through submitit. The store must lie on a file system that all nodes share and that has flock."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from e88.errors import UserError
from e88.study.folder import RunFolder, read_json
from e88.study.launchers import Handle, Job, worker_command

# What a job asks for unless told otherwise, in submitit's names; GPUs and processors are for each GPU of a run.
DEFAULTS = {"gpus_per_node": 1, "cpus_per_task": 8, "timeout_min": 120}
# The exit code of a job that left no result.
LOST = 1
# How long the result of a job that has left the queue may take to be seen here.
RESULT_SECONDS = 10.0
JOB_FILE = "slurm.json"


class Queue:
    """This user's jobs as SLURM's queue has them, asked for at most every `seconds`.

    From squeue: many clusters, and every small one, keep no accounts for sacct to read.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.states: dict[str, str] | None = None
        self.asked = -float("inf")

    def state(self, job_id: str) -> str | None:
        """Such as `PENDING (Resources)` or `RUNNING node7`; "" of a job that is not in the queue, None where SLURM
        does not answer."""
        if time.monotonic() - self.asked >= self.seconds:
            self.asked = time.monotonic()
            self.states = _squeue()
        return None if self.states is None else self.states.get(job_id, "")

    def forget(self) -> None:
        """Ask anew next time."""
        self.asked = -float("inf")


def _squeue() -> dict[str, str] | None:
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%R"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return None
    rows = (line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2)
    return {job_id.strip(): f"{state} {where}".strip() for job_id, state, where in rows}


class SlurmLauncher:
    """One job for each run, at most `most` in the queue at a time.

    options: of the jobs, in submitit's names (timeout_min, mem_gb) or SLURM's (partition, account);
    `additional_parameters` is a table of whatever else sbatch takes. cluster: submitit's name of the kind of cluster;
    `local` starts processes here. Raises UserError where submitit or SLURM is missing, or an option is unknown.
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
        self.options = {**DEFAULTS, **(options or {})}
        try:
            self.executor = submitit.AutoExecutor(store.resolve() / "slurm", cluster=cluster)
            common = self.executor._valid_parameters()
            named = {key if key in common else f"slurm_{key}": value for key, value in self.options.items()}
            self.executor.update_parameters(name="e88", **named)
        except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
            raise UserError(f"submitit cannot start SLURM jobs: {str(error).splitlines()[0]}") from error
        self.uncompleted: type[Exception] = submitit.core.utils.UncompletedJobError
        self.job_type: Any = submitit.SlurmJob
        self.queue = Queue() if cluster == "slurm" else None
        self.handles: list[SlurmHandle] = []

    def start(self, job: Job) -> Handle | None:
        self.handles = [handle for handle in self.handles if handle.poll() is None]
        if len(self.handles) >= self.most:
            return None
        before = read_json(job.folder.path / JOB_FILE)
        state = self.queue.state(before["job"]) if self.queue and before else ""
        if state is None:
            return None
        left = self.job_type(self.executor.folder, before["job"]) if before and state else None
        # An earlier scheduler has it in the queue. One with a result has ended, whatever the queue still says of it.
        handle = self._handle(left) if left and not left.paths.result_pickle.exists() else self._submit(job)
        self.handles.append(handle)
        return handle

    def describe(self) -> str:
        return f"SLURM, at most {self.most} jobs in the queue"

    def _submit(self, job: Job) -> SlurmHandle:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        each, processors = self.options["gpus_per_node"], self.options["cpus_per_task"]
        self.executor.update_parameters(
            gpus_per_node=each * job.gpus,
            cpus_per_task=processors * job.gpus,
            # As on this machine, a GPU is alone enough by itself.
            slurm_exclusive=True if job.exclusive and not each else self.options.get("exclusive"),
        )
        try:
            sent = self.executor.submit(work, str(job.folder.store.resolve()), job.folder.id, job.gpus)
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"SLURM takes no job of {job.name}: {_last_line(error)}; see --slurm") from error
        job.folder.write(JOB_FILE, {"job": sent.job_id})
        if self.queue:
            self.queue.forget()
        return self._handle(sent)

    def _handle(self, sent: Any) -> SlurmHandle:
        queue = self.queue
        if queue is None:
            return SlurmHandle(sent, self.uncompleted, lambda: "" if sent.done() else sent.state)
        return SlurmHandle(sent, self.uncompleted, lambda: queue.state(sent.job_id))


class SlurmHandle:
    """A job in SLURM's queue or on a node. state: as `Queue.state`."""

    def __init__(self, job: Any, uncompleted: type[Exception], state: Callable[[], str | None]) -> None:
        self.job, self.uncompleted, self.state = job, uncompleted, state
        self.code: int | None = None
        self.gone: float | None = None

    @property
    def where(self) -> str:
        return f"job {self.job.job_id} {self.state() or ''}".strip()

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        if self.job.paths.result_pickle.exists():
            try:
                self.code = int(self.job.result())
            except self.uncompleted:
                self.code = LOST
        elif self.state() == "":
            self.gone = self.gone or time.monotonic()
            if time.monotonic() - self.gone > RESULT_SECONDS:
                self.code = LOST
        else:
            self.gone = None
        return self.code

    def stop(self) -> None:
        # SLURM sends SIGTERM, and SIGKILL where that has not helped in time.
        self.job.cancel(check=False)

    def kill(self) -> None:
        self.job.cancel(check=False)


def work(store: str, run_id: str, gpus: int) -> int:
    """What a job does: the run's worker, in the job's own process or through torchrun; returns its exit code."""
    from e88.study import worker

    os.environ["E88_SLOT"] = f"job {os.environ.get('SLURM_JOB_ID', os.getpid())}"
    folder = RunFolder(Path(store), run_id)
    if gpus > 1:
        process = subprocess.Popen(worker_command(Job(folder, run_id, gpus=gpus)))

        def stop(_number: int, _frame: object) -> None:
            process.terminate()

    else:

        def stop(_number: int, _frame: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    # SLURM's warning before the time limit or a preemption: stop with a checkpoint; the scheduler sends a new job.
    signal.signal(signal.SIGUSR2, stop)
    return process.wait() if gpus > 1 else worker.main(folder)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
