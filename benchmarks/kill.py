"""Kill a study again and again, and see whether anything is lost, done twice, or different.

    python benchmarks/kill.py studies/seed_claims.toml [--scale smoke] [--claim NAME] [--kills 20] [--slots 2]

An undisturbed study first. Then the same in another store, of which at random moments the scheduler, one of its
processes, or all of them are killed (SIGKILL), and which is started again where that ended it; when the kills are used
up, it is left to end. Of each run the stores must hold one record, and where the budget is not in seconds both with the
same held-out figure to the last bit. The exit code is 1 where they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

WAIT = (1.0, 8.0)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        found = [int(child) for child in children.read_text().split()]
    except OSError:
        return []
    return found + [below for child in found for below in descendants(child)]


def disturb(command: list[str], kills: int, draw: random.Random, log: Path) -> Counter[str]:
    """Run a command to its end through at most this many kills; how many were of which kind. log: what it prints."""
    dealt: Counter[str] = Counter()
    process: subprocess.Popen[bytes] | None = None
    while True:
        if process is None:
            with open(log, "ab") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            code = process.wait(draw.uniform(*WAIT) if dealt.total() < kills else None)
        except subprocess.TimeoutExpired:
            below = descendants(process.pid)
            kind = draw.choice(("scheduler", "one process", "all") if below else ("scheduler",))
            victims = {"scheduler": [process.pid], "all": [process.pid, *below]}.get(kind) or [draw.choice(below)]
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            dealt[kind] += 1
            print(f"{dealt.total()} of {kills}: killed {kind}", flush=True)
            if process.pid in victims:
                process.wait()
                process = None
            continue
        if code:
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")
        return dealt


def endings(store: Path) -> dict[str, list[dict[str, Any]]]:
    """id -> its records."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (store / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["id"], []).append(record)
    return found


def differences(calm: dict[str, list[dict[str, Any]]], killed: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What is wrong with the records of a study that was killed."""
    wrong = [f"{run} is lost" for run in calm if run not in killed]
    wrong += [f"{run} was never asked for" for run in killed if run not in calm]
    for run in calm.keys() & killed.keys():
        if len(killed[run]) != 1:
            wrong.append(f"{run} has {len(killed[run])} records ({', '.join(r['status'] for r in killed[run])})")
        one, other = calm[run][-1], killed[run][-1]
        if one["status"] != other["status"]:
            wrong.append(f"{run} is {other['status']}, undisturbed {one['status']}")
        elif "seconds" not in one["config"]["training"]["budget"]:
            figures = [r["results"].get("heldout_bpb") for r in (one, other)]
            if figures[0] != figures[1]:
                wrong.append(f"{run} ended with {figures[1]}, undisturbed {figures[0]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec")
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--claim", action="append", default=[])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=Path, help="a store that holds the study already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="e88-kill-") as folder:
        calm, killed = options.undisturbed or Path(folder) / "calm", Path(folder) / "killed"
        command = [sys.executable, "-m", "e88", "study", "run", options.spec, "--scale", options.scale]
        command += ["--device", "cpu", "--slots", str(options.slots), *(f"--claim={name}" for name in options.claim)]
        if not options.undisturbed:
            subprocess.run([*command, "--out", str(calm)], stdout=subprocess.DEVNULL, check=True)
        start = time.perf_counter()
        log = Path(folder) / "output.txt"
        dealt = disturb([*command, "--out", str(killed)], options.kills, random.Random(options.seed), log)
        one, other = endings(calm), endings(killed)
        wrong = differences(one, other)
    kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(dealt.items()))
    print(f"{len(one)} runs, {dealt.total()} kills ({kinds}), {time.perf_counter() - start:.0f} s")
    print("\n".join(wrong) or "no record lost, none twice, every figure the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
