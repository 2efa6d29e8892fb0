"""Time every backend of the recurrence, after checking it: a backend that is wrong gets no speed.

    python benchmarks/recurrence.py [--device cpu] [--threads 2] [--seconds 1.0] [--json]

For each shape, each backend's output, final state and gradients are compared with float64 by relative error. Then
forward (without gradients) and forward with backward are timed in turns: the best time, which a busy machine
disturbs least, in milliseconds, and the ratio of the reference's forward and backward to it. The JSON rows also have
the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e88.errors import UserError
from e88.ops import available_backends, tanh_delta_rule


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in zip(self._fields, self, strict=True))


class Suite(NamedTuple):
    """What to run on a kind of device: shapes, the inputs' dtype, and the largest relative error allowed."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    tolerance: float


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
        1e-5,
    ),
}
# Float64 says what is right and the reference is what others are compared with.
REFERENCE = "reference"


class Inputs(NamedTuple):
    operands: tuple[Tensor, ...]
    dy: Tensor
    d_final: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        operands = tuple(x.detach().to(dtype).requires_grad_() for x in self.operands)
        return Inputs(operands, self.dy.to(dtype), self.d_final.to(dtype))


def draw(shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    B, T, H, K, V = shape
    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    operands = (q, k, normal(B, T, H, V), -0.1 * normal(B, T, H).abs(), normal(B, T, H).sigmoid())
    return Inputs(operands, normal(B, T, H, V), normal(B, H, K, V)).to(dtype)


def results(inputs: Inputs, backend: str) -> list[Tensor]:
    y, final_state = tanh_delta_rule(*inputs.operands, output_final_state=True, backend=backend)
    assert final_state is not None
    gradients = torch.autograd.grad((y, final_state), inputs.operands, (inputs.dy, inputs.d_final.to(final_state)))
    return [y, final_state, *gradients]


def worst_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(actual, expected, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def forward(inputs: Inputs, backend: str) -> None:
    with torch.no_grad():
        tanh_delta_rule(*inputs.operands, backend=backend)


def forward_and_backward(inputs: Inputs, backend: str) -> None:
    y, _ = tanh_delta_rule(*inputs.operands, backend=backend)
    torch.autograd.grad(y, inputs.operands, inputs.dy)


def milliseconds(run: Callable[[], None], device: str) -> float:
    module = torch.get_device_module(device)
    module.synchronize()
    start = time.perf_counter()
    run()
    module.synchronize()
    return 1e3 * (time.perf_counter() - start)


def take_turns(runs: dict[str, Callable[[], None]], device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run, about `seconds` of them, in ten turns so that a disturbance meets all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(10):
        for name, run in runs.items():
            if sum(times[name]) < 1e3 * seconds:
                end = time.perf_counter() + seconds / 10
                while not times[name] or time.perf_counter() < end:
                    times[name].append(milliseconds(run, device))
    return times


def measure(shape: Shape, suite: Suite, device: str, seconds: float) -> list[dict[str, Any]]:
    inputs = draw(shape, device, suite.dtype)
    expected = results(inputs.to(torch.float64), "checkpointed")
    rows: list[dict[str, Any]] = []
    for name, missing in available_backends().items():
        row: dict[str, Any] = {"shape": str(shape), "backend": name, "error": None, "skipped": missing}
        rows.append(row)
        if missing is None:
            try:
                row["error"] = worst_error(results(inputs, name), expected)
            except UserError as refusal:
                row["skipped"] = str(refusal)
        if row["error"] is not None and not row["error"] <= suite.tolerance:
            row["skipped"] = f"wrong: error above {suite.tolerance:.0e}"

    timed = [row for row in rows if row["skipped"] is None]
    for key, run in (("forward", forward), ("forward_backward", forward_and_backward)):
        times = take_turns({row["backend"]: partial(run, inputs, row["backend"]) for row in timed}, device, seconds)
        for row in timed:
            row[f"{key}_ms"] = min(times[row["backend"]])
            row[f"{key}_median_ms"] = statistics.median(times[row["backend"]])
    baseline = next((row["forward_backward_ms"] for row in timed if row["backend"] == REFERENCE), None)
    for row in timed:
        row["speedup"] = None if baseline is None else baseline / row["forward_backward_ms"]
    return rows


def line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:<24} {row['backend']:<13}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    if row["skipped"] is not None:
        return f"{head} {error:>8}  {row['skipped']}"
    speedup = "" if row["speedup"] is None else f"{row['speedup']:.1f}x"
    return f"{head} {error:>8} {row['forward_ms']:>10.3f} {row['forward_backward_ms']:>10.3f} {speedup:>9}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=sorted(SUITES))
    parser.add_argument("--threads", type=int, default=2, help="threads for the CPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing for each backend, shape and direction")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    suite = SUITES[arguments.device]
    if not arguments.json:
        print(f"{'shape':<24} {'backend':<13} {'error':>8} {'fwd ms':>10} {'f+b ms':>10} {'speedup':>9}")
    wrong = False
    for shape in suite.shapes:
        for row in measure(shape, suite, arguments.device, arguments.seconds):
            row |= {"device": arguments.device, "threads": arguments.threads, "dtype": str(suite.dtype)}
            print(json.dumps(row) if arguments.json else line(row), flush=True)
            wrong |= row["error"] is not None and not row["error"] <= suite.tolerance
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
