"""Runs of a GPU's slot in workers that waited for them. CUDA shows none there, so that they train on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scheduling import Quiet, alive, run

from e88.study.folder import RunFolder
from e88.study.launchers import LocalLauncher, gpu_slots
from e88.study.scheduler import run_all
from e88.study.standby import Standby
from e88.study.store import Store


class Watching(Quiet):
    """Notes the processes that waited and those that trained; kills the waiting ones where asked to."""

    def __init__(self, launcher: LocalLauncher, kill: bool = False) -> None:
        super().__init__()
        self.launcher, self.kill = launcher, kill
        self.waited: set[int] = set()
        self.trained: dict[str, int] = {}

    def update(self, state: Any) -> None:
        for standby in self.launcher.standbys.values():
            self.waited.add(standby._process.pid)
            if self.kill:
                standby._process.kill()
                standby._process.wait()
        for run_id, (_, handle) in state.running.items():
            self.trained.setdefault(run_id, handle.process.pid)


def schedule(runs: list[Any], out: Path, kill: bool = False) -> tuple[Any, Watching]:
    launcher = LocalLauncher(gpu_slots([""]), out)
    view = Watching(launcher, kill)
    return run_all(runs, out, launcher, view, device="cpu"), view


def test_runs_go_to_the_worker_that_waits_with_the_same_losses(text: Path, tmp_path: Path) -> None:
    runs = [run(text, seed=seed) for seed in range(2)] + [run(text, "refused", backend="no-such-backend")]
    records, view = schedule(runs, tmp_path / "one")
    killed, fresh = schedule(runs, tmp_path / "two", kill=True)
    first, *others = (view.trained[planned.id] for planned in runs)
    assert first not in view.waited and set(others) == view.waited
    # Where a waiting worker has died, a fresh one takes the run.
    assert fresh.waited and not fresh.waited & set(fresh.trained.values())
    for planned in runs[:2]:
        assert records[planned.id]["status"] == "done"
        assert records[planned.id]["results"]["train_loss"] == killed[planned.id]["results"]["train_loss"]
    assert records[runs[2].id]["status"] == "failed" and "no-such-backend" in records[runs[2].id]["reason"]
    assert len(Store(tmp_path / "one").path.read_text().splitlines()) == 3


def test_it_holds_the_locks_and_writes_to_the_runs_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "nothing")
    folder.path.mkdir(parents=True)
    standby = Standby(dict(os.environ))
    lock = RunFolder(tmp_path, "slot").lock()
    assert lock is not None
    process = standby.take(folder, [lock])
    lock.close()
    assert process is not None and RunFolder(tmp_path, "slot").lock() is None
    # There is no task.json.
    assert process.wait(60) == 1 and "holds no task.json" in (folder.path / "worker.log").read_text()
    assert RunFolder(tmp_path, "slot").lock() is not None
    assert standby.take(folder, []) is None


def test_it_ends_with_whoever_started_it() -> None:
    standby = Standby(dict(os.environ))
    standby._socket.close()
    assert standby._process.wait(60) == 0
    killed = """if True:
        import os, signal
        from e88.study.standby import Standby
        print(Standby(dict(os.environ))._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    pid = int(subprocess.run([sys.executable, "-c", killed], stdout=subprocess.PIPE, timeout=60).stdout)
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
