"""`e88 replay`: the step at which a run diverged, once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e88.cli import app, options

if TYPE_CHECKING:
    from e88.training.replay import Replay


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that diverged, or its bad_step file.")],
    device: options.Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    as_json: options.Json = False,
) -> None:
    """Repeat the step at which a run diverged and name the first tensor that went wrong, layer by layer."""
    from e88.runtime import choose_device, set_threads
    from e88.study.store import finite
    from e88.training.replay import replay as repeat

    set_threads(threads)
    found = repeat(run, choose_device(device))
    if as_json:
        print(json.dumps(finite(found.to_dict())))
    else:
        _show(found)


def _show(found: Replay) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, meta, now = Console(), found.meta, found.trace
    repeats = "repeated exactly" if found.repeats else f"repeated as {now.loss:.6g}, {now.grad_norm:.6g}"
    console.print(Text(f"{meta['name']}, seed {meta['seed']}, step {meta['step']}: loss {meta['loss']:.6g}, "
                       f"gradient norm {meta['grad_norm']:.6g}, {repeats}"), soft_wrap=True)  # fmt: skip
    told = f"first not finite: {now.first}" if now.first else "every tensor of the step is finite here"
    console.print(Text(told), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    titles = ("Layer", "Largest output", "NaN", "Infinite", "Largest |S|", "Saturated", "Gradient")
    for title in titles:
        table.add_column(title, justify="left" if title == "Layer" else "right")
    for row in found.rows():
        output = row["output"]
        cells = [row["layer"], _number(output.largest), _share(output.nan), _share(output.inf),
                 _number(row.get("state_max")), _share(row.get("saturated")),
             _number(row.get("grad_norm"))]  # fmt: skip
        table.add_row(*map(Text, cells))
    console.print(table)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.1%}"
