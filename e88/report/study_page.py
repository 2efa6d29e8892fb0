"""The page of a study: verdicts first, then scaling laws, then each budget as a comparison with its runs."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from e88.report.compare import MISSING, Comparison, Record, budget_text, comparisons, count, dig
from e88.report.page import add_curves, anchors, cell, comparison_part, head, run_links, write_html
from e88.report.study import (
    OUTCOMES,
    StudyReport,
    counts_text,
    estimate_text,
    rounded,
    scale_text,
    study_report,
    write_report,
)
from e88.report.style import kind_styles, styles
from e88.report.svg import Figure
from e88.report.sweeps import find_sweeps, law_figure, sweep_figure
from e88.report.tables import Row, comparison_rows
from e88.study.claims import SPEEDS
from e88.study.design import Experiment
from e88.study.findings import ScalingLaw, kinds_of
from e88.study.statistics import Estimate
from e88.study.store import Store
from e88.study.verdict import UNDECIDED, Verdict

# A claim over more models than this links the first alone, and a figure of a law shows a part of more runs.
MOST_LINKED = 40
MOST_POINTS = 400
CLAIM_COLUMNS = (
    ("Claim", "what is claimed, its name and where it was made", False),
    ("Verdict", "confirmed, refuted, or undecided at this scale", False),
    ("Difference or ratio (95 %)", "the deciding comparison with its interval, and what it is held against", True),
    ("Scale", "where it was decided; exact: counted on the full-size models", False),
    ("Seeds", "seeds that decided", True),
    ("More seeds", "how many more of the same mean and spread would decide it", True),
    ("Why", "which models decide, or what is missing", False),
    ("Runs", "the runs behind it, by model and seed, or the claims", False),
)  # fmt: skip
LAW_COLUMNS = (
    ("Models", "kind of mixer", False),
    ("Budget", "whose runs the law is fitted to", False),
    ("Over", "the variable", False),
    ("Exponent", "of the power law, with its 95 % interval over refits", True),
    ("a", "the term at the centre, bits per byte, with its 95 % interval", True),
    ("Centre", "the geometric mean of the variable", True),
    ("Floor", "bits per byte that remain, with its 95 % interval; where too few sizes tell one, none", True),
    ("Residual", "root mean square, bits per byte", True),
    ("Runs", "runs it is fitted to", True),
)


@dataclass(frozen=True)
class Field:
    """The runs of all budgets of a study that have one limit. missing: model -> seeds without a record."""

    budgets: tuple[str, ...]
    limit: dict[str, float]
    timed: bool
    comparisons: tuple[Comparison, ...]
    missing: Mapping[str, Sequence[int]]

    @cached_property
    def rows(self) -> list[list[Row]]:
        """The rows of each comparison."""
        return [comparison_rows(comparison) for comparison in self.comparisons]


def fields(experiment: Experiment, records: Mapping[str, Record]) -> list[Field]:
    """The runs of an experiment by limit, each record named as the study's model. records: by run id."""
    by_limit: dict[str, list[str]] = defaultdict(list)
    scale = experiment.scale.name
    for budget in dict.fromkeys(budget for _, budget in experiment.arms):
        by_limit[json.dumps(experiment.study.budgets[budget][scale])].append(budget)
    return [_field(experiment, records, json.loads(limit), names) for limit, names in by_limit.items()]


def _field(
    experiment: Experiment, records: Mapping[str, Record], limit: dict[str, float], budgets: Sequence[str]
) -> Field:
    found: dict[tuple[str, str], Record] = {}
    missing: dict[str, list[int]] = defaultdict(list)
    for (model, budget, seed), run in experiment.planned.items():
        if budget not in budgets:
            continue
        if run.id in records:
            found[model, run.id] = {**records[run.id], "name": model}
        elif seed not in missing[model]:
            missing[model].append(seed)
    # On a GPU, where layers are checked, a run always has its processor to itself.
    alone = bool(found) and all(dig(r, "environment", "layer_check") for r in found.values() if r["status"] == "done")
    timed = alone or any(experiment.study.is_exclusive(budget, experiment.scale) for budget in budgets)
    whole = tuple(comparisons(list(found.values()))) if found else ()
    return Field(tuple(budgets), limit, timed, whole, {model: seeds for model, seeds in missing.items() if seeds})


