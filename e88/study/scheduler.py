"""The loop that feeds a launcher with runs until every run has a record. It keeps no state of its own.

Whether a run is finished stands in the store, whether somebody works on it in its lock, and how far it came in its
checkpoint. So a scheduler can be killed at any moment and started again, and two on one store share the work.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from e88.study.folder import RunFolder
from e88.study.launchers import Handle, Job, Launcher
from e88.study.plan import PlannedRun
from e88.study.store import Record, Store
from e88.study.worker import EXIT_BUSY

FINISHED = ("done", "diverged", "failed")
# How often a worker may be killed without having got further before its run counts as failed.
KILLS = 3
POLL_SECONDS = 0.1


class Interrupted(Exception):
    """A stop was asked for; workers have stopped with their checkpoints, and the same command goes on."""


@dataclass
class State:
    """What a view shows. waiting, elsewhere (in the hands of another scheduler): counts. ended: statuses by run id, of
    this call and before."""

    runs: list[PlannedRun]
    ended: dict[str, str] = field(default_factory=dict)
    running: dict[str, tuple[Job, Handle]] = field(default_factory=dict)
    waiting: int = 0
    elsewhere: int = 0


class View(Protocol):
    """Whoever shows the user what happens."""

    def update(self, state: State) -> None:
        """Called some times a second."""

    def message(self, text: str) -> None:
        """A line that stays."""


def run_all(
    runs: Sequence[PlannedRun],
    store: Path,
    launcher: Launcher,
    view: View,
    *,
    device: str = "auto",
    retry: Sequence[str] = (),
    keep_checkpoints: bool = False,
    feed: Callable[[State], Sequence[PlannedRun]] | None = None,
) -> dict[str, Record]:
    """Run what has no record yet; returns the records of all, by run id, without their curves.

    retry: statuses (`failed`, `diverged`) whose runs are done again. A run that fails or diverges is recorded with the
    reason and does not stop the others; a worker that is killed goes on from its checkpoint. A run that a search pruned
    is done again. feed: asked at every turn for further runs, which have no record; the end is when it has none and
    nothing runs. Raises UserError where `store` cannot be written, and Interrupted when stopped by SIGINT or SIGTERM.
    """
    assert set(retry) <= set(FINISHED)
    return _Scheduler(runs, store, launcher, view, device, keep_checkpoints, feed).run((*retry, "pruned"))


class _Scheduler:
    def __init__(
        self, runs: Sequence[PlannedRun], store: Path, launcher: Launcher, view: View, device: str, keep: bool,
        feed: Callable[[State], Sequence[PlannedRun]] | None,
    ) -> None:  # fmt: skip
        self.store, self.launcher, self.view = store, launcher, view
        self.device, self.keep = device, keep
        self.runs = {run.id: run for run in runs}
        self.state = State(list(runs))
        self.feed = feed
        self.elsewhere: list[PlannedRun] = []
        self.waiting: deque[PlannedRun] = deque()
        self.replaces: dict[str, str] = {}
        # Run id -> (how far it was when last killed, how often it was killed there).
        self.kills: dict[str, tuple[int, int]] = {}

    def run(self, retry: Sequence[str]) -> dict[str, Record]:
        known = {record["id"]: record for record in Store(self.store).summaries()}
        for run in self.runs.values():
            record = known.get(run.id)
            if record is None or record["status"] in retry:
                self.waiting.append(run)
            else:
                self.state.ended[run.id] = record["status"]
            if record is not None and record["status"] in retry:
                self.replaces[run.id] = record.get("started") or ""
        # Runs alone on the machine come last, so that they do not keep it half empty in between.
        self.waiting = deque(sorted(self.waiting, key=lambda run: run.exclusive))
        with _stop_requests() as stops:
            while self._take_in() or self.waiting or self.elsewhere or self.state.running:
                if stops:
                    self._stop(stops)
                self._start()
                self.state.waiting, self.state.elsewhere = len(self.waiting), len(self.elsewhere)
                self.view.update(self.state)
                time.sleep(POLL_SECONDS)
                self._collect()
        return {r["id"]: r for r in Store(self.store).summaries() if r["id"] in self.runs}

    def _take_in(self) -> bool:
        """Take further runs from the feed; whether there were any."""
        new = self.feed(self.state) if self.feed else ()
        for run in new:
            self.runs[run.id] = run
            self.state.runs.append(run)
            self.waiting.append(run)
        return bool(new)

    def _folder(self, run: PlannedRun) -> RunFolder:
        return RunFolder(self.store, run.id)

    def _start(self) -> None:
        while self.waiting:
            run = self.waiting[0]
            folder = self._folder(run)
            if folder.busy():
                self.elsewhere.append(self.waiting.popleft())
                continue
            task = {
                "run": run.spec.to_dict(), "device": self.device, "parallel": run.parallel,
                "keep_checkpoint": self.keep, "replaces": self.replaces.get(run.id),
            }  # fmt: skip
            if folder.task() != task:
                folder.write("task.json", task)
            job = Job(folder, run.title, run.exclusive, run.gpus, more=len(self.waiting) > 1)
            handle = self.launcher.start(job)
            if handle is None:
                return
            self.state.running[run.id] = (job, handle)
            self.waiting.popleft()

    def _collect(self) -> None:
        """Take note of the workers that have ended, here and elsewhere."""
        for run_id, (job, handle) in list(self.state.running.items()):
            code = handle.poll()
            if code is not None:
                del self.state.running[run_id]
                self._ended(self.runs[run_id], job.folder, code)
        for run in list(self.elsewhere):
            folder = self._folder(run)
            if not folder.busy():
                self.elsewhere.remove(run)
                self._ended(run, folder, EXIT_BUSY)

    def _ended(self, run: PlannedRun, folder: RunFolder, code: int) -> None:
        record = folder.record()
        if record is not None and record["started"] != self.replaces.get(run.id):
            self._note(run, record)
        elif code == EXIT_BUSY:
            self.waiting.append(run)
        elif self._is_stuck(run, folder):
            self._give_up(run, folder, code)
        else:
            self.view.message(f"{run.title}: the worker ended with code {code}; it goes on from its checkpoint")
            self.waiting.appendleft(run)

    def _note(self, run: PlannedRun, record: Record) -> None:
        self.state.ended[run.id] = record["status"]
        if record["status"] != "done":
            self.view.message(f"{run.title}: {record['status']}: {record['reason']}")

    def _is_stuck(self, run: PlannedRun, folder: RunFolder) -> bool:
        """Whether a run was killed too often without getting further."""
        mark = folder.mark()
        before, count = self.kills.get(run.id, (mark, 0))
        self.kills[run.id] = (mark, count + 1 if before == mark else 1)
        return self.kills[run.id][1] >= KILLS

    def _give_up(self, run: PlannedRun, folder: RunFolder, code: int) -> None:
        """Record the failure of a run whose worker could not do so itself."""
        from e88.data.corpus import open_corpus
        from e88.runtime import choose_device
        from e88.sizing.closed_form import describe
        from e88.training.record import failed

        lock = folder.lock()
        if lock is None:
            self.waiting.append(run)
            return
        with lock:
            spec = run.spec
            corpus = open_corpus(spec.data, tokenizer=spec.tokenizer)
            size = describe(spec.model, window=spec.training.span)
            where = choose_device(self.device)
            reason = _reason(code, folder)
            record = failed(spec.name, spec.model, spec.training, corpus, size, where, reason)
            folder.write("record.json", record)
            Store(self.store).append(record)
        self._note(run, record)

    def _stop(self, stops: list[int]) -> None:
        for _, handle in self.state.running.values():
            handle.stop()
        self.view.message("stopping: each run writes a checkpoint; once more to stop at once")
        while any(handle.poll() is None for _, handle in self.state.running.values()):
            if len(stops) > 1:
                for _, handle in self.state.running.values():
                    handle.kill()
            time.sleep(POLL_SECONDS)
        raise Interrupted("stopped; the same command goes on from here")


def _reason(code: int, folder: RunFolder) -> str:
    """One line on why a worker ended without a record."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the process was killed by {name} {KILLS} times at one point{memory}"
    try:
        lines = (folder.path / "worker.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    last = f": {lines[-1]}" if lines else ""
    return f"the process ended with exit code {code} {KILLS} times at one point{last}"


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The signals received so far that ask for a stop."""
    received: list[int] = []
    old = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
