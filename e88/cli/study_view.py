"""What `e88 study status` and `e88 study plan` print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from e88.sizing.closed_form import count_params
from e88.sizing.units import human_count
from e88.study.cost import UNKNOWN, Throughput
from e88.study.design import Experiment
from e88.study.live import progress_row, running_table
from e88.study.progress import duration
from e88.study.status import STATUSES, RunStatus

LISTED = 40


def show_status(rows: Sequence[RunStatus]) -> None:
    """Counts, what runs, and why others failed or diverged."""
    console = Console()
    counts = Counter(row.status for row in rows)
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    console.print(Text(f"{len(rows)} runs: {told or 'none'}"))
    begun = [row for row in rows if row.status in ("running", "queued", "interrupted")]
    if begun:
        console.print(running_table([_begun(row) for row in begun[:LISTED]]))
    troubled = [row for row in rows if row.status in ("failed", "diverged")]
    for row in troubled[:LISTED]:
        console.print(Text(f"{row.name}, seed {row.seed} ({row.id}): {row.status}: {row.reason}"))
    for name, listed in (("running, queued or interrupted", begun), ("failed or diverged", troubled)):
        if len(listed) > LISTED:
            console.print(Text(f"and {len(listed) - LISTED} more {name}; --json lists them all"))


def _begun(row: RunStatus) -> tuple[str, ...]:
    progress = row.progress or {}
    where = row.queue or row.status
    if row.status == "running":
        where = f"{progress.get('host', '')} {progress.get('where', '')}"
    return progress_row(f"{row.name}, seed {row.seed}", where.strip(), row.progress)


def plan_rows(experiment: Experiment, ended: Collection[str], throughput: Throughput) -> list[dict[str, Any]]:
    """One row for each model and budget: params, limit, runs, runs left, a run's seconds, their basis, and GPUs."""
    rows = []
    for model, budget in experiment.arms:
        runs = list(experiment.of(model, budget).values())
        left = [run.id for run in runs if run.id not in ended]
        # Runs that differ in their seed alone cost the same.
        cost = throughput.cost(runs[0])
        rows.append(
            {
                "model": model, "budget": budget, "params": count_params(experiment.configs[model]),
                "limit": runs[0].spec.training.budget.to_dict(), "runs": len(runs), "left": len(left),
                "seconds_each": cost.seconds, "basis": cost.basis, "gpus": runs[0].gpus, "ids_left": left,
            }
        )  # fmt: skip
    return rows


def show_plan(rows: Sequence[dict[str, Any]], hardware: str) -> None:
    """The rows, and the total in hours of one GPU (or of one slot of the processor)."""
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in ("Model", "Budget", "Params", "Runs", "Left", "A run", "From"):
        table.add_column(title, justify="left" if title in ("Model", "Budget", "From") else "right", overflow="fold")
    for row in rows:
        ((unit, amount),) = row["limit"].items()
        limit = f"{amount:g} s" if unit == "seconds" else f"{human_count(amount)} {unit}"
        each = "" if row["seconds_each"] is None else duration(row["seconds_each"])
        cells = [row["model"], f"{row['budget']}: {limit}", human_count(row["params"]), str(row["runs"]),
                 str(row["left"]), each, row["basis"]]  # fmt: skip
        table.add_row(*map(Text, cells))
    console.print(table)
    # Runs that two rows share are done once.
    left = {run: row for row in rows for run in row["ids_left"]}
    known = [row["seconds_each"] * row["gpus"] for row in left.values() if row["seconds_each"] is not None]
    hours = math.fsum(known) / 3600
    where = f" on {hardware}" if hardware else ""
    console.print(Text(f"{len(left)} runs left, {hours:.2f} hours of one GPU or slot{where}"))
    if any(row["basis"] == UNKNOWN for row in rows):
        unknown = len(left) - len(known)
        console.print(Text(f"{unknown} of them have no measured throughput to go by; give records with --measured"))
