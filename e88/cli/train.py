"""`e88 train`: one model, one budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from e88.cli import EXIT_DIVERGED, EXIT_FAILED, EXIT_USAGE, app, options
from e88.errors import UserError


@app.command()
def train(
    source: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset (see e88 presets) or a TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: log, checkpoint, record.")],
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    seconds: options.Seconds = None,
    steps: options.Steps = None,
    tokens: options.Tokens = None,
    flops: options.Flops = None,
    batch_size: options.BatchSize = None,
    window: options.Window = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts that a step's batch is cut into.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, schedulefree or muon.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; a preset has its own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation and data order.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto (bf16 on a GPU), bf16 or fp32.")] = None,
    backend: Annotated[str | None, typer.Option(help="Operator backend, or rival's library (see e88 doctor).")] = None,
    set_: options.Set = None,
    device: options.Device = "auto",
    parallel: Annotated[str | None, typer.Option(help="Under torchrun: ddp or fsdp.  [default: ddp]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    keep_checkpoint: Annotated[bool, typer.Option(help="Leave a checkpoint when the budget is spent.")] = True,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events into --out.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train one model under a budget of seconds, steps, tokens or FLOPs. Exit code 3 where it diverged."""
    from e88.data.corpus import open_corpus
    from e88.runtime import set_threads
    from e88.study.progress import Progress
    from e88.study.spec import make_spec
    from e88.training.distributed import RanksLost, joined
    from e88.training.loop import Interrupted
    from e88.training.loop import train as run_training

    values = {
        "seconds": seconds, "steps": steps, "tokens": tokens, "flops": flops, "batch_size": batch_size,
        "window": window, "accumulate": accumulate, "optimizer": optimizer, "lr": lr, "seed": seed,
        "precision": precision, "backend": backend,
    }  # fmt: skip
    given = options.training_options(values, set_)
    spec = make_spec(source, given, data=data, tokenizer=tokenizer)
    set_threads(threads)
    with joined(device, parallel) as group:
        try:
            corpus = group.agreed(lambda: open_corpus(spec.data, tokenizer=spec.tokenizer))
            spec = spec.with_vocabulary(corpus.vocab_size)
            with Progress(spec.name, corpus.bytes_per_token, quiet=not group.is_first) as progress:
                try:
                    record = run_training(
                        spec.model, spec.training, corpus, out, name=spec.name, group=group, resume=resume,
                        reporter=progress, tensorboard=tensorboard, keep_checkpoint=keep_checkpoint,
                    )  # fmt: skip
                except Interrupted as stop:
                    progress.message(str(stop))
                    raise typer.Exit(130) from None
        except UserError:
            # Every process has met it; one says so.
            if group.is_first:
                raise
            raise typer.Exit(EXIT_USAGE) from None
        except RanksLost as lost:
            if group.is_first_to_say("lost"):
                print(f"e88: error: {lost}", file=sys.stderr)
            raise typer.Exit(EXIT_FAILED) from None
        if group.is_first:
            print(json.dumps(record) if as_json else _summary(record, out, keep_checkpoint))
    if record["status"] == "diverged":
        raise typer.Exit(EXIT_DIVERGED)


def _summary(record: dict[str, Any], out: Path, kept: bool) -> str:
    results = record["results"]
    if record["status"] == "diverged":
        return f"{record['name']} diverged: {record['reason']}; see e88 replay {out}"
    low, high = results["heldout_interval"]
    left = "record and checkpoint" if kept else "record"
    lines = [
        f"{record['name']}: {record['model']['params']:,} parameters, seed {record['seed']}",
        f"  train loss {results['train_loss']:.4f} nats/token (mean of the last {results['train_loss_steps']} steps)",
        f"  held out   {results['heldout_bpb']:.4f} bits per byte (95 % over windows: {low:.4f} to {high:.4f})",
        f"  {results['steps']:,} steps, {results['tokens']:,} tokens in {results['seconds']:.1f} s, "
        f"{results['tokens_per_second']:,.0f} tok/s on {record['environment']['hardware']}",
        f"  backends: {', '.join(record['environment']['backends']) or 'torch only'}; {left} in {out}",
    ]
    return "\n".join(lines)
