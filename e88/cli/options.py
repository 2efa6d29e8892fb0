"""Options that several commands share, and how they become a training configuration."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Data = Annotated[str | None, typer.Option(help="Text file, folder, archive or prepared data.  [default: stdlib]")]
Tokenizer = Annotated[str | None, typer.Option(help="A Hugging Face tokenizer.json.  [default: bytes]")]
Seconds = Annotated[float | None, typer.Option(help="Budget of a run: seconds on the training clock.")]
Steps = Annotated[int | None, typer.Option(help="Budget of a run: optimiser steps.")]
Tokens = Annotated[int | None, typer.Option(help="Budget of a run: tokens.")]
Flops = Annotated[float | None, typer.Option(help="Budget of a run: training FLOPs.")]
BatchSize = Annotated[int | None, typer.Option(help="Windows per optimiser step; a preset has its own.")]
Window = Annotated[int | None, typer.Option(help="Tokens per window; a preset has its own.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other training key.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def training_options(values: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """The training keys given on the command line (those that are not None), `--set` pairs included, as
    `TrainingConfig.from_dict` takes them."""
    from e88.study.spec import parse_assignments

    given = {key: value for key, value in values.items() if value is not None}
    given |= parse_assignments(assignments or [])
    budget = {key: given.pop(key) for key in ("seconds", "steps", "tokens", "flops") if key in given}
    return {**given, "budget": budget} if budget else given
