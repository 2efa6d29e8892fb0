"""Time every backend of the recurrence, after checking it: a backend that is wrong gets no speed.

    python benchmarks/recurrence.py [--device cpu|cuda] [--threads 2] [--seconds 1.0] [--json]

For each shape, each backend's output, final state and gradients are compared with float64 by relative error (on a GPU
over fewer steps, since more would not fit). Then forward (without gradients) and forward with backward are timed in
turns. On a CPU: the best time, which a busy machine disturbs least, and the ratio of the reference's to it. On a GPU:
the median of device events; the share of the floor, which is what the card's tanh units, float32 lanes or memory need
at least for the shape, whichever is most; and of the forward and the backward kernel the registers of a thread and the
bytes of them that did not fit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from e88 import runtime
from e88.errors import UserError
from e88.ops import available_backends
from e88.ops.accuracy import TOLERANCE, Shape, check, draw, worst
from e88.ops.speed import as_a_model_calls_it, forward, forward_and_backward, milliseconds, shortened


class Suite(NamedTuple):
    """What to run on a kind of device: shapes, the inputs' dtype, and the backends that are too slow to be timed."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    left_out: tuple[str, ...] = ()


SUITES = {
    "cpu": Suite(
        (
            Shape(4, 128, 8, 32, 32),
            Shape(8, 256, 12, 16, 16),
            Shape(8, 256, 6, 32, 32),
            Shape(1, 256, 4, 24, 48),
            Shape(1, 256, 2, 64, 64),
        ),
        torch.float32,
    ),
    "cuda": Suite(
        (
            Shape(32, 512, 56, 32, 32),
            Shape(8, 2048, 56, 32, 32),
            Shape(1, 16384, 56, 32, 32),
            Shape(32, 512, 28, 64, 64),
            Shape(32, 512, 128, 16, 16),
            Shape(32, 512, 14, 128, 128),
        ),
        torch.bfloat16,
        left_out=("checkpointed", "reference"),
    ),
}
# Float64 says what is right and the reference is what others are compared with.
REFERENCE = "reference"
# Modules whose `resources` tells what the compiler made of their kernels.
KERNELS = {"cuda": "e88.ops.cuda.recurrence", "triton": "e88.ops.triton.recurrence"}


def floors(shape: Shape) -> tuple[float, float]:
    """Milliseconds that forward, and forward with backward, need at least on this GPU in bf16.

    An element of the state takes one tanh and 4 multiply-adds a step forward; backward replays the tanh and takes
    about 15. A multiprocessor does 16 tanh and 128 multiply-adds a clock. Forward moves q, k, v and y once; backward
    reads q, k, v, dy and writes dq, dk, dv.
    """
    properties = torch.cuda.get_device_properties(0)
    clocks = properties.multi_processor_count * properties.clock_rate  # per millisecond
    heads = shape.B * shape.T * shape.H
    elements = heads * shape.K * shape.V
    bandwidth = 2 * properties.memory_clock_rate * properties.memory_bus_width / 8  # bytes per millisecond

    def floor(multiply_adds: int, vectors_k: int, vectors_v: int) -> float:
        moved = 2 * heads * (vectors_k * shape.K + vectors_v * shape.V)
        return max(elements / 16 / clocks, multiply_adds * elements / 128 / clocks, moved / bandwidth)

    forward = floor(4, 2, 2)
    return forward, forward + floor(15, 4, 3)


