"""A worker that waits for its run: started while another trains on the GPU, it has loaded torch when that one ends.

Unlike a warm worker of the CPU (warm.py) it is no fork but a process of its own, as CUDA wants it. It touches no GPU
before it has a run.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from e88.study import worker
from e88.study.folder import RunFolder

LOADED = ["torch._dynamo", "e88.training.loop", "e88.training.verify"]
# Where these are installed a run on a GPU loads them.
LOADED_IF_THERE = ["triton", "cuda.bindings.driver", "cuda.bindings.nvrtc"]
MOST_FILES = 64
MESSAGE = 1 << 16


class Standby:
    """A waiting worker. environment: of its process, with its GPU. It ends with this object, or with this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "e88.study.standby", str(theirs.fileno()), str(os.getpid())],
                env=dict(environment), start_new_session=True, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def take(self, folder: RunFolder, locks: list[IO[str]]) -> subprocess.Popen[bytes] | None:
        """Give it a run, to be called once; the process, which now holds the locks, or None where it has died."""
        message = json.dumps([str(folder.store.resolve()), folder.id]).encode()
        with self._socket, open(folder.path / "worker.log", "ab") as log, suppress(OSError):
            if self._process.poll() is None:
                socket.send_fds(self._socket, [message], [log.fileno(), *(lock.fileno() for lock in locks)])
                return self._process
        return None


def main(connection: socket.socket) -> int:
    """Load what a run needs, wait for one, and do it; an exit code, 0 where the other end is closed instead."""
    for name in LOADED:
        importlib.import_module(name)
    for name in LOADED_IF_THERE:
        with suppress(ImportError):
            importlib.import_module(name)
    message, files, *_ = socket.recv_fds(connection, MESSAGE, MOST_FILES)
    if not message:
        return 0
    # The rest are the locks, which this process now holds to its end.
    log = files[0]
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    store, run_id = json.loads(message)
    return worker.main(RunFolder(Path(store), run_id))


if __name__ == "__main__":
    worker.end_with(int(sys.argv[2]), signal.SIGTERM)
    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
