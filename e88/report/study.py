"""The report of a study: its verdicts as a table for the terminal, as Markdown and as JSON. Never loads torch."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from e88.files import write_text
from e88.report.tables import Row, render_csv
from e88.report.tables import render_markdown as render_table
from e88.study.design import Experiment
from e88.study.findings import Frontier, ScalingLaw, frontiers, scaling_laws
from e88.study.frontier import Place
from e88.study.judge import judge
from e88.study.statistics import Estimate
from e88.study.store import Record
from e88.study.verdict import CONFIRMED, REFUTED, UNDECIDED, Verdict

# Columns where the output is no terminal.
PLAIN_WIDTH = 160
UNITS = {
    "heldout_bpb": "bits per byte",
    "train_loss": "nats per token",
    "tokens_per_second": "tok/s",
    "peak_memory_bytes": "bytes",
}
OUTCOMES = (CONFIRMED, REFUTED, UNDECIDED)


@dataclass(frozen=True)
class StudyReport:
    """title, scale: of the study. ended: runs by status, with `missing` for those without a record."""

    name: str
    title: str
    scale: str
    ended: dict[str, int]
    verdicts: tuple[Verdict, ...]
    laws: tuple[ScalingLaw, ...] = ()
    frontiers: tuple[Frontier, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return asdict(self)


def study_report(experiment: Experiment, records: Mapping[str, Record]) -> StudyReport:
    """The report of a study at one scale. records: by run id, curves not needed."""
    ended = Counter(records[run.id]["status"] if run.id in records else "missing" for run in experiment.runs)
    study = experiment.study
    return StudyReport(
        study.name, study.title, experiment.scale.name, dict(ended), tuple(judge(experiment, records)),
        tuple(scaling_laws(experiment, records)), tuple(frontiers(experiment, records)),
    )  # fmt: skip


def write_report(report: StudyReport, store: Path, rows: Sequence[Row] = ()) -> Path:
    """Write study-SCALE.json, .md and .csv (the models) and study-SCALE-claims.csv into the store; the path of .md."""
    base = store / f"study-{report.scale}"
    write_text(base.with_suffix(".json"), json.dumps(report.to_dict(), indent=1) + "\n")
    write_text(base.with_suffix(".csv"), render_csv(rows))
    write_text(store / f"study-{report.scale}-claims.csv", render_claims_csv(report))
    tables = "\n## Models\n\n" + render_table(rows) if rows else ""
    return write_text(base.with_suffix(".md"), render_markdown(report) + tables)


def headline(report: StudyReport) -> str:
    """One line: the study, and what became of its runs and claims."""
    stop = "" if report.title.endswith(("?", "!", ".")) else "."
    return f"{report.title}{stop} {counts_text(report)}"


def counts_text(report: StudyReport) -> str:
    """What became of the runs and of the claims."""
    counts = Counter(verdict.outcome for verdict in report.verdicts)
    claims = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]) or "none"
    runs = ", ".join(f"{count} {status}" for status, count in sorted(report.ended.items())) or "none"
    return f"Scale {report.scale}; runs: {runs}; claims: {claims}."


def estimate_text(verdict: Verdict) -> str:
    """The deciding figure with its interval and what it is held against."""
    estimate, threshold = verdict.estimate, verdict.threshold
    if estimate is None:
        return ""
    is_ratio = verdict.unit.startswith("ratio")
    against = f" against {number_text(threshold)}" if threshold or is_ratio else ""
    unit = UNITS.get(verdict.unit, verdict.unit)
    is_difference = not is_ratio and verdict.claim.form != "equals"
    return f"{rounded(estimate, is_difference)}{against} {unit}"


def rounded(estimate: Estimate, signed: bool = False) -> str:
    """The mean with its interval, in the digits that the interval allows: three of half its width."""
    if estimate.low is None or estimate.high is None or estimate.over == "exact" or estimate.low >= estimate.high:
        return number_text(estimate.mean, signed)
    decimals = 2 - math.floor(math.log10((estimate.high - estimate.low) / 2))

    def told(value: float, sign: str = "") -> str:
        return f"{round(value, decimals):{sign},.{max(decimals, 0)}f}"

    return f"{told(estimate.mean, '+' if signed else '')} ({told(estimate.low)} to {told(estimate.high)})"


def number_text(value: float | None, signed: bool = False) -> str:
    """A number in four digits, whole from ten thousand on."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"+{text}" if signed and value > 0 else text


