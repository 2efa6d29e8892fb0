"""One run in a process of its own: `python -m e88.study.worker STORE ID [--parent PID] [--processes N]`, as
STORE/runs/ID/task.json says. With N processes it becomes torchrun, whose processes run this module again.

The worker holds the run's lock from its first to its last moment, and whatever it ends with it puts into the store
itself. So a run is never done twice and never lost, whoever started the worker and whether or not they still live.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e88.study.folder import RunFolder, replace_file, wait_lock
from e88.study.spec import RunSpec
from e88.study.store import Record, Store
from e88.training.config import config_hash

if TYPE_CHECKING:
    from e88.training.distributed import Group

EXIT_FAILED, EXIT_DIVERGED, EXIT_BUSY, EXIT_INTERRUPTED = 1, 3, 75, 130
LOCK_SECONDS = 2.0
HEARTBEAT_SECONDS = 1.0
SMOOTH_STEPS = 20


class Heartbeat:
    """A training reporter that writes progress.json: host, pid, where, time, step, used (share of the budget), loss
    (mean of some steps, nats per token), tokens_per_second, seconds_left (of training), heldout (used and bpb of each
    evaluation). It ends the run where it finds a reason to (see `RunFolder.prune`)."""

    def __init__(self, folder: RunFolder, where: str) -> None:
        self.folder = folder
        self.path = folder.path / "progress.json"
        self.heldout: list[dict[str, float]] = []
        self.constant = {"host": socket.gethostname(), "pid": os.getpid(), "where": where}
        self.losses: deque[float] = deque(maxlen=SMOOTH_STEPS)
        self.rates: deque[float] = deque(maxlen=SMOOTH_STEPS)
        self.last = -HEARTBEAT_SECONDS
        self._write({})

    def step(self, entry: dict[str, Any], used: float, seconds_left: float) -> None:
        self.losses.append(entry["loss"])
        self.rates.append(entry["step_tokens"] / entry["step_seconds"])
        now = time.monotonic()
        if now - self.last < HEARTBEAT_SECONDS:
            return
        self.last = now
        if reason := self.folder.pruned():
            from e88.training.loop import Pruned

            raise Pruned(reason)
        self._write(
            {
                "step": entry["step"],
                "used": min(used, 1.0),
                "loss": sum(self.losses) / len(self.losses),
                "tokens_per_second": sum(self.rates) / len(self.rates),
                "seconds_left": seconds_left,
                "heldout": self.heldout,
            }
        )

    def evaluated(self, point: dict[str, Any], used: float) -> None:
        self.heldout.append({"used": used, "bpb": point["bpb"]})
        # With the next step, however soon that is.
        self.last = -HEARTBEAT_SECONDS

    def _write(self, values: dict[str, Any]) -> None:
        replace_file(self.path, json.dumps({**self.constant, "time": time.time(), **values}))


def main(folder: RunFolder, group: Group | None = None) -> int:
    """Do the run, or what is left of it; returns an exit code. group: of a run in several processes, to be called by
    the first; the others wait to be told whether there is anything to train."""
    lock = wait_lock(folder.path / ".lock", LOCK_SECONDS)
    if lock is None:
        _tell(group, trains=False)
        return EXIT_BUSY
    with lock:
        task = folder.task()
        if task is None:
            print(f"{folder.path} holds no task.json", file=sys.stderr)
            _tell(group, trains=False)
            return EXIT_FAILED
        record = folder.record()
        if record and not _is_replaced(record, task):
            # Killed after the run had ended: perhaps before its record reached the store.
            _tell(group, trains=False)
            _store_once(folder, record)
            if record["status"] in ("done", "pruned") and not task["keep_checkpoint"]:
                folder.checkpoint.unlink(missing_ok=True)
        else:
            if record:
                _set_aside(folder, record)
            _tell(group, trains=True)
            try:
                record = _run(folder, task, group)
            except KeyboardInterrupt:
                return EXIT_INTERRUPTED
            if record is None:
                return EXIT_INTERRUPTED
            Store(folder.store).append(record)
        return {"done": 0, "pruned": 0, "diverged": EXIT_DIVERGED}.get(record["status"], EXIT_FAILED)


def _tell(group: Group | None, *, trains: bool) -> None:
    if group is not None:
        group.shared(lambda: trains)


def in_group(folder: RunFolder) -> int:
    """What each of several processes does: the first as `main`, the others train along and leave records to it."""
    from e88.training.distributed import joined

    task = folder.task()
    assert task is not None, f"{folder.path} holds no task.json"
    with joined(task["device"], task["parallel"]) as group:
        if group.is_first:
            return main(folder, group)
        if group.shared(lambda: False):
            _run(folder, task, group)
        return 0


def _run(folder: RunFolder, task: dict[str, Any], group: Group | None) -> Record | None:
    """Train, resuming where a checkpoint lies; the record, also of a failure; None where interrupted."""
    from e88.data.corpus import open_corpus
    from e88.errors import UserError
    from e88.runtime import choose_device
    from e88.sizing.closed_form import describe
    from e88.training.distributed import Group, RanksLost
    from e88.training.loop import Interrupted, train
    from e88.training.record import failed

    spec = RunSpec.from_dict(task["run"])
    corpus = open_corpus(spec.data, tokenizer=spec.tokenizer)
    spec = spec.with_vocabulary(corpus.vocab_size)
    try:
        if config_hash(spec.model.to_dict(), spec.training.to_dict(), corpus.hash) != folder.id:
            raise UserError(f"the data {spec.data} are not those of run {folder.id}; give this machine the same data")
        group = group or Group(choose_device(task["device"]))
        heartbeat = Heartbeat(folder, os.environ.get("E88_SLOT", "")) if group.is_first else None
        return train(
            spec.model, spec.training, corpus, folder.path, name=spec.name, group=group, resume=True,
            reporter=heartbeat, on_evaluation=heartbeat.evaluated if heartbeat else None,
            keep_checkpoint=task["keep_checkpoint"],
        )  # fmt: skip
    except (Interrupted, RanksLost):
        return None
    except Exception as error:
        if group is not None and not group.is_first:
            if isinstance(error, UserError):
                return None
            raise
        (folder.path / "traceback.txt").write_text(traceback.format_exc())
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    size = describe(spec.model, window=spec.training.span)
    try:
        device = choose_device(task["device"])
    except UserError:
        device = choose_device("cpu")
    # Data that have changed give another id: this is the end of the run that was asked for.
    record = {**failed(spec.name, spec.model, spec.training, corpus, size, device, reason), "id": folder.id}
    folder.write("record.json", record)
    return record


def _is_replaced(record: Record, task: dict[str, Any]) -> bool:
    """Whether this record is the one that the task asks to replace (a retry); a later one is not."""
    return task["replaces"] is not None and record["started"] == task["replaces"]


def _set_aside(folder: RunFolder, record: Record) -> None:
    """Make room for another try. A diverged run starts afresh: from its checkpoint it would diverge again."""
    folder.prune(None)
    if record["status"] == "diverged":
        folder.checkpoint.unlink(missing_ok=True)
    (folder.path / "record.json").unlink()


def _store_once(folder: RunFolder, record: Record) -> None:
    store = Store(folder.store)
    known = {(r["id"], r["status"], r.get("started")) for r in store.summaries()}
    if (record["id"], record["status"], record.get("started")) not in known:
        store.append(record)


def end_with(parent: int, by: signal.Signals) -> None:
    """Have the kernel send a signal when the parent dies, so that a killed one leaves no orphan (Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, by)
        if os.getppid() != parent:
            sys.exit(EXIT_INTERRUPTED)


def _from_command_line() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("id")
    parser.add_argument("--parent", type=int)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    if given.parent:
        end_with(given.parent, signal.SIGTERM)
    if given.processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        module = ["-m", "e88.study.worker", str(given.store), given.id]
        os.execv(sys.executable, [*torchrun, str(given.processes), *module])
    folder = RunFolder(given.store, given.id)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return main(folder)
    # torchrun passes a stop on. Where it was killed itself, its slot is free at once and must be left at once.
    end_with(os.getppid(), signal.SIGKILL)
    return in_group(folder)


if __name__ == "__main__":
    sys.exit(_from_command_line())
