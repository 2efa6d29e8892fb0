"""`e88 bench` and `e88 report`: several models under one budget, and the page about them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e88.cli import EXIT_DIVERGED, EXIT_FAILED, app, options

if TYPE_CHECKING:
    from e88.report.tables import Row


@app.command()
def bench(
    presets: Annotated[list[str], typer.Argument(metavar="PRESET...", help="Presets or TOML files to compare.")],
    out: Annotated[Path, typer.Option(help="Folder of records, runs and the report.")] = Path("runs/bench"),
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    seconds: options.Seconds = None,
    steps: options.Steps = None,
    tokens: options.Tokens = None,
    flops: options.Flops = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model, with seeds 0, 1, ...")] = 1,
    batch_size: options.BatchSize = None,
    window: options.Window = None,
    set_: options.Set = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Compare models under equal budgets on equal data; done runs are kept, cut-off runs go on.

    Exit code 0 when every run is done, 3 when one diverged, 1 when one failed.
    """
    from e88.report import render
    from e88.report.tables import summary_rows
    from e88.runtime import choose_device
    from e88.study.launchers import LocalLauncher, local_slots
    from e88.study.live import LiveView
    from e88.study.plan import Planner, distinct
    from e88.study.scheduler import Interrupted, run_all
    from e88.study.spec import make_spec
    from e88.study.store import Store

    choose_device(device)
    values = {
        "seconds": seconds, "steps": steps, "tokens": tokens, "flops": flops,
        "batch_size": batch_size, "window": window,
    }  # fmt: skip
    given = options.training_options(values, set_)
    if "budget" not in given and not any(name.endswith(".toml") for name in presets):
        given["budget"] = {"seconds": 30.0}
    # Seed by seed, so that an interruption at any point leaves a comparison of all models.
    specs = [
        make_spec(name, {**given, "seed": seed}, data=data, tokenizer=tokenizer)
        for seed in range(seeds)
        for name in dict.fromkeys(presets)
    ]
    # Speed is part of the comparison, so that each runs alone.
    planner = Planner()
    runs = distinct(planner.plan(spec, exclusive=True) for spec in specs)
    launcher = LocalLauncher(local_slots(device=device), out)
    with LiveView() as view:
        try:
            run_all(runs, out, launcher, view, device=device, retry=("failed",), keep_checkpoints=True)
        except Interrupted as stop:
            view.message(str(stop))
            raise typer.Exit(130) from None
    ended = {record["id"]: record for record in (Store(out).records() if as_json else Store(out).summaries())}
    records = [ended[run.id] for run in runs]
    page, _ = render([out], out)
    _show(records, summary_rows(records), page, as_json)
    statuses = {record["status"] for record in records}
    if "failed" in statuses or "diverged" in statuses:
        raise typer.Exit(EXIT_FAILED if "failed" in statuses else EXIT_DIVERGED)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders or files of records.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page. Default: the first folder.")] = None,
    as_json: options.Json = False,
) -> None:
    """Make the table and the HTML page again, from records alone."""
    from e88.report import render
    from e88.study.store import load_records

    page, rows = render(folders, out or (folders[0] if folders[0].is_dir() else folders[0].parent))
    _show(load_records(folders) if as_json else [], rows, page, as_json)


def _show(records: list[dict[str, Any]], rows: list[Row], page: Path, as_json: bool) -> None:
    from e88.report.tables import render_terminal

    if as_json:
        for record in records:
            print(json.dumps(record))
    else:
        print(render_terminal(rows), end="")
    print(f"report: {page}", file=sys.stderr)
