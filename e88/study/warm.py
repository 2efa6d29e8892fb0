"""Workers that start warm: forks of a server that has torch and numba loaded, which saves most of a short run's time.

The server is the standard library's forkserver, and ends with its last worker. Only for the CPU: a GPU's runs have
processes of their own (standby.py), as CUDA wants it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from e88.study.folder import RunFolder

TRIES = 3
PRELOADED = ["torch._dynamo", "e88.cli", "e88.ops.cpu", "e88.study.worker", "e88.training.loop"]


def start_warm(folder: RunFolder, slot: str, threads: int, locks: list[IO[str]]) -> BaseProcess:
    """Start a run's worker. threads: of torch and the recurrence, 0: as they are. locks: held until it ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = (str(folder.store.resolve()), folder.id, slot, threads, [_Inherited(lock) for lock in locks])

    def start() -> BaseProcess:
        # A daemon: where the scheduler itself fails, its workers are told to stop, not waited for.
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        return process

    for _ in range(TRIES - 1):
        # Where the server was killed, the next start finds it gone and makes another; should this worker live all the
        # same, it holds the run's lock, and the next one leaves the run to it.
        with suppress(EOFError, OSError):
            return start()
    return start()


def _work(store: str, run_id: str, slot: str, threads: int, _locks: list[Any]) -> None:
    from e88.study import worker

    # A session of its own, so that a Ctrl-C reaches it once, through the scheduler.
    os.setsid()
    threading.Thread(target=_stop_with_scheduler, daemon=True).start()
    folder = RunFolder(Path(store), run_id)
    with open(folder.path / "worker.log", "ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    os.environ["E88_SLOT"] = slot
    if threads:
        import torch

        torch.set_num_threads(threads)
    sys.exit(worker.main(folder))


def _stop_with_scheduler() -> None:
    """Wait for the scheduler's end, and have the run stop with a checkpoint."""
    scheduler = multiprocessing.parent_process()
    assert scheduler is not None
    scheduler.join()
    os.kill(os.getpid(), signal.SIGTERM)


class _Inherited:
    """An open file that goes to the new process with its lock."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _received, (reduction.DupFd(self.file.fileno()),)


def _received(duplicate: Any) -> int:
    number: int = duplicate.detach()
    return number