def take_turns(runs: dict[str, Callable[[], None]], device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run, about `seconds` of them, in ten turns so that a disturbance meets all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(10):
        for name, run in runs.items():
            if sum(times[name]) < 1e3 * seconds:
                end = time.perf_counter() + seconds / 10
                while not times[name] or time.perf_counter() < end:
                    times[name].append(milliseconds(run, torch.device(device)))
    return times


def checked(shape: Shape, suite: Suite, device: str) -> list[dict[str, Any]]:
    """A row for each backend, with its largest relative error, or why it is skipped."""
    small = shortened(shape) if device == "cuda" else shape
    rows: list[dict[str, Any]] = []
    for name, missing in available_backends().items():
        row: dict[str, Any] = {"shape": str(shape), "backend": name, "error": None, "skipped": missing}
        if name in suite.left_out:
            continue
        rows.append(row)
        if missing is None:
            try:
                row["error"] = worst(check(small, device, suite.dtype, name, gate=device == "cpu"))[1]
            except UserError as refusal:
                row["skipped"] = str(refusal)
        if row["error"] is not None and not row["error"] <= TOLERANCE[suite.dtype]:
            row["skipped"] = f"wrong: error above {TOLERANCE[suite.dtype]:.0e}"
    return rows


def measure(shape: Shape, suite: Suite, device: str, seconds: float) -> list[dict[str, Any]]:
    rows = checked(shape, suite, device)
    inputs = as_a_model_calls_it(shape, device, suite.dtype) if device == "cuda" else draw(shape, device, suite.dtype)
    timed = [row for row in rows if row["skipped"] is None]
    pick = statistics.median if device == "cuda" else min
    for key, run in (("forward", forward), ("forward_backward", forward_and_backward)):
        runs: dict[str, Callable[[], None]] = {row["backend"]: partial(run, inputs, row["backend"]) for row in timed}
        for warm_up in runs.values():
            warm_up()
        times = take_turns(runs, device, seconds)
        for row in timed:
            row[f"{key}_ms"] = pick(times[row["backend"]])
            row[f"{key}_median_ms"] = statistics.median(times[row["backend"]])
    if device == "cuda":
        for row in timed:
            # Launched once more, so that they are this backend's and this shape's.
            forward_and_backward(inputs, row["backend"])
            row["kernels"] = importlib.import_module(KERNELS[row["backend"]]).resources()
            least = floors(shape)
            row["floor_ms"], row["forward_floor_ms"] = least[1], least[0]
            row["share_of_floor"] = least[1] / row["forward_backward_ms"]
        return rows
    baseline = next((row["forward_backward_ms"] for row in timed if row["backend"] == REFERENCE), None)
    for row in timed:
        row["speedup"] = None if baseline is None else baseline / row["forward_backward_ms"]
    return rows


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:<26} {row['backend']:<13}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    if row["skipped"] is not None:
        return f"{head} {error:>8}  {row['skipped']}"
    times = f"{head} {error:>8} {row['forward_ms']:>10.3f} {row['forward_backward_ms']:>10.3f}"
    if "kernels" not in row:
        return f"{times} {row['speedup'] or 0:>9.1f}x"
    used = [row["kernels"][direction] for direction in ("forward", "backward")]
    registers, spilled = ("/".join(str(kernel[key]) for kernel in used) for key in ("registers", "spilled_bytes"))
    return f"{times} {row['share_of_floor']:>10.0%} {registers:>10} {spilled:>8}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=sorted(SUITES))
    parser.add_argument("--threads", type=int, default=2, help="threads for the CPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing for each backend, shape and direction")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    suite = SUITES[arguments.device]
    where = runtime.choose_device(arguments.device)
    if not arguments.json:
        print(runtime.hardware_name(where), str(suite.dtype).removeprefix("torch."))
        last = (
            f"{'of floor':>10} {'registers':>10} {'spilled':>8}" if arguments.device == "cuda" else f"{'speed-up':>10}"
        )
        print(f"{'shape':<26} {'backend':<13} {'error':>8} {'fwd ms':>10} {'f+b ms':>10} {last}")
    wrong = False
    for shape in suite.shapes:
        for row in measure(shape, suite, arguments.device, arguments.seconds):
            environment = runtime.environment(where, [row["backend"]])
            row |= {"threads": arguments.threads, "dtype": str(suite.dtype), "environment": environment}
            print(json.dumps(row) if arguments.json else line(row), flush=True)
            wrong |= row["error"] is not None and not row["error"] <= TOLERANCE[suite.dtype]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