def report_study(experiment: Experiment, store: Path) -> tuple[StudyReport, Path]:
    """Judge a study from the records of a store and write its report there, in every form; the path of the page."""
    records = {record["id"]: record for record in Store(store).summaries()}
    report = study_report(experiment, records)
    parts = fields(experiment, records)
    write_report(report, store, [row for part in parts for rows in part.rows for row in rows])
    path = store / f"study-{report.scale}.html"
    return report, write_study_page(report, experiment, parts, path, lambda ids: Store(store).curves(ids).values())


def write_study_page(
    report: StudyReport,
    experiment: Experiment,
    parts: Sequence[Field],
    path: Path,
    curves: Callable[[Collection[str]], Iterable[Record]],
) -> Path:
    """Write the page of a study. curves: the whole records of some ids, asked for those that are drawn."""
    whole = [comparison for part in parts for comparison in part.comparisons]
    add_curves(whole, curves)
    links = anchors(whole)
    shown = [shown_part for part in parts for shown_part in _parts(experiment, part, links)]
    tally = Counter(verdict.outcome for verdict in report.verdicts)
    study = {
        "claims": _claims(report, experiment, parts, links) if report.verdicts else None,
        "tally": [(outcome, tally[outcome]) for outcome in OUTCOMES],
        "notes": list(_notes(report, experiment)),
        "laws": _laws(report.laws, parts) if report.laws else None,
    }
    return write_html(path, title=report.title, summary=counts_text(report), parts=shown, study=study)


def _notes(report: StudyReport, experiment: Experiment) -> list[str]:
    notes = [f"Source of the claims: {experiment.study.source}."] if experiment.study.source else []
    if not experiment.scale.shrink.is_none:
        notes.append(
            f"At scale {report.scale} the models and budgets are small: a verdict is about them, not about the sizes "
            "in the statements. Exact verdicts are counts of the full-size models."
        )
    if experiment.partial:
        notes.append("Only a part of the study's claims, with the runs they need.")
    return notes


def _parts(experiment: Experiment, part: Field, links: Mapping[int, str]) -> list[dict[str, Any]]:
    name = ("Budget " if len(part.budgets) == 1 else "Budgets ") + " and ".join(part.budgets)
    waiting = [f"Not run yet: {_missing_text(part.missing)}."] if part.missing else []
    if not part.comparisons:
        planned = sum(map(len, part.missing.values()))
        told = f"No run of this budget has ended yet; {planned} are planned: e88 study run does them."
        return [{"title": f"{name}: {budget_text(part.limit)}", "headline": told, "facts": [], "warnings": [],
                 "table": None, "notes": [], "figures": [], "detailed": True, "runs": []}]  # fmt: skip
    if not part.timed:
        waiting.append(
            "These runs shared their processor, so their speed says nothing, and nothing is shown against time."
        )
    sets: list[tuple[Collection[str], bool]] = [
        (claim.involved, claim.metric in SPEEDS) for claim in experiment.claims if claim.budget in part.budgets
    ]
    shown = []
    for comparison, rows in zip(part.comparisons, part.rows, strict=True):
        look = styles(comparison.groups)
        every = {group.label for group in comparison.groups}
        sweeps = find_sweeps(comparison, [*sets, (every, False)])
        figures = [sweep_figure(sweep, look) for sweep in sweeps if part.timed or not sweep.speed]
        shown.append(
            comparison_part(
                comparison, rows, links, title=f"{name}: {comparison.title}", timed=part.timed,
                more_figures=[figure for figure in figures if figure], warnings=waiting,
            )
        )  # fmt: skip
    return shown


def _missing_text(missing: Mapping[str, Sequence[int]]) -> str:
    listed = [
        f"{model} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})" for model, seeds in missing.items()
    ]
    more = f" and {len(listed) - MOST_LINKED} more models" if len(listed) > MOST_LINKED else ""
    return ", ".join(listed[:MOST_LINKED]) + more


def _claims(
    report: StudyReport, experiment: Experiment, parts: Sequence[Field], links: Mapping[int, str]
) -> dict[str, Any]:
    runs: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for part in parts:
        for run in (run for comparison in part.comparisons for run in comparison.runs):
            for budget in part.budgets:
                runs[str(run["name"]), budget].append(run)
    rows = [_claim_row(verdict, runs, links) for verdict in report.verdicts]
    return {"columns": [head(*column) for column in CLAIM_COLUMNS], "rows": rows}


