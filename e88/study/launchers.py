"""Where runs are started. A launcher starts a job where it finds room and hands back a handle; it decides nothing else.

The scheduler knows launchers and handles by the two protocols below alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Protocol

from e88.errors import UserError
from e88.study.folder import RunFolder, try_lock
from e88.study.standby import Standby
from e88.study.warm import start_warm

LOCKS = ".locks"


@dataclass(frozen=True)
class Job:
    """A run to be started. exclusive: its speed is measured, so nothing else may run on its processors meanwhile.
    gpus: how many it is spread over, on one machine. more: others wait for room."""

    folder: RunFolder
    name: str
    exclusive: bool = False
    gpus: int = 1
    more: bool = False


class Handle(Protocol):
    """A job that was started."""

    @property
    def where(self) -> str:
        """The slot, node or queue it is in, for people."""

    def poll(self) -> int | None:
        """The worker's exit code, negative for a signal; None while it is queued or runs."""

    def stop(self) -> None:
        """Ask the worker to stop with a checkpoint, or take it out of the queue. Returns at once."""

    def kill(self) -> None:
        """End it now."""


class Launcher(Protocol):
    """Whoever can start workers. The run's folder holds its task.json already."""

    def start(self, job: Job) -> Handle | None:
        """Start the job's worker; None where there is no room now (the scheduler asks again)."""

    def describe(self) -> str:
        """What it offers, in a few words."""


def worker_command(job: Job) -> list[str]:
    """The command of a worker, to be run anywhere that sees the store under the same path."""
    command = [sys.executable, "-m", "e88.study.worker", str(job.folder.store.resolve()), job.folder.id]
    return command if job.gpus == 1 else [*command, "--processes", str(job.gpus)]


@dataclass(frozen=True)
class Slot:
    """A place for one run: a part of the processor with some threads, or a GPU by its environment."""

    name: str
    threads: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return "CUDA_VISIBLE_DEVICES" in self.environment


def cpu_slots(count: int) -> list[Slot]:
    """`count` places that share the processor's cores evenly."""
    return [Slot(f"cpu{i}", threads=max(cores() // count, 1)) for i in range(count)]


def gpu_slots(names: list[str]) -> list[Slot]:
    """One place for each GPU, by index or UUID as CUDA_VISIBLE_DEVICES takes them."""
    return [Slot(f"gpu{name}", environment={"CUDA_VISIBLE_DEVICES": name}) for name in names]


def local_slots(*, slots: int | None = None, gpus: str | None = None, device: str = "auto") -> list[Slot]:
    """The slots of this machine that options ask for: its GPUs where there are any, else one for each core.

    gpus: `all` or indices such as `0,2`. UserError where the options contradict each other or the machine.
    """
    if gpus is None and (device == "cpu" or slots is not None):
        return cpu_slots(slots or cores())
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        if gpus is None and device == "auto":
            return cpu_slots(cores())
        raise UserError(f"torch {torch.__version__} sees no GPU here; leave out --gpus and use --device cpu")
    if device == "cpu" or slots is not None:
        raise UserError("--gpus is for GPUs, --slots and --device cpu for the CPU; give one")
    wanted = visible if gpus in (None, "all") else str(gpus).split(",")
    if unknown := [name for name in wanted if name not in visible]:
        raise UserError(f"there is no GPU {unknown[0]}; this machine shows {', '.join(visible)}")
    return gpu_slots(wanted)


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalLauncher:
    """Processes on this machine, one for each slot; a run on several GPUs takes as many slots, through torchrun.

    A worker holds its slot's lock, and a lock on the machine's processor: shared, or alone where its run is exclusive
    (on a GPU slot the slot is enough). The locks are files in the store, so that two schedulers on one store share the
    slots, and they end with the worker, not with the scheduler.
    """

    def __init__(self, slots: list[Slot], store: Path) -> None:
        if not slots:
            raise UserError("there is no slot to run on; give --slots or --gpus")
        self.slots = slots
        self.locks = store / LOCKS
        self.host = socket.gethostname()
        # By slot: the worker that waits for its next run.
        self.standbys: dict[str, Standby] = {}

    def start(self, job: Job) -> Handle | None:
        if job.gpus > len(self.slots):
            raise UserError(f"{job.name} asks for {job.gpus} GPUs or slots; there are {len(self.slots)}")
        slots, locks = self._take(job.gpus, job.exclusive)
        if not slots:
            return None
        try:
            name = "+".join(slot.name for slot in slots)
            if slots[0].on_gpu and job.gpus == 1:
                return LocalHandle(name, self._start_on_gpu(job, slots[0], locks))
            if slots[0].on_gpu or job.gpus > 1:
                return LocalHandle(name, _start_fresh(job, slots, name, locks))
            # A run alone on the processor keeps the threads that the user has set, or all.
            threads = 0 if job.exclusive else slots[0].threads
            return LocalHandle(name, start_warm(job.folder, name, threads, locks))
        finally:
            # The worker has inherited them.
            for lock in locks:
                lock.close()

    def _start_on_gpu(self, job: Job, slot: Slot, locks: list[IO[str]]) -> subprocess.Popen[bytes]:
        """Start it in the worker that waits at this slot, and have the next one wait where there are more runs."""
        waiting = self.standbys.pop(slot.name, None)
        process = waiting.take(job.folder, locks) if waiting else None
        process = process or _start_fresh(job, [slot], slot.name, locks)
        if job.more:
            self.standbys[slot.name] = Standby(_environment([slot], slot.name))
        return process

    def describe(self) -> str:
        return "local slots " + ", ".join(slot.name for slot in self.slots)

    def _take(self, count: int, exclusive: bool) -> tuple[list[Slot], list[IO[str]]]:
        """`count` free slots and their locks; none where there are fewer."""
        slots: list[Slot] = []
        locks: list[IO[str]] = []
        for slot in self.slots:
            if len(slots) < count and (lock := try_lock(self.locks / f"{self.host}-{slot.name}")):
                slots.append(slot)
                locks.append(lock)
        if len(slots) == count and not slots[0].on_gpu:
            machine = try_lock(self.locks / self.host, shared=not exclusive)
            locks += [machine] if machine else []
            count += machine is None
        if len(slots) == count:
            return slots, locks
        for lock in locks:
            lock.close()
        return [], []


class LocalHandle:
    """A worker process of its own session, so that a Ctrl-C reaches it once, through the scheduler."""

    def __init__(self, where: str, process: subprocess.Popen[bytes] | BaseProcess) -> None:
        self.where, self.process = where, process

    def poll(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def stop(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def _environment(slots: list[Slot], name: str) -> dict[str, str]:
    """Of a worker that is started afresh."""
    environment = {**os.environ, "E88_SLOT": name}
    if slots[0].on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots)
    else:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(slots[0].threads))
    return environment


def _start_fresh(job: Job, slots: list[Slot], name: str, locks: list[IO[str]]) -> subprocess.Popen[bytes]:
    with open(job.folder.path / "worker.log", "ab") as log:
        return subprocess.Popen(
            [*worker_command(job), "--parent", str(os.getpid())], env=_environment(slots, name), start_new_session=True,
            pass_fds=[lock.fileno() for lock in locks], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
