"""A SLURM of one node and two processors on this machine, from Debian's packages slurm-wlm and munge."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "squeue", "sbatch")
# No accounts, no control groups: what every machine has.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
MpiDefault=none
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000
PartitionName=debug Nodes={host} Default=YES MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Why no SLURM can be started here, or None."""
    if os.geteuid() != 0:
        return "munge and SLURM are started as root only"
    found = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return f"no {found[0]}; apt-get install slurm-wlm munge" if found else None


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Its slurm.conf, while it runs. Raises RuntimeError where it does not come up."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, ports=free_ports(2)))
    environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(configuration)}
    started: list[subprocess.Popen[bytes]] = []

    def daemon(*command: str) -> None:
        with open(folder / f"{command[0]}.err", "wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    try:
        files = [
            f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
        ]
        daemon("munged", "--foreground", "--force", f"--log-file={folder}/munged.log", *files)
        until(lambda: (folder / "munge.socket").exists(), folder)
        daemon("slurmctld", "-D")
        daemon("slurmd", "-D")
        ask = ["sinfo", "--noheader", "--format=%T"]
        until(lambda: b"idle" in subprocess.run(ask, env=environment, capture_output=True).stdout, folder)
        yield configuration
        subprocess.run(["scancel", "--me"], env=environment)
        queue = ["squeue", "--noheader"]
        until(lambda: not subprocess.run(queue, env=environment, capture_output=True).stdout, folder)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def until(condition, folder: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            said = "; ".join(path.read_text(errors="replace").strip()[-200:] for path in folder.glob("*.err"))
            raise RuntimeError(f"SLURM does not come up: {said}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    # By hand: `python slurm_cluster.py FOLDER`, then `export SLURM_CONF=FOLDER/slurm.conf`.
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True)
    with cluster(place) as running:
        print(f"export SLURM_CONF={running}", flush=True)
        while True:
            time.sleep(1)
