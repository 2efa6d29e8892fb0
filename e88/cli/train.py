"""`e88 train`: one model, one budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from e88.cli import EXIT_DIVERGED, app


def training_options(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Options given on the command line (those that are not None), `--set` pairs included, budget gathered."""
    from e88.study.spec import parse_assignments

    given = {key: value for key, value in values.items() if value is not None}
    budget = {key: given.pop(key) for key in ("seconds", "steps", "tokens", "flops") if key in given}
    if budget:
        given["budget"] = budget
    return {**given, **parse_assignments(assignments)}


@app.command()
def train(
    source: Annotated[str, typer.Argument(metavar="PRESET|FILE.toml", help="A preset (see e88 presets) or a TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: log, checkpoint, record.")],
    data: Annotated[Optional[str], typer.Option(help="Text file, folder, archive, or prepared data. Default: stdlib.")] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="A Hugging Face tokenizer.json. Default: bytes.")] = None,
    seconds: Annotated[Optional[float], typer.Option(help="Budget: seconds on the training clock.")] = None,
    steps: Annotated[Optional[int], typer.Option(help="Budget: optimiser steps.")] = None,
    tokens: Annotated[Optional[int], typer.Option(help="Budget: tokens.")] = None,
    flops: Annotated[Optional[float], typer.Option(help="Budget: training FLOPs.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Windows per optimiser step.")] = None,
    window: Annotated[Optional[int], typer.Option(help="Tokens per window.")] = None,
    accumulate: Annotated[Optional[int], typer.Option(help="Parts that a step's batch is cut into.")] = None,
    optimizer: Annotated[Optional[str], typer.Option(help="adamw, schedulefree or muon.")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of initialisation and data order.")] = None,
    precision: Annotated[Optional[str], typer.Option(help="auto (bf16 on a GPU), bf16 or fp32.")] = None,
    backend: Annotated[Optional[str], typer.Option(help="Operator backend (see e88 doctor).")] = None,
    set_: Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Any other training key.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[Optional[int], typer.Option(help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events into --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Train one model under a budget of seconds, steps, tokens or FLOPs. Exit code 3 where it diverged."""
    from e88.data.corpus import open_corpus
    from e88.runtime import choose_device, set_threads
    from e88.study.progress import Progress
    from e88.study.spec import make_spec
    from e88.training.loop import Interrupted
    from e88.training.loop import train as run_training

    values = {
        "seconds": seconds, "steps": steps, "tokens": tokens, "flops": flops, "batch_size": batch_size,
        "window": window, "accumulate": accumulate, "optimizer": optimizer, "lr": lr, "seed": seed,
        "precision": precision, "backend": backend,
    }  # fmt: skip
    spec = make_spec(source, training_options(values, set_ or []), data=data, tokenizer=tokenizer)
    set_threads(threads)
    where = choose_device(device)
    corpus = open_corpus(spec.data, tokenizer=spec.tokenizer)
    with Progress(spec.name, corpus.bytes_per_token) as progress:
        try:
            record = run_training(
                spec.model, spec.training, corpus, out, name=spec.name, device=where, resume=resume,
                reporter=progress, tensorboard=tensorboard,
            )  # fmt: skip
        except Interrupted as stop:
            progress.message(str(stop))
            raise typer.Exit(130) from None
    print(json.dumps(record) if as_json else _summary(record, out))
    if record["status"] == "diverged":
        raise typer.Exit(EXIT_DIVERGED)


def _summary(record: dict[str, Any], out: Path) -> str:
    results = record["results"]
    if record["status"] == "diverged":
        return f"{record['name']} diverged: {record['reason']}; the last good checkpoint and the record are in {out}"
    low, high = results["heldout_interval"]
    lines = [
        f"{record['name']}: {record['model']['params']:,} parameters, seed {record['seed']}",
        f"  train loss {results['train_loss']:.4f} nats/token (mean of the last {results['train_loss_steps']} steps)",
        f"  held out   {results['heldout_bpb']:.4f} bits per byte (95 % interval {low:.4f} to {high:.4f}, over windows)",
        f"  {results['steps']:,} steps, {results['tokens']:,} tokens in {results['seconds']:.1f} s, "
        f"{results['tokens_per_second']:,.0f} tok/s on {record['environment']['hardware']}",
        f"  backends: {', '.join(record['environment']['backends']) or 'torch only'}; record and checkpoint in {out}",
    ]
    return "\n".join(lines)
