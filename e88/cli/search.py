"""`e88 search`: the best shape of a parameter count, and its learning rate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e88.cli import EXIT_FAILED, app, options
from e88.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from e88.study.search import Search, Space
    from e88.study.spec import RunSpec

LISTED = 20


@app.command()
def search(
    source: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="An E88 preset or TOML file: all the rest.")],
    params: Annotated[str | None, typer.Option(help="Parameters, such as 300k.  [default: the source's]")] = None,
    out: Annotated[Path, typer.Option(help="The store: trials, records, Optuna's journal.")] = Path("runs/search"),
    trials: Annotated[int, typer.Option(min=1, help="Trials in all; more of them later go on.")] = 20,
    depth: Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="[default: half to twice the source's]")] = None,
    ratio: Annotated[str, typer.Option(metavar="LOW:HIGH", help="n_heads * n_state / dim.")] = "0.5:2",
    n_state: Annotated[str, typer.Option(metavar="N,...", help="States to try.")] = "16,32,64",
    lr: Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="[default: a quarter to 4 x the source's]")] = None,
    tolerance: Annotated[float, typer.Option(min=0.001, max=0.5, help="Of the parameters, relative.")] = 0.03,
    sampler: Annotated[str, typer.Option(help="tpe or cmaes.")] = "tpe",
    prune: Annotated[bool, typer.Option(help="End trials that are worse than the median on the way.")] = True,
    points: Annotated[int, typer.Option(min=0, help="Held-out evaluations on the way.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    seconds: options.Seconds = None,
    steps: options.Steps = None,
    tokens: options.Tokens = None,
    flops: options.Flops = None,
    batch_size: options.BatchSize = None,
    window: options.Window = None,
    set_: options.Set = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Trials at once on the CPU.  [default: one a core]")] = None,
    gpus: Annotated[str | None, typer.Option(help="GPUs to use, 0,1,... or all.")] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Search dim, depth, heads, n_state and learning rate at a fixed parameter count and budget, with Optuna.

    The same command goes on after a stop or a kill. A budget in seconds runs one trial at a time on the CPU.
    """
    from e88.sizing.closed_form import count_params
    from e88.sizing.units import parse_count
    from e88.study.launchers import LocalLauncher, local_slots
    from e88.study.live import LiveView
    from e88.study.plan import Planner
    from e88.study.scheduler import Interrupted, run_all
    from e88.study.search import Search, lock_store, rows
    from e88.study.spec import make_spec

    values = {
        "seconds": seconds, "steps": steps, "tokens": tokens, "flops": flops, "batch_size": batch_size,
        "window": window, "eval_points": points,
    }  # fmt: skip
    given = options.training_options(values, set_)
    if "budget" not in given and not source.endswith(".toml"):
        given["budget"] = {"seconds": 30.0}
    # Planned, so that it has the vocabulary of its data.
    base = Planner().plan(make_spec(source, given, data=data, tokenizer=tokenizer)).spec
    target = parse_count(params) if params else count_params(base.model)
    places = local_slots(slots=slots, gpus=gpus, device=device)
    # What is trained in a given time is comparable only where nothing else takes the processor's.
    exclusive = base.training.budget.seconds is not None
    at_once = 1 if exclusive and not places[0].on_gpu else len(places)
    with lock_store(out):
        found = Search(
            base, target, tolerance, _space(base, depth, ratio, n_state, lr), out, trials=trials, slots=at_once,
            exclusive=exclusive, sampler=sampler, prune=prune, seed=seed,
        )  # fmt: skip
        with LiveView(lambda: _table(rows(found))) as view:
            try:
                run_all([], out, LocalLauncher(places, out), view, device=device, feed=found.feed)
            except Interrupted as stop:
                view.message(str(stop))
                raise typer.Exit(130) from None
        _show(found, rows(found), out, as_json)
    if found.best() is None:
        raise typer.Exit(EXIT_FAILED)


def _space(base: RunSpec, depth: str | None, ratio: str, n_state: str, lr: str | None) -> Space:
    from e88.models.config import E88Config
    from e88.study.search import Space

    if not isinstance(base.model.mixer, E88Config):
        raise UserError(f"e88 search is for E88 models, not for {base.model.mixer.kind}; give an e88 preset or file")
    middle, rate = base.model.depth, base.training.lr
    return Space(
        depth=_range(depth or f"{max(middle // 2, 1)}:{2 * middle}", "depth", int, 1, 512),
        ratio=_range(ratio, "ratio", float, 0.05, 20.0),
        n_state=_states(n_state),
        lr=_range(lr or f"{rate / 4:g}:{min(rate * 4, 10):g}", "lr", float, 1e-8, 10.0),
    )


def _range(text: str, name: str, kind: type, least: float, most: float) -> tuple[Any, Any]:
    """`LOW:HIGH`, or one value, as two numbers. UserError where it is none or reaches beyond least and most."""
    low, _, high = text.partition(":")
    try:
        found = kind(low), kind(high or low)
    except ValueError as error:
        raise UserError(f"--{name} '{text}' is not LOW:HIGH; write for instance --{name} {least:g}:{most:g}") from error
    if not least <= found[0] <= found[1] <= most:
        raise UserError(f"--{name} {text} must go up, within {least:g} and {most:g}")
    return found


def _states(text: str) -> tuple[int, ...]:
    """`16,32,64` as ascending numbers."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise UserError(f"--n-state '{text}' is not a list of numbers; write for instance --n-state 16,32") from error
    if found[0] < 1 or found[-1] > 256:
        raise UserError(f"--n-state {text} must be within 1 and 256")
    return found


def _show(found: Search, listed: list[dict[str, Any]], out: Path, as_json: bool) -> None:
    from rich.console import Console

    from e88.study.spec import to_toml

    best = found.best()
    spec = found.spec(best.params, f"{found.base.name}-best") if best else None
    text = ""
    if spec:
        text = to_toml(spec)
        (out / "best.toml").write_text(text)
    if as_json:
        print(json.dumps({"best": spec.to_dict() if spec else None, "trials": listed}))
        return
    Console().print(_table(listed))
    if spec is None or best is None:
        print("no trial was done")
        return
    print(f"# trial {best.number}: {best.user_attrs['bpb']:.4f} held-out bits per byte")
    print(text, end="")
    print(f"best: e88 train {out / 'best.toml'} --out {out / 'best'}", file=sys.stderr)


def _table(listed: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    from e88.sizing.units import human_count

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Trial", "Bits/byte", "Dim", "Depth", "Heads", "n_state", "Params", "lr", "Status"):
        table.add_column(title, justify="left" if title == "Status" else "right")
    for row in listed[:LISTED]:
        bpb = "" if row["bpb"] is None else f"{row['bpb']:.4f}"
        cells = (row["trial"], bpb, row["dim"], row["depth"], row["heads"], row["n_state"], human_count(row["params"]),
                 f"{row['lr']:.2g}", row["status"])  # fmt: skip
        table.add_row(*map(str, cells))
    return table
