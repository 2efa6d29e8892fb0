"""`e88 profile`: what a size of state costs on this machine."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e88.cli import EXIT_FAILED, app, options
from e88.errors import UserError, unknown_name

if TYPE_CHECKING:
    import torch

N_STATES = (8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128)
DTYPES = ("bfloat16", "float16", "float32")
# What `--dtype`, `--batch-size`, `--window` and `--d-inner` are where they are not given.
DEFAULTS = {"cpu": ("float32", (2, 128, 960)), "cuda": ("bfloat16", (32, 512, 1792))}
LINE_EVERY = 10.0


@app.command()
def profile(
    n_state: Annotated[list[int] | None, typer.Option(help="State widths.  [default: 8 to 128, eleven]")] = None,
    d_inner: Annotated[int | None, typer.Option(help="Heads times n_state.  [default: 960; on a GPU 1792]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows.  [default: 2; on a GPU 32]")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a row.  [default: 128; on a GPU 512]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16, float32.  [default: float32; bfloat16]")] = None,
    seconds: Annotated[float, typer.Option(help="Timing for each n_state and direction.")] = 0.5,
    device: options.Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write FILE.json and FILE.svg here, not to the cache.")] = None,
    as_json: options.Json = False,
) -> None:
    """Time the recurrence over sizes of state at equal d_inner, for `e88 size --hardware auto`.

    Every size is first compared with float64; one that is wrong gets no time, and the exit code is 1.
    """
    from e88.files import write_text
    from e88.report.profile import profile_figure
    from e88.runtime import choose_device, set_threads
    from e88.sizing import profiles

    set_threads(threads)
    where = choose_device(device)
    usual_dtype, usual_sizes = DEFAULTS[where.type]
    dtype = usual_dtype if dtype is None else dtype
    batch_size, window, d_inner = (
        default if given is None else given
        for given, default in zip((batch_size, window, d_inner), usual_sizes, strict=True)
    )
    states = sorted(set(n_state or N_STATES))
    _refuse(states, d_inner, dtype, output, min(batch_size, window), seconds)
    result = _measure(states, d_inner, dtype, batch_size, window, where, seconds)
    if not as_json:
        _show(result)
    wrong = [row["n_state"] for row in result["rows"] if row["skipped"] is not None]
    if len(wrong) == len(result["rows"]):
        raise UserError(f"no n_state could be timed ({result['rows'][0]['skipped']}); see e88 doctor --kernels")
    path = profiles.store(result, output or profiles.default_path(result))
    best = profiles.recommend(path)
    figure = write_text(path.with_suffix(".svg"), profile_figure(result, (best.low, best.high)))
    if as_json:
        print(json.dumps(result | {"path": str(path), "figure": str(figure), "recommended": [best.low, best.high]}))
    else:
        span = str(best.low) if best.low == best.high else f"{best.low}-{best.high}"
        print(f"recommended n_state {span}: {best.reason}")
        print(f"profile: {path}\nfigure: {figure}")
    if wrong:
        raise typer.Exit(EXIT_FAILED)


def _refuse(states: list[int], d_inner: int, dtype: str, output: Path | None, smallest: int, seconds: float) -> None:
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if states[0] < 1 or states[-1] > 256:
        raise UserError(f"n_state must be 1 to 256, got {states[0] if states[0] < 1 else states[-1]}")
    if d_inner < states[-1]:
        raise UserError(f"d_inner {d_inner} holds no head of {states[-1]}; use --d-inner {states[-1]} or more")
    if smallest < 1 or seconds < 0:
        raise UserError("batch size and window must be at least 1, and seconds at least 0")
    if output is not None and output.suffix != ".json":
        raise UserError(f"--output {output} must end in .json; the figure goes beside it")


def _measure(
    states: list[int], d_inner: int, dtype: str, batch_size: int, window: int, device: torch.device, seconds: float
) -> dict[str, Any]:
    import torch

    from e88 import runtime
    from e88.ops.accuracy import Shape
    from e88.ops.speed import TURNS
    from e88.ops.speed import profile as measure
    from e88.sizing.profiles import SCHEMA

    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    shapes = [Shape(batch_size, window, d_inner // n, n, n) for n in states]
    with _Progress((1 + TURNS) * len(shapes)) as progress:
        measured = measure(shapes, device, getattr(torch, dtype), seconds, progress.advance)
    rows = []
    for shape, found in zip(shapes, measured, strict=True):
        row: dict[str, Any] = {"n_state": shape.K, "heads": shape.H, "d_inner": shape.H * shape.K}
        row |= {key: found[key] for key in ("backend", "error", "skipped")}
        if row["skipped"] is None:
            for key in ("forward", "forward_backward"):
                row[f"{key}_ns"] = 1e6 * found[f"{key}_ms"] / (batch_size * window)
            row["ns_per_element"] = row["forward_backward_ns"] / (shape.H * shape.K * shape.V)
        rows.append(row)
    backends = sorted({row["backend"] for row in rows if row["backend"]})
    return {
        "schema": SCHEMA, "date": started, "device": runtime.hardware_name(device), "dtype": dtype,
        "batch_size": batch_size, "window": window, "d_inner": d_inner, "seconds": seconds,
        "environment": runtime.environment(device, backends), "rows": rows,
    }  # fmt: skip


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; on stderr."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("loading", total=total)
        self.last_line = time.monotonic()

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, done: str) -> None:
        self.bar.update(self.task, advance=1, description=done)
        if self.bar.disable and time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            task = self.bar.tasks[0]
            self.console.print(f"{done} ({task.completed:.0f} of {task.total:.0f})", soft_wrap=True)


def _show(result: dict[str, Any]) -> None:
    """The table on standard output."""
    shape = f"{result['batch_size']} x {result['window']} tokens, d_inner {result['d_inner']}"
    print(f"{result['device']}, {result['dtype']}, {shape}; nanoseconds per token of one layer")
    head = f"{'n_state':>7} {'heads':>5} {'d_inner':>7} {'forward':>10} {'fwd + bwd':>10} {'per element':>11}"
    print(f"{head}  {'backend':<13} error")
    for row in result["rows"]:
        start = f"{row['n_state']:>7} {row['heads']:>5} {row['d_inner']:>7}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        if row["skipped"] is not None:
            print(f"{start} {row['skipped']}")
            continue
        times = f"{row['forward_ns']:>10.2f} {row['forward_backward_ns']:>10.2f} {row['ns_per_element']:>11.3g}"
        print(f"{start} {times}  {row['backend']:<13} {error}")
