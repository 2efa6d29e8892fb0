"""Running a list of runs one after the other, each in a process of its own, into one store.

A run that fails, diverges or is killed is recorded and does not stop the others. What is done is never run again;
what was cut off goes on from its checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from e88.data.corpus import Corpus, open_corpus
from e88.errors import UserError
from e88.runtime import choose_device
from e88.sizing.closed_form import describe
from e88.study.spec import RunSpec
from e88.study.store import Store
from e88.study.worker import EXIT_INTERRUPTED
from e88.training.loop import Interrupted
from e88.training.record import config_hash, failed, write_json

FINISHED = ("done", "diverged")


class Announcer(Protocol):
    """Whoever tells the user what the runner does."""

    def message(self, text: str) -> None: ...


def run_all(specs: list[RunSpec], out: Path, *, device: str, announcer: Announcer) -> list[dict[str, Any]]:
    """Run every spec that the store under `out` does not hold yet; returns the records of all, in order.

    Raises UserError where the data cannot be opened, `out` cannot be written or another process works there, and
    Interrupted when stopped by a signal.
    """
    store = Store(out)
    with _lock(out) as lock:
        corpora = {(s.data, s.tokenizer): open_corpus(s.data, tokenizer=s.tokenizer) for s in specs}
        # Nobody else writes while the lock is held, so that one reading is enough.
        before = {record["id"]: record for record in store.records()}
        records = []
        for number, spec in enumerate(specs, 1):
            corpus = corpora[spec.data, spec.tokenizer]
            spec = spec.with_vocabulary(corpus.vocab_size)
            run_id = config_hash(spec.model.to_dict(), spec.training.to_dict(), corpus.hash)
            title = f"[{number}/{len(specs)}] {spec.name}, seed {spec.training.seed}"
            known = before.get(run_id)
            if known and known["status"] in FINISHED:
                announcer.message(f"{title}: {known['status']} before, kept")
                records.append(known)
                continue
            announcer.message(title)
            folder = out / "runs" / f"{spec.name}-s{spec.training.seed}-{run_id}"
            record = _run(spec, corpus, folder, device, lock)
            store.append(record)
            before[run_id] = record
            records.append(record)
            if record["status"] != "done":
                announcer.message(f"{title}: {record['status']}: {record['reason']}")
        return records


def _run(spec: RunSpec, corpus: Corpus, folder: Path, device: str, lock: IO[str]) -> dict[str, Any]:
    """Run one spec in a process of its own and return its record."""
    finished = _read_record(folder)
    if finished is None:
        write_json(folder / "spec.json", {**spec.to_dict(), "device": device})
        (folder / "error.txt").unlink(missing_ok=True)
        # The worker inherits the lock: as long as either lives, nobody else works in this folder.
        command = [sys.executable, "-m", "e88.study.worker", str(folder)]
        worker = subprocess.Popen(command, pass_fds=[lock.fileno()], start_new_session=True)
        code = _wait(worker)
        finished = _read_record(folder)
        if finished is None:
            size = describe(spec.model, window=spec.training.window)
            where = choose_device(device)
            return failed(spec.name, spec.model, spec.training, corpus, size, where, _reason(folder, code))
    return finished


def _wait(worker: subprocess.Popen[bytes]) -> int:
    """Wait for a worker. It has a session of its own, so that a Ctrl-C reaches it once, through us; the first makes it
    stop at the next step with a checkpoint, a second one at once."""

    def forward(number: int, _frame: object) -> None:
        worker.send_signal(signal.SIGTERM if number == signal.SIGTERM else signal.SIGINT)
        stopped.append(number)

    stopped: list[int] = []
    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = worker.wait()
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
    if stopped or code == EXIT_INTERRUPTED:
        raise Interrupted("stopped; the same command goes on from here")
    return code


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record


def _reason(folder: Path, code: int) -> str:
    """One line on why a worker ended without a record."""
    try:
        text = (folder / "error.txt").read_text().strip()
    except OSError:
        text = ""
    if text:
        return text.splitlines()[-1]
    if code < 0:
        name = signal.Signals(-code).name
        return f"the process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the process ended with exit code {code}"


@contextmanager
def _lock(out: Path) -> Iterator[IO[str]]:
    """Hold `out` for this process and its workers; UserError where another holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another e88 process works in {out}; wait for it, or choose another --out") from error
        yield file
