"""The report: one self-contained HTML page, with the table as Markdown and CSV beside it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from e88 import __version__
from e88.errors import UserError
from e88.files import write_text
from e88.report.compare import MISSING, Comparison, Record, comparisons, count, dig, duration, flatten, number
from e88.report.headline import headline
from e88.report.plots import figures
from e88.report.style import Style, styles
from e88.report.tables import COLUMNS as ALL_COLUMNS
from e88.report.tables import Row, comparison_rows, render_csv, render_markdown, summary_rows
from e88.study.store import load_records

TITLE = "E88 and its rivals"
# The page tells the notes in a list of their own, where there is room for a reason.
COLUMNS = [column for column in ALL_COLUMNS if column.title != "Note"]
# Bookkeeping of the store, and what the figures show.
_NOT_IN_DETAILS = ("schema", "id", "name", "seed", "status", "reason", "curve", "heldout_curve", "layers")


def render(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Report the runs of one or several stores: `out`/report.html, table.md and table.csv; the path of the page.

    `out` may name the page itself (ending in .html); the tables then stand next to it. Raises UserError where a store
    is missing or empty or `out` cannot be written.
    """
    records = load_records(paths)
    page = Path(out) if str(out).endswith(".html") else Path(out) / "report.html"
    rows = summary_rows(records)
    write_page(records, page)
    write_text(page.with_name("table.md"), render_markdown(rows))
    write_text(page.with_name("table.csv"), render_csv(rows))
    return page


def write_page(records: Sequence[Record], path: str | os.PathLike[str], title: str = TITLE) -> Path:
    """Write the page of these records to `path`, whole or not at all. It asks for nothing outside itself.

    Raises UserError where there are no records, jinja2 is not installed, or the file cannot be written.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe"):
            raise
        raise UserError("the report page needs jinja2; install e88[report]") from error
    parts = [_part(comparison, f"c{i}") for i, comparison in enumerate(comparisons(records), start=1)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    # The style sheets and the script are ours: they go in as they are.
    markup = environment.from_string(_resource("page.html")).render(
        title=title,
        summary=_summary(records),
        parts=parts,
        columns=COLUMNS,
        version=__version__,
        style=Markup(_resource("page.css") + _resource("figure.css")),
        script=Markup(_resource("page.js")),
    )
    return write_text(path, markup + "\n")


def _resource(name: str) -> str:
    return (resources.files("e88.report") / name).read_text(encoding="utf-8")


def _summary(records: Sequence[Record]) -> str:
    statuses = Counter(str(record.get("status")) for record in records)
    counts = ", ".join(f"{statuses[status]} {status}" for status in ("done", "diverged", "failed") if statuses[status])
    days = sorted({str(record["started"])[:10] for record in records if record.get("started")})
    when = "" if not days else f", started {days[0]}" if len(days) == 1 else f", started {days[0]} to {days[-1]}"
    return f"{len(records)} run{'s' if len(records) > 1 else ''} ({counts}){when}"


def _part(comparison: Comparison, prefix: str) -> dict[str, Any]:
    look = styles(comparison.groups)
    anchors = {id(run): f"{prefix}-run-{i}" for i, run in enumerate(comparison.runs, start=1)}
    rows = comparison_rows(comparison)
    return {
        "title": comparison.title,
        "headline": headline(comparison),
        "facts": list(_facts(comparison)),
        "warnings": comparison.warnings,
        "rows": [
            _table_row(row, look[row.model], anchors[id(group.runs[0])])
            for row, group in zip(rows, comparison.groups, strict=True)
        ],
        "notes": [(row.model, row.note) for row in rows if row.note],
        "figures": figures(comparison),
        "runs": [
            _run(run, group.label, look[group.label], anchors[id(run)])
            for group in comparison.groups
            for run in group.runs
        ],
    }


def _facts(comparison: Comparison) -> Iterable[tuple[str, str]]:
    def told(*path: str) -> str:
        return ", ".join(sorted({str(value) for run in comparison.runs if (value := dig(run, *path)) is not None}))

    first = next((run for run in comparison.runs if number(run, "data", "heldout_bytes")), comparison.runs[0])
    for key, value in comparison.budget.items():
        yield "Budget", duration(value) if key == "seconds" else f"{count(value)} {key}"
    facts = [("Hardware", comparison.hardware)]
    facts.append(("Data", f"{comparison.data} {str(dig(first, 'data', 'hash') or '')[:12]}".strip()))
    for key, name in (("train_bytes", "Training bytes"), ("heldout_bytes", "Held-out bytes")):
        size = number(first, "data", key)
        facts.append((name, "" if size is None else count(size)))
    facts.append(("Window, tokens", told("data", "window")))
    facts.append(("Commit", told("environment", "commit")))
    facts.append(("e88", told("environment", "versions", "e88")))
    yield from ((name, value) for name, value in facts if value)


def _table_row(row: Row, style: Style, anchor: str) -> dict[str, Any]:
    cells = []
    for column in COLUMNS:
        text = column.text(row)
        value = column.value(row) if column.value else text if text != MISSING else None
        cells.append({"text": text, "numeric": column.value is not None, "value": "" if value is None else value})
    return {"cells": cells, "status": row.status, "anchor": anchor, "light": style.light, "dark": style.dark}


def _run(run: Record, label: str, style: Style, anchor: str) -> dict[str, Any]:
    bpb = number(run, "results", "heldout_bpb")
    tables = []
    for key, value in run.items():
        if key in _NOT_IN_DETAILS:
            continue
        # The configuration is long: each of its parts is a table of its own.
        split = key == "config" and isinstance(value, dict)
        parts = [(f"{key}: {part}", item) for part, item in value.items()] if split else [(key, value)]
        tables += [(name, [(k or name, _cell(v)) for k, v in flatten(item)]) for name, item in parts]
    return {
        "anchor": anchor,
        "label": label,
        "seed": run.get("seed", MISSING),
        "status": run.get("status") or "failed",
        "score": "" if bpb is None else f"{bpb:.4f} bits per byte",
        "id": run["id"],
        "reason": run.get("reason") or "",
        "tables": tables,
        "light": style.light,
        "dark": style.dark,
    }


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and 1e5 <= abs(value) < 1e15 else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return str(value)