def _claim_row(
    verdict: Verdict, runs: Mapping[tuple[str, str], Sequence[Record]], links: Mapping[int, str]
) -> dict[str, Any]:
    claim, estimate = verdict.claim, verdict.estimate
    about = " · ".join(text for text in (claim.name, claim.source, claim.note) if text)
    more = "" if verdict.more_seeds is None else f"about {verdict.more_seeds}"
    behind = [(model, runs.get((model, claim.budget), ())) for model in claim.involved[:MOST_LINKED]]
    total = sum(len(found) for _, found in behind)
    hidden = len(claim.involved) - len(behind)
    folded = f"{total} run{'s' * (total != 1)}" + (f" of the first {len(behind)} models" if hidden else "")
    groups = [{"name": model, "runs": run_links(found, links)} for model, found in behind if found]
    if claim.form == "all":
        folded = f"{len(claim.models)} claims"
        groups = [{"name": "", "runs": [{"text": part, "href": f"claim-{part}", "css": ""} for part in claim.models]}]
    open_end = "unknown" if estimate else MISSING
    cells = [
        cell(claim.says, claim.name, soft=about),
        cell(verdict.outcome, float(OUTCOMES.index(verdict.outcome)), numeric=True, css=f"outcome {verdict.outcome}"),
        cell(estimate_text(verdict) or MISSING, estimate.mean if estimate else None, numeric=True, css="number wide"),
        cell(scale_text(verdict)),
        cell(MISSING if verdict.scale == "exact" else str(verdict.seeds), float(verdict.seeds), numeric=True),
        cell(more or (open_end if verdict.outcome == UNDECIDED else MISSING), verdict.more_seeds, numeric=True),
        cell(verdict.reason or MISSING, css="wide"),
        cell("", folded, links=groups, folded=folded) if groups else cell(MISSING),
    ]
    return {"cells": cells, "status": "", "anchor": f"claim-{claim.name}"}


def _laws(laws: Sequence[ScalingLaw], parts: Sequence[Field]) -> dict[str, Any]:
    rows = []
    for scaling in laws:
        law = scaling.law
        for variable, centre, scale, exponent in zip(
            law.variables, law.centres, law.scales, law.exponents, strict=True
        ):
            edge = "at the edge of what was searched: not determined" if law.at_edge else ""
            rows.append({"status": "", "cells": [
                cell(scaling.kind), cell(scaling.where), cell(variable),
                cell(_with_interval(exponent), exponent.mean, numeric=True, soft=edge),
                cell(_with_interval(scale), scale.mean, numeric=True), cell(count(centre), centre, numeric=True),
                cell(_with_interval(law.floor), law.floor.mean if law.floor else None, numeric=True),
                cell(f"{law.error:.2g}", law.error, numeric=True), cell(str(exponent.n), exponent.n, numeric=True),
            ]})  # fmt: skip
    return {
        "table": {"columns": [head(*column) for column in LAW_COLUMNS], "rows": rows},
        "figures": _law_figures(laws, parts),
    }


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return MISSING
    return rounded(estimate)


def _law_figures(laws: Sequence[ScalingLaw], parts: Sequence[Field]) -> list[Figure]:
    """One for each budget and variable, all kinds of model in it; laws over two variables have none."""
    together: dict[tuple[str, str], list[ScalingLaw]] = defaultdict(list)
    for scaling in laws:
        if scaling.law.band:
            together[scaling.where, scaling.law.variables[0]].append(scaling)
    found = []
    for (where, variable), group in together.items():
        chosen = [part for part in parts if where in part.budgets] or parts
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for run in (run for part in chosen for comparison in part.comparisons for run in comparison.runs):
            at, loss = _place(run, variable), dig(run, "results", "heldout_bpb")
            if run["status"] == "done" and at and loss is not None:
                points[kinds_of(run)].append((at, loss))
        thinned = {kind: every[:: math.ceil(len(every) / MOST_POINTS)] for kind, every in points.items()}
        name = {"params": "parameters", "FLOPs": "compute"}.get(variable, variable)
        title = f"Scaling law over {name}, " + (f"budget {where}" if where in chosen[0].budgets else where)
        found.append(law_figure(title, group, thinned, kind_styles(thinned)))
    return found


def _place(run: Record, variable: str) -> float | None:
    params, tokens = dig(run, "model", "params"), dig(run, "results", "tokens")
    if variable == "FLOPs":
        return (dig(run, "model", "flops_per_token") or 0.0) * (tokens or 0.0)
    return {"params": params, "tokens": tokens}.get(variable)
