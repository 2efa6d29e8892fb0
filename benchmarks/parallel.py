"""Speed of several GPUs of one machine: runs side by side, and one run spread over them by DDP and FSDP2.

    python benchmarks/parallel.py [--preset e88-500m] [--processes 2] [--batch-size 32] [--window 512] [--steps 30]

Each run is an `e88 train` of its own, so that what is timed is what a user gets; tok/s is the record's median over
steady steps. A run in several processes has `--batch-size` rows on each GPU, and its losses are compared with those of
one GPU that takes the same batch in as many parts. The text is the standard library's; nothing is downloaded.

Three things are asked, and the exit code is 1 where one fails: runs side by side keep 95 % of the tok/s that each has
alone on its GPU; a run over two GPUs makes 1.85 times the tok/s of one (92.5 % for each GPU of more); the losses of the
first ten steps agree to a thousandth. With --device cpu the "GPUs" are processes of one thread, which tests this script
and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDE_BY_SIDE, EACH_GPU, LOSS = 0.95, 0.925, 1e-3
COMPARED_STEPS = 10
SIDE, MODES = "side-by-side", ("ddp", "fsdp")


@dataclass(frozen=True)
class Result:
    """Of one run: its record, and the loss of each step."""

    record: dict[str, Any]
    losses: list[float]

    @property
    def speed(self) -> float:
        return float(self.record["results"]["tokens_per_second"])


class Runs:
    """Starts trainings and reads what they leave."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, gpus: list[int], *, rows: int, parts: int = 1, mode: str = ""
    ) -> subprocess.Popen[bytes]:
        o = self.options
        command = [sys.executable]
        if mode:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(gpus))]
        command += ["-m", "e88", "train", o.preset, "--out", str(self.folder / name), "--steps", str(o.steps)]
        command += ["--batch-size", str(rows), "--window", str(o.window), "--accumulate", str(parts)]
        # At a rate so low that rounding, which differs, is not blown up within the steps that are compared.
        command += ["--lr", "1e-4", "--device", o.device, "--set", "heldout_bytes=16384", "--no-keep-checkpoint"]
        environment = {**os.environ}
        if o.device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"
        else:
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = given.split(",") if given else [str(i) for i in range(o.processes)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
        if mode:
            command += ["--parallel", mode]
        (self.folder / name).mkdir()
        with open(self.folder / name / "output.txt", "wb") as log:
            self.started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return self.started[-1]

    def stop(self) -> None:
        """End what a failure has left running."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.wait()

    def finish(self, name: str, process: subprocess.Popen[bytes]) -> Result | None:
        """What it left, or None where it failed, which does not keep the others from running."""
        code = process.wait()
        place = self.folder / name
        if code:
            print(f"{name} ended with {code}: {(place / 'output.txt').read_text()[-4000:]}", flush=True)
            return None
        losses = [json.loads(line)["loss"] for line in (place / "log.jsonl").read_text().splitlines()]
        result = Result(json.loads((place / "record.json").read_text()), losses)
        peak = result.record["results"]["peak_memory_bytes"] / 2**30
        print(f"{name:<12} {result.speed:12,.0f} tok/s {peak:8.1f} GiB a GPU at most", flush=True)
        return result

    def do(self, name: str, gpus: list[int], **options: Any) -> Result | None:
        return self.finish(name, self.start(name, gpus, **options))


def measure(runs: Runs) -> dict[str, Result]:
    """Every run, by name."""
    count, rows = runs.options.processes, runs.options.batch_size
    asked = runs.options.ask
    alone = range(count) if SIDE in asked else range(1)
    found = {f"alone{gpu}": runs.do(f"alone{gpu}", [gpu], rows=rows) for gpu in alone}
    if SIDE in asked:
        beside = {f"beside{gpu}": runs.start(f"beside{gpu}", [gpu], rows=rows) for gpu in range(count)}
        found |= {name: runs.finish(name, process) for name, process in beside.items()}
    if modes := [mode for mode in MODES if mode in asked]:
        found["parts"] = runs.do("parts", [0], rows=rows * count, parts=count)
    for mode in modes:
        found[mode] = runs.do(mode, list(range(count)), rows=rows * count, mode=mode)
    return {name: result for name, result in found.items() if result is not None}


def answers(found: Mapping[str, Result], count: int, asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What was asked -> value (None where a run for it failed), limit, and whether it holds."""
    told: dict[str, tuple[float, float, bool]] = {}
    if SIDE in asked:
        pairs = [(found.get(f"beside{gpu}"), found.get(f"alone{gpu}")) for gpu in range(count)]
        shares = [beside.speed / alone.speed if beside and alone else math.nan for beside, alone in pairs]
        least = math.nan if any(map(math.isnan, shares)) else min(shares)
        told["side by side: least share of the speed alone"] = (least, SIDE_BY_SIDE, least >= SIDE_BY_SIDE)
    for mode in (mode for mode in MODES if mode in asked):
        both, one, parts = (found.get(name) for name in (mode, "alone0", "parts"))
        ratio = both.speed / one.speed if both and one else math.nan
        told[f"{mode}: times the speed of one GPU"] = (ratio, EACH_GPU * count, ratio >= EACH_GPU * count)
        losses = list(zip(parts.losses, both.losses, strict=True))[:COMPARED_STEPS] if both and parts else []
        apart = max((abs(a - b) / a for a, b in losses), default=math.nan)
        told[f"{mode}: largest relative difference of a loss"] = (apart, LOSS, apart <= LOSS)
    return {
        name: {"value": None if math.isnan(value) else value, "limit": limit, "holds": holds}
        for name, (value, limit, holds) in told.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="e88-500m")
    parser.add_argument("--processes", type=int, default=2, help="GPUs")
    parser.add_argument("--batch-size", type=int, default=32, help="windows on each GPU")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ask", nargs="+", choices=(SIDE, *MODES), default=[SIDE, *MODES], help="questions to answer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="where records and the answers are kept")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="e88-parallel-"))
    started, runs = time.perf_counter(), Runs(options, folder)
    try:
        found = measure(runs)
    finally:
        runs.stop()
        shutil.rmtree(folder, ignore_errors=True)
    told = answers(found, options.processes, options.ask)
    for name, answer in told.items():
        value = "no result" if answer["value"] is None else f"{answer['value']:.4g}"
        print(f"{'holds' if answer['holds'] else 'FAILS'}  {name}: {value} (limit {answer['limit']:g})")
    print(f"{time.perf_counter() - started:.0f} s")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({**result.record, "name": name}) for name, result in found.items())
        (options.out / "parallel.jsonl").write_text("\n".join(lines) + "\n")
        (options.out / "parallel.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0 if all(answer["holds"] for answer in told.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
