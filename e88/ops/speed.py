"""How long the operator takes on this machine, at given shapes and never for a backend that is wrong there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from e88.ops import record_backends, tanh_delta_rule
from e88.ops.accuracy import TOLERANCE, Inputs, Shape, check, draw, worst

# Runs between two device events.
QUEUED = 10
# Every shape is timed in turns, so that a disturbance does not meet one alone.
TURNS = 3
MOST_STEPS = 128


def as_a_model_calls_it(shape: Shape, device: str | torch.device, dtype: torch.dtype) -> Inputs:
    """Random inputs without a write gate, the decay in float32."""
    inputs = draw(shape, device, dtype, gate=False)
    q, k, v, g = inputs.operands
    return inputs._replace(operands=(q, k, v, g.detach().float().requires_grad_()))


def forward(inputs: Inputs, backend: str = "auto") -> None:
    with torch.no_grad():
        tanh_delta_rule(*inputs.operands, backend=backend)


def forward_and_backward(inputs: Inputs, backend: str = "auto") -> None:
    y, _ = tanh_delta_rule(*inputs.operands, backend=backend)
    torch.autograd.grad(y, inputs.operands, inputs.dy)


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Time of one run: between device events on a GPU, on the host's clock elsewhere.

    On a GPU runs are queued behind one another, as in training, so that launching does not count unless it is slower.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The first event is reached while the device is at work, or it would wait for the first launch.
            run()
            start.record()
            for _ in range(QUEUED):
                run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / QUEUED
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def shortened(shape: Shape) -> Shape:
    """The shape with few enough steps for a check in float64. Rows and heads stay: kernels are planned by them."""
    return shape._replace(T=min(shape.T, MOST_STEPS))


def profile(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, seconds: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Check each shape against float64, then time forward, and forward with backward, for about `seconds` each.

    Returns a row for each shape: backend (that `auto` takes), error (largest relative error), skipped (why there is no
    time, or None), and the medians forward_ms and forward_backward_ms. Each of the 1 + TURNS pieces of work a shape is
    told when it is done.
    """
    rows: list[dict[str, Any]] = [{"backend": None, "error": None, "skipped": None} for _ in shapes]
    for shape, row in zip(shapes, rows, strict=True):
        with _memory_may_lack(row):
            row |= _checked(shape, device, dtype)
        tell(f"checked {shape}")
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(TURNS):
        for i, (shape, row) in enumerate(zip(shapes, rows, strict=True)):
            if row["skipped"] is None:
                with _memory_may_lack(row):
                    inputs = as_a_model_calls_it(shape, device, dtype)
                    for key, run in (("forward_ms", forward), ("forward_backward_ms", forward_and_backward)):
                        taken = times.setdefault((i, key), [])
                        taken += _repeated(partial(run, inputs), device, seconds / TURNS)
                        row[key] = statistics.median(taken)
            tell(f"timed {shape}")
    return rows


@contextmanager
def _memory_may_lack(row: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        row["skipped"] = "out of memory; take a smaller batch or window"
        torch.cuda.empty_cache()


def _checked(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    with record_backends() as used:
        _, error = worst(check(shortened(shape), device, dtype, gate=False))
    # The float64 side of the check runs on the plain backend, which is no news.
    backend = "/".join(sorted(used - {"checkpointed"})) or "checkpointed"
    wrong = None if error <= TOLERANCE[dtype] else f"wrong: error {error:.1e} above {TOLERANCE[dtype]:.0e}"
    return {"backend": backend, "error": error, "skipped": wrong}


def _repeated(run: Callable[[], None], device: torch.device, seconds: float) -> list[float]:
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(milliseconds(run, device))
    return times