def render_terminal(report: StudyReport, width: int | None = None) -> str:
    """The headline and the table of verdicts as plain text; `width` in columns, the terminal's where not given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Claim", "Verdict", "Scale", "Seeds", "Difference or ratio (95 %)", "Why"):
        table.add_column(title, overflow="fold")
    styles = {CONFIRMED: "green", REFUTED: "red", UNDECIDED: "yellow"}
    for verdict in report.verdicts:
        cells = [verdict.claim.name, verdict.outcome, scale_text(verdict), _seeds(verdict), estimate_text(verdict),
                 verdict.reason]  # fmt: skip
        table.add_row(*map(Text, cells), style=styles[verdict.outcome])
    out, terminal = io.StringIO(), Console()
    shown = terminal.is_terminal and width is None
    console = Console(file=out, width=terminal.width if shown else width or PLAIN_WIDTH, force_terminal=shown)
    console.print(Text(headline(report)))
    if report.verdicts:
        console.print(table)
    for line in [law_text(law) for law in report.laws] + [frontier_text(f) for f in report.frontiers]:
        console.print(Text(line))
    return out.getvalue()


def law_text(scaling: ScalingLaw) -> str:
    """A scaling law as a formula with the intervals of its exponents."""
    law = scaling.law
    terms = [number_text(law.floor.mean)] if law.floor else []
    terms += [
        f"{number_text(scale.mean)} ({variable}/{number_text(centre)})^-{rounded(exponent)}"
        for variable, centre, scale, exponent in zip(law.variables, law.centres, law.scales, law.exponents, strict=True)
    ]
    edge = "; the data do not determine the exponent" if law.at_edge else ""
    runs = law.exponents[0].n
    return f"{scaling.kind}, {scaling.where}: bits per byte = {' + '.join(terms)}, {runs} runs{edge}"


def frontier_text(frontier: Frontier) -> str:
    """Who is on a frontier, and who is not decided to be off it."""

    def named(places: list[Place]) -> str:
        return ", ".join(f"{place.name} ({number_text(place.cost)}, {place.loss:.4f})" for place in places)

    on = [place for place in frontier.places if place.on_frontier]
    near = [place for place in frontier.places if not place.on_frontier and not place.decided]
    text = f"{frontier.budget}, quality against {frontier.cost}: on the frontier {named(on)}"
    return text + (f"; not decided to be off it {named(near)}" if near else "")


def scale_text(verdict: Verdict) -> str:
    """Where a verdict was decided: the scale, and the budget there."""
    return f"{verdict.scale}, {verdict.at}" if verdict.at else verdict.scale


def _seeds(verdict: Verdict) -> str:
    return "" if verdict.scale == "exact" else str(verdict.seeds)


def render_markdown(report: StudyReport) -> str:
    """The headline and the verdicts with their statements, as GitHub Markdown."""
    lines = [f"# {report.title}", "", headline(report), ""]
    if report.scale != "full":
        lines += [
            f"At scale {report.scale} the models and budgets are small: a verdict is about them, not about the sizes "
            "in the statements. `exact` verdicts are counts of the full-size models.", "",
        ]  # fmt: skip
    lines += ["| Claim | Verdict | Scale | Seeds | Difference or ratio (95 %) | Why | Statement | Source |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for verdict in report.verdicts:
        claim = verdict.claim
        says = claim.says + (f" ({claim.note})" if claim.note else "")
        cells = [claim.name, f"**{verdict.outcome}**", scale_text(verdict), _seeds(verdict), estimate_text(verdict),
                 verdict.reason, says, claim.source]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for title, texts in (
        ("Scaling laws (95 % of the exponents)", [law_text(law) for law in report.laws]),
        ("Efficient frontiers (cost, bits per byte)", [frontier_text(f) for f in report.frontiers]),
    ):
        if texts:
            lines += ["", f"## {title}", "", *(f"- {text}" for text in texts)]
    return "\n".join(lines).rstrip() + "\n"


def render_claims_csv(report: StudyReport) -> str:
    """The verdicts as CSV with unrounded numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("claim", "says", "source", "note", "outcome", "scale", "mean", "low", "high", "threshold", "unit",
                     "seeds", "more_seeds", "reason"))  # fmt: skip
    for verdict in report.verdicts:
        claim, estimate = verdict.claim, verdict.estimate
        figures = (estimate.mean, estimate.low, estimate.high) if estimate else (None, None, None)
        writer.writerow((claim.name, claim.says, claim.source, claim.note, verdict.outcome, verdict.scale, *figures,
                         verdict.threshold, verdict.unit, verdict.seeds, verdict.more_seeds,
                         verdict.reason))  # fmt: skip
    return out.getvalue()
