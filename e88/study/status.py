"""How far each run of a study is, from the store, the locks and the run folders. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from e88.study.folder import RUNS, RunFolder, read_json
from e88.study.plan import PlannedRun
from e88.study.slurm import JOB_FILE, Queue
from e88.study.store import Store

# In the order in which people ask for them.
STATUSES = ("running", "queued", "interrupted", "waiting", "failed", "diverged", "done")


@dataclass(frozen=True)
class RunStatus:
    """status: one of `STATUSES`; `interrupted` runs go on from a checkpoint. queue: the SLURM job of a run that is
    queued, with its state (a run whose lock is not seen from here may run). reason: of a failure or divergence.
    progress: what the worker last wrote, of a run that has begun and not ended (see `e88.study.worker.Heartbeat`)."""

    id: str
    name: str
    seed: int
    status: str
    reason: str = ""
    heldout_bpb: float | None = None
    progress: dict[str, Any] | None = None
    queue: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def statuses(runs: Sequence[PlannedRun], store: Path) -> list[RunStatus]:
    """The status of every run, in order."""
    known = {record["id"]: record for record in Store(store).summaries()}
    begun = set(os.listdir(store / RUNS)) if (store / RUNS).is_dir() else set()
    found, slurm = [], Queue()
    for run in runs:
        base = run.id, run.spec.name, run.spec.training.seed
        record = known.get(run.id)
        folder = RunFolder(store, run.id)
        # A run tried again has a record of its failure while it runs.
        if run.id in begun and (record is None or record["status"] != "done") and folder.busy():
            found.append(RunStatus(*base, "running", progress=folder.progress()))
        # What a search pruned a study does again.
        elif record is not None and record["status"] != "pruned":
            reason, bpb = str(record.get("reason") or ""), record["results"].get("heldout_bpb")
            found.append(RunStatus(*base, record["status"], reason, bpb))
        elif run.id in begun and (job := read_json(folder.path / JOB_FILE)) and (state := slurm.state(job["job"])):
            found.append(RunStatus(*base, "queued", progress=folder.progress(), queue=f"job {job['job']} {state}"))
        elif run.id in begun and folder.checkpoint.exists():
            found.append(RunStatus(*base, "interrupted", progress=folder.progress()))
        else:
            found.append(RunStatus(*base, "waiting"))
    return found
