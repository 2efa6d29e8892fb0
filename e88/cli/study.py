"""`e88 study`: scaling studies as executable claims."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e88.cli import EXIT_FAILED, app, options
from e88.errors import UserError

if TYPE_CHECKING:
    from e88.study.design import Experiment
    from e88.study.launchers import Launcher

study = typer.Typer(
    help="Scaling studies: runs and claims from one TOML file (see studies/).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(study, name="study")

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="A study's TOML file.")]
Scale = Annotated[str, typer.Option(help="One of the spec's scales.")]
Out = Annotated[Path | None, typer.Option(help="The store.  [default: runs/NAME of the spec]")]
Claims = Annotated[list[str] | None, typer.Option("--claim", metavar="NAME", help="Only these claims (* and ?).")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds of each run.  [default: the scale's]")]
Slots = Annotated[int | None, typer.Option(min=1, help="Runs at once on the CPU.  [default: one a core]")]
LauncherName = Annotated[str, typer.Option("--launcher", help="Where runs start: local or slurm.")]
Slurm = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of SLURM jobs: partition, timeout_min.")]
Jobs = Annotated[int, typer.Option(min=1, help="SLURM jobs in the queue at once.")]
Gpus = Annotated[str | None, typer.Option(help="GPUs to use, 0,1,... or all.  [default: all, with --device cuda]")]


@study.command()
def run(
    spec: Spec,
    scale: Scale = "smoke",
    out: Out = None,
    claim: Claims = None,
    seeds: Seeds = None,
    data: options.Data = None,
    launcher: LauncherName = "local",
    slots: Slots = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
    jobs: Jobs = 64,
    device: options.Device = "auto",
    keep_checkpoints: Annotated[bool, typer.Option(help="Keep the checkpoints of runs that are done.")] = False,
    as_json: options.Json = False,
) -> None:
    """Do every run that has no record yet, then print the verdicts. Repeat it after an interruption; it goes on.

    Exit code 0 when every run ended, 1 when one failed. Diverged runs are results.
    """
    experiment, store = _experiment(spec, scale, out, claim, seeds, data)
    chosen = make_launcher(store, device, experiment.study.slurm, launcher, slots, gpus, slurm, jobs)
    _run(experiment, store, chosen, device, keep_checkpoints, as_json, retry=())


@study.command()
def retry(
    spec: Spec,
    scale: Scale = "smoke",
    out: Out = None,
    claim: Claims = None,
    seeds: Seeds = None,
    data: options.Data = None,
    launcher: LauncherName = "local",
    slots: Slots = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
    jobs: Jobs = 64,
    device: options.Device = "auto",
    keep_checkpoints: Annotated[bool, typer.Option(help="Keep the checkpoints of runs that are done.")] = False,
    diverged: Annotated[bool, typer.Option("--diverged", help="Diverged runs too, from their start.")] = False,
    as_json: options.Json = False,
) -> None:
    """As `run`, trying failed runs again."""
    again = ("failed", "diverged") if diverged else ("failed",)
    experiment, store = _experiment(spec, scale, out, claim, seeds, data)
    chosen = make_launcher(store, device, experiment.study.slurm, launcher, slots, gpus, slurm, jobs)
    _run(experiment, store, chosen, device, keep_checkpoints, as_json, retry=again)


@study.command()
def status(
    spec: Spec,
    scale: Scale = "smoke",
    out: Out = None,
    claim: Claims = None,
    seeds: Seeds = None,
    data: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """What is done, what runs where, and what is left."""
    from e88.study.status import statuses

    experiment, store = _experiment(spec, scale, out, claim, seeds, data)
    found = statuses(experiment.runs, store)
    if as_json:
        print(json.dumps([row.to_dict() for row in found]))
        return
    from e88.cli.study_view import show_status

    show_status(found)


@study.command()
def plan(
    spec: Spec,
    scale: Scale = "smoke",
    out: Out = None,
    claim: Claims = None,
    seeds: Seeds = None,
    data: options.Data = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Records to take throughput from.  [default: the store]")
    ] = None,
    hardware: Annotated[str, typer.Option(help="Part of the name of the hardware to estimate for.")] = "",
    as_json: options.Json = False,
) -> None:
    """What would run, and its cost from measured throughput."""
    from e88.cli.study_view import plan_rows, show_plan
    from e88.study.cost import Throughput
    from e88.study.store import Store

    experiment, store = _experiment(spec, scale, out, claim, seeds, data)
    records = Store(store).summaries()
    ended = {record["id"] for record in records}
    for path in measured or []:
        records += Store(path).summaries()
    throughput = Throughput(records, hardware)
    rows = plan_rows(experiment, ended, throughput)
    if as_json:
        print(json.dumps({"hardware": throughput.hardware, "models": rows}))
    else:
        show_plan(rows, throughput.hardware)


@study.command()
def report(
    spec: Spec,
    scale: Scale = "smoke",
    out: Out = None,
    claim: Claims = None,
    seeds: Seeds = None,
    data: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """The verdicts, from the records alone; the page study-SCALE.html goes into the store, .md, .csv, .json beside."""
    experiment, store = _experiment(spec, scale, out, claim, seeds, data)
    _report(experiment, store, as_json)


def _experiment(
    spec: Path, scale: str, out: Path | None, claims: list[str] | None, seeds: int | None, data: str | None
) -> tuple[Experiment, Path]:
    from e88.study.design import load_study

    loaded = load_study(spec, data=data)
    return loaded.at(scale, claims=claims or (), seeds=seeds), out or Path("runs") / loaded.name


def _run(
    experiment: Experiment,
    store: Path,
    launcher: Launcher,
    device: str,
    keep_checkpoints: bool,
    as_json: bool,
    *,
    retry: tuple[str, ...],
) -> None:
    from e88.study.live import LiveView
    from e88.study.scheduler import Interrupted, run_all

    with LiveView() as view:
        what = f"scale {experiment.scale.name}, {len(experiment.runs)} runs, {launcher.describe()}"
        view.message(f"{experiment.study.title}: {what}")
        try:
            records = run_all(
                experiment.runs, store, launcher, view, device=device, retry=retry, keep_checkpoints=keep_checkpoints
            )
        except Interrupted as stop:
            view.message(str(stop))
            raise typer.Exit(130) from None
    _report(experiment, store, as_json)
    if any(record["status"] == "failed" for record in records.values()):
        raise typer.Exit(EXIT_FAILED)


def make_launcher(
    store: Path,
    device: str,
    of_spec: Mapping[str, Any],
    name: str,
    slots: int | None,
    gpus: str | None,
    slurm: list[str] | None,
    jobs: int,
) -> Launcher:
    """The launcher of a name; of_spec: the spec's options of SLURM jobs. UserError for options that are another's."""
    from e88.study.launchers import LocalLauncher, local_slots
    from e88.study.slurm import SlurmLauncher
    from e88.study.spec import parse_assignments

    if name == "local":
        if slurm:
            raise UserError("--slurm is for --launcher slurm; leave it out, or add that")
        return LocalLauncher(local_slots(slots=slots, gpus=gpus, device=device), store)
    if name != "slurm":
        raise UserError(f"unknown launcher '{name}'; known: local, slurm")
    if slots or gpus:
        raise UserError(
            "--slots and --gpus are for --launcher local; jobs ask SLURM, for instance --slurm gpus_per_node=1"
        )
    options = {**of_spec, **parse_assignments(slurm or [])}
    return SlurmLauncher(store, most=jobs, options={**options, "gpus_per_node": 0} if device == "cpu" else options)


def _report(experiment: Experiment, store: Path, as_json: bool) -> None:
    from e88.report.study import render_terminal
    from e88.report.study_page import report_study

    result, path = report_study(experiment, store)
    print(json.dumps(result.to_dict()) if as_json else render_terminal(result), end="\n" if as_json else "")
    print(f"report: {path}", file=sys.stderr)
