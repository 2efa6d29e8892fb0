"""How long it takes to list, plan and report a store of many runs. The records are made up, and stay in a
temporary folder.

    python benchmarks/store.py --runs 10000
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from e88.sizing.closed_form import describe
from e88.study.design import Experiment, load_study
from e88.study.store import FILE_NAME, Record

SEEDS, DEPTHS = 3, 50
SPEC = """
title = "Many runs"
data = "{data}"
[training]
batch_size = 4
window = 64
heldout_bytes = 4096
[scales.smoke]
seeds = {seeds}
[budgets.run]
exclusive = true
smoke = {{ steps = 400 }}
[models."d{{dim}}-l{{depth}}"]
kind = "e88"
n_heads = 4
n_state = 16
vary = {{ dim = {dims}, depth = {depths} }}
[claims.deeper]
says = "four layers are better than two"
source = "made up"
lower = ["d64-l4", "d64-l2"]
[claims.best]
says = "the widest and deepest is best"
source = "made up"
best = ["d{widest}-l{deepest}"]
of = ["*"]
"""


def experiment(folder: Path, runs: int) -> tuple[Path, Experiment]:
    """A spec of at least `runs` runs in the folder, and what it says."""
    (folder / "text.txt").write_text("".join(f"line {i} of made up text\n" for i in range(4000)))
    dims = [64 + 8 * i for i in range(math.ceil(runs / SEEDS / DEPTHS))]
    depths = list(range(1, DEPTHS + 1))
    path = folder / "many.toml"
    path.write_text(
        SPEC.format(
            data=folder / "text.txt", seeds=SEEDS, dims=dims, depths=depths, widest=dims[-1], deepest=depths[-1]
        )
    )
    return path, load_study(path).at("smoke")


def records(planned: Experiment) -> Iterator[Record]:
    """A record of each run: one in fifty diverged, one in fifty failed, the others with curves of 400 points."""
    draw = random.Random(0)
    corpus = {"name": "text.txt", "hash": "0" * 64, "window": 64, "heldout_bytes": 4096, "bytes_per_token": 1.0}
    curve = [
        {"step": i, "tokens": 256 * i, "seconds": 0.1 * i, "loss": 2 + 3 / math.sqrt(i), "lr": 1e-3}
        for i in range(1, 401)
    ]
    for number, run in enumerate(planned.runs):
        size = describe(run.spec.model, window=64)
        status = {0: "diverged", 1: "failed"}.get(number % 50, "done")
        bpb = 3 - 0.05 * math.log(size["params"]) + draw.gauss(0, 0.01) if status == "done" else None
        speed = 1e10 / size["flops_per_token"] * draw.uniform(0.95, 1.05)
        yield {
            "schema": 1, "id": run.id, "status": status, "reason": None if bpb else "made up", "name": run.spec.name,
            "seed": run.spec.training.seed, "started": "2026-01-01T00:00:00Z",
            "config": {"model": run.spec.model.to_dict(), "training": run.spec.training.to_dict()},
            "data": corpus, "model": size,
            "results": {
                "train_loss": 2.1, "train_loss_steps": 100, "heldout_bpb": bpb, "steps": 400, "tokens": 102400,
                "seconds": 40.0, "wall_seconds": 44.0, "tokens_per_second": speed,
                "tokens_per_second_spread": [0.9 * speed, 1.1 * speed],
            },
            "curve": curve, "heldout_curve": [],
            "environment": {"hardware": "made up", "versions": {"e88": "0"}, "commit": "0", "backends": ["numba"]},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec, planned = experiment(folder, arguments.runs)
        out = folder / "store"
        out.mkdir()
        with open(out / FILE_NAME, "w") as file:
            for record in records(planned):
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
        print(f"{len(planned.runs)} runs, {(out / FILE_NAME).stat().st_size / 1e6:.0f} MB of records")
        commands = [f"study {name} {spec} --out {out}" for name in ("status", "plan", "report")] + [f"report {out}"]
        for command in commands:
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "e88", *command.split()], check=True, capture_output=True)
            wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"e88 {command.split(' /')[0]}: {wall:.2f} s, of which on the processor {busy:.2f} s")
        for page in sorted(out.glob("*.html")):
            print(f"{page.name}: {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
