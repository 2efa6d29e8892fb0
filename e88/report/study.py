"""The report of a study: its verdicts as a table for the terminal, as Markdown and as JSON. Never loads torch."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from e88.files import write_text
from e88.study.design import Experiment
from e88.study.findings import Frontier, ScalingLaw, frontiers, scaling_laws
from e88.study.frontier import Place
from e88.study.judge import judge
from e88.study.statistics import Estimate
from e88.study.store import Record
from e88.study.verdict import CONFIRMED, REFUTED, UNDECIDED, Verdict

# Columns where the output is no terminal.
PLAIN_WIDTH = 160
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


def write_report(report: StudyReport, store: Path) -> Path:
    """Write study-SCALE.json and study-SCALE.md into the store; the path of the latter."""
    write_text(store / f"study-{report.scale}.json", json.dumps(report.to_dict(), indent=1) + "\n")
    return write_text(store / f"study-{report.scale}.md", render_markdown(report))


def headline(report: StudyReport) -> str:
    """One line: what became of the runs and of the claims."""
    counts = Counter(verdict.outcome for verdict in report.verdicts)
    claims = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]) or "none"
    runs = ", ".join(f"{count} {status}" for status, count in sorted(report.ended.items())) or "none"
    return f"{report.title}. Scale {report.scale}; runs: {runs}; claims: {claims}."


def estimate_text(verdict: Verdict) -> str:
    """The deciding figure with its interval and what it is held against."""
    estimate, threshold = verdict.estimate, verdict.threshold
    if estimate is None:
        return ""
    is_ratio = verdict.unit.startswith("ratio")
    against = f" against {_number(threshold)}" if threshold or is_ratio else ""
    is_difference = not is_ratio and verdict.claim.form != "equals"
    return f"{_number(estimate.mean, is_difference)}{_interval(estimate)}{against} {verdict.unit}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or estimate.over == "exact":
        return ""
    return f" ({_number(estimate.low)} to {_number(estimate.high)})"


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
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
        cells = [verdict.claim.name, verdict.outcome, _scale(verdict), _seeds(verdict), estimate_text(verdict),
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
    terms = [_number(law.floor.mean)] if law.floor else []
    terms += [
        f"{_number(scale.mean)} ({variable}/{_number(centre)})^-{_number(exponent.mean)}{_interval(exponent)}"
        for variable, centre, scale, exponent in zip(law.variables, law.centres, law.scales, law.exponents, strict=True)
    ]
    edge = "; the data do not determine the exponent" if law.at_edge else ""
    runs = law.exponents[0].n
    return f"{scaling.kind}, {scaling.where}: bits per byte = {' + '.join(terms)}, {runs} runs{edge}"


def frontier_text(frontier: Frontier) -> str:
    """Who is on a frontier, and who is not decided to be off it."""

    def named(places: list[Place]) -> str:
        return ", ".join(f"{place.name} ({_number(place.cost)}, {place.loss:.4f})" for place in places)

    on = [place for place in frontier.places if place.on_frontier]
    near = [place for place in frontier.places if not place.on_frontier and not place.decided]
    text = f"{frontier.budget}, quality against {frontier.cost}: on the frontier {named(on)}"
    return text + (f"; not decided to be off it {named(near)}" if near else "")


def _scale(verdict: Verdict) -> str:
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
        cells = [claim.name, f"**{verdict.outcome}**", _scale(verdict), _seeds(verdict), estimate_text(verdict),
                 verdict.reason, says, claim.source]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for title, texts in (
        ("Scaling laws (95 % of the exponents)", [law_text(law) for law in report.laws]),
        ("Efficient frontiers (cost, bits per byte)", [frontier_text(f) for f in report.frontiers]),
    ):
        if texts:
            lines += ["", f"## {title}", "", *(f"- {text}" for text in texts)]
    return "\n".join(lines).rstrip() + "\n"
