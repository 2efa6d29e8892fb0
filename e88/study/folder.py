"""The folder of one run, and the locks that keep two processes from doing the same work.

Every lock here is an flock, which the kernel drops when its last holder dies: a kill leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from e88.errors import UserError
from e88.files import write_text

RUNS = "runs"


class RunFolder:
    """`store`/runs/`id`: task.json (what to do), log, checkpoint, progress.json (how far), record.json (the end)."""

    def __init__(self, store: Path, run_id: str) -> None:
        self.store, self.id = store, run_id
        self.path = store / RUNS / run_id

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    def task(self) -> dict[str, Any] | None:
        return read_json(self.path / "task.json")

    def record(self) -> dict[str, Any] | None:
        """The record with which the run ended; None while it has not."""
        return read_json(self.path / "record.json")

    def progress(self) -> dict[str, Any] | None:
        """What the worker last said of itself (see `e88.study.worker.Heartbeat`)."""
        return read_json(self.path / "progress.json")

    def prune(self, reason: str | None) -> None:
        """Ask the worker to end the run early for a reason of one line; None takes that back."""
        if reason is None:
            (self.path / "prune.json").unlink(missing_ok=True)
        else:
            self.write("prune.json", {"reason": reason})

    def pruned(self) -> str | None:
        """Why the run is to end early; None where it is not."""
        asked = read_json(self.path / "prune.json")
        return asked["reason"] if asked else None

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of the JSON files, whole or not at all."""
        write_text(self.path / name, json.dumps(value, indent=1) + "\n")

    def mark(self) -> int:
        """A number that changes whenever the run has got further."""
        try:
            return self.checkpoint.stat().st_mtime_ns
        except OSError:
            return 0

    def lock(self) -> IO[str] | None:
        """The right to work on this run, held until the file is closed; None where another process has it."""
        return try_lock(self.path / ".lock")

    def busy(self) -> bool:
        """Whether a process works on this run."""
        if not (self.path / ".lock").exists():
            return False
        # Shared, so that two who look do not take each other for a worker.
        lock = try_lock(self.path / ".lock", shared=True)
        if lock:
            lock.close()
        return lock is None


def try_lock(path: Path, *, shared: bool = False) -> IO[str] | None:
    """An open file with an flock on it, exclusive or shared; None where another holder is in the way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another --out") from error
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def wait_lock(path: Path, seconds: float) -> IO[str] | None:
    """As `try_lock`, trying for some seconds: a look at a lock (`RunFolder.busy`) holds it for a moment."""
    deadline = time.monotonic() + seconds
    while (lock := try_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return lock


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where the file is missing or torn."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def replace_file(path: Path, text: str) -> None:
    """Write a small file whole, without waiting for the disk: for what only the living read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
