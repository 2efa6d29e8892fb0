"""Small runs and quiet views for the tests of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e88.study.folder import read_json
from e88.study.launchers import LocalLauncher, cpu_slots
from e88.study.plan import PlannedRun, Planner
from e88.study.scheduler import run_all
from e88.study.spec import RunSpec


class Quiet:
    """A view that remembers its messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def update(self, state: Any) -> None:
        pass

    def message(self, text: str) -> None:
        self.lines.append(text)


def run(
    text: Path, name: str = "small", steps: int = 4, exclusive: bool = False, gpus: int = 1, parallel: str = "ddp",
    **training: Any,
) -> PlannedRun:  # fmt: skip
    spec = {
        "name": name,
        "model": {"dim": 16, "depth": 2, "mixer": {"kind": "e88", "n_heads": 2, "n_state": 8}},
        "training": {
            "budget": {"steps": steps}, "batch_size": 4, "window": 16, "lr": 1e-2, "heldout_bytes": 2000, **training,
        },
        "data": str(text),
    }  # fmt: skip
    return Planner().plan(RunSpec.from_dict(spec), exclusive, gpus, parallel)


def schedule(runs: list[PlannedRun], out: Path, view: Quiet | None = None, slots: int = 2, **options: Any) -> Any:
    return run_all(runs, out, LocalLauncher(cpu_slots(slots), out), view or Quiet(), device="cpu", **options)


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers(out: Path) -> list[int]:
    """The workers that live and have written something."""
    progress = (read_json(path) for path in out.glob("runs/*/progress.json"))
    return [p["pid"] for p in progress if p and alive(p["pid"])]
