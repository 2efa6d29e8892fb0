"""The report of records: one self-contained HTML page, with the table as Markdown and CSV beside it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from e88 import __version__
from e88.errors import UserError
from e88.files import write_text
from e88.report.compare import MISSING, Comparison, Group, Record, comparisons, count, dig, duration, flatten, number
from e88.report.curves import MOST_LINES
from e88.report.headline import headline
from e88.report.plots import figures
from e88.report.style import Style, styles
from e88.report.svg import Figure
from e88.report.tables import COLUMNS as ALL_COLUMNS
from e88.report.tables import Row, comparison_rows, render_csv, render_markdown
from e88.study.store import CURVES, load_records

TITLE = "E88 and its rivals"
# The page tells the notes in a list of their own, where there is room for a reason, and links each run.
COLUMNS = [column for column in ALL_COLUMNS if column.title not in ("Note", "Seeds")]
# Bookkeeping of the store, and what the figures show.
_NOT_IN_DETAILS = ("schema", "id", "name", "seed", "status", "reason", "curve", "heldout_curve", "heldout_by_position",
                   "layers")  # fmt: skip
# Of more runs the whole configuration of each would make a page of many megabytes.
MOST_DETAILED = 300
# Of more models the best are in the page, and all in its CSV.
MOST_MODELS = 1000
MOST_NOTES = 100
MOST_LINKS = 12

Anchors = Mapping[int, str]


def render(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> tuple[Path, list[Row]]:
    """Report the runs of one or several stores: `out`/report.html, table.md and table.csv; the path of the page and
    the rows of the table.

    `out` may name the page itself (ending in .html); the tables then stand next to it. Raises UserError where a store
    is missing or empty or `out` cannot be written.
    """
    sources = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    page = Path(out) if str(out).endswith(".html") else Path(out) / "report.html"
    found = comparisons(load_records(sources, curves=False))
    add_curves(found, lambda ids: load_records(sources, ids))
    tables = [comparison_rows(comparison) for comparison in found]
    rows = [row for table in tables for row in table]
    _write(found, tables, page, TITLE)
    write_text(page.with_name("table.md"), render_markdown(rows))
    write_text(page.with_name("table.csv"), render_csv(rows))
    return page, rows


def write_page(records: Sequence[Record], path: str | os.PathLike[str], title: str = TITLE) -> Path:
    """Write the page of these records to `path`, whole or not at all. It asks for nothing outside itself.

    Raises UserError where there are no records, jinja2 is not installed, or the file cannot be written.
    """
    found = comparisons(records)
    return _write(found, [comparison_rows(comparison) for comparison in found], path, title)


def _write(
    found: Sequence[Comparison], tables: Sequence[Sequence[Row]], path: str | os.PathLike[str], title: str
) -> Path:
    links = anchors(found)
    parts = [comparison_part(comparison, rows, links) for comparison, rows in zip(found, tables, strict=True)]
    summary = _summary([run for comparison in found for run in comparison.runs])
    return write_html(path, title=title, summary=summary, parts=parts)


def add_curves(found: Iterable[Comparison], load: Callable[[Collection[str]], Iterable[Record]]) -> None:
    """Give the runs that figures draw their curves; they are most of a record, and those of very many never fit.

    load: the whole records of some ids.
    """
    drawn = [run for comparison in found for group in comparison.groups[:MOST_LINES] for run in group.runs]
    whole = {_place(record): record for record in load({run["id"] for run in drawn})}
    for run in drawn:
        record = whole.get(_place(run), {})
        run |= {key: record[key] for key in CURVES if key in record}


def _place(record: Record) -> tuple[str, str]:
    return record["id"], str(dig(record, "environment", "hardware"))


def write_html(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str,
    parts: Sequence[Mapping[str, Any]],
    study: Mapping[str, Any] | None = None,
) -> Path:
    """Write a page of parts (see `comparison_part`), headed by what a study adds (see `e88.report.study_page`)."""
    try:
        import jinja2
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe"):
            raise
        raise UserError("the report page needs jinja2; install e88[report]") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # The style sheets and the script are ours: they go in as they are.
    markup = environment.from_string(_resource("page.html")).render(
        title=title,
        summary=summary,
        parts=parts,
        study=study,
        version=__version__,
        style=Markup(_resource("page.css") + _resource("figure.css")),
        script=Markup(_resource("page.js")),
    )
    return write_text(path, markup + "\n")


def _resource(name: str) -> str:
    return (resources.files("e88.report") / name).read_text(encoding="utf-8")


def _summary(records: Sequence[Record]) -> str:
    statuses = Counter(str(record.get("status")) for record in records)
    order = ("done", "pruned", "diverged", "failed")
    counts = ", ".join(f"{statuses[status]} {status}" for status in order if statuses[status])
    days = sorted({str(record["started"])[:10] for record in records if record.get("started")})
    when = "" if not days else f", started {days[0]}" if len(days) == 1 else f", started {days[0]} to {days[-1]}"
    return f"{len(records)} run{'s' if len(records) > 1 else ''} ({counts}){when}"


def anchors(parts: Iterable[Comparison]) -> dict[int, str]:
    """The anchor of every run that has an entry in the page, by the identity of its record: run-ID, numbered where
    repeated. Of very many models only the best have entries."""
    found: dict[int, str] = {}
    taken: Counter[str] = Counter()
    for comparison in parts:
        for run in (run for group in comparison.groups[:MOST_MODELS] for run in group.runs):
            name = "run-" + re.sub(r"[^\w-]", "", str(run["id"]))
            taken[name] += 1
            found[id(run)] = name if taken[name] == 1 else f"{name}--{taken[name]}"
    return found


def comparison_part(
    comparison: Comparison,
    rows: Sequence[Row],
    links: Anchors,
    *,
    title: str = "",
    timed: bool = True,
    more_figures: Sequence[Figure] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """What the page shows of a comparison: headline, facts, table, figures and every run.

    rows: of the comparison, in its order. links: of all runs of the page. timed: see `plots.figures`.
    """
    look = styles(comparison.groups)
    groups = comparison.groups[:MOST_MODELS]
    cut = len(comparison.groups) - len(groups)
    notes = [(row.model, row.note) for row in rows if row.note]
    if len(notes) > MOST_NOTES:
        notes = [*notes[:MOST_NOTES], ("", f"and {len(notes) - MOST_NOTES} more models with lost runs")]
    heads = [head(column.title, column.hint, column.value is not None) for column in COLUMNS]
    detailed = len(links) <= MOST_DETAILED
    return {
        "title": title or comparison.title,
        "headline": headline(comparison),
        "facts": list(_facts(comparison)),
        "warnings": [
            *warnings,
            *comparison.warnings,
            *([f"The best {len(groups):,} of {len(rows):,} models are shown; the CSV beside has all."] if cut else []),
        ],
        "table": {
            "columns": [*heads[:_BEFORE_RUNS], _RUNS, *heads[_BEFORE_RUNS:]],
            "rows": [_table_row(row, group, look[row.model], links) for row, group in zip(rows, groups, strict=False)],
        },
        "notes": notes,
        "figures": [*figures(comparison, timed), *more_figures],
        "detailed": detailed,
        "runs": [
            _run(run, group.label, look[group.label], links[id(run)], detailed)
            for group in groups
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


def head(title: str, hint: str, numeric: bool = False) -> dict[str, Any]:
    """The head of a column. hint: what it means, with its unit."""
    return {"title": title, "hint": hint, "numeric": numeric}


def cell(text: str, value: float | str | None = None, *, numeric: bool = False, **more: Any) -> dict[str, Any]:
    """A cell of a table of the page. value: what it sorts by, the text unless given; None with `numeric`: unknown.

    More, all optional: href, swatch (a style), soft (a second line), css, links (see `run_links`), folded (of links).
    """
    known = value if value is not None else "" if numeric or text == MISSING else text
    return {"text": text, "value": known, "numeric": numeric, **more}


def run_links(runs: Sequence[Record], links: Anchors) -> list[dict[str, str]]:
    """One link for each run that has an entry, by its seed; beyond a dozen the rest is told in number."""
    runs = [run for run in runs if id(run) in links]
    found = [
        {"text": str(run.get("seed", MISSING)), "href": links[id(run)], "css": str(run.get("status") or "failed")}
        for run in runs[:MOST_LINKS]
    ]
    more = len(runs) - len(found)
    return found + ([{"text": f"+{more}", "href": links[id(runs[MOST_LINKS])], "css": ""}] if more else [])


# Where a narrow window still shows it.
_BEFORE_RUNS = 1 + next(i for i, column in enumerate(COLUMNS) if column.title == "To best")
_RUNS = head("Runs", "seeds done, of those started; each links to its run")


def _table_row(row: Row, group: Group, style: Style, links: Anchors) -> dict[str, Any]:
    cells = [
        cell(column.text(row), column.value(row) if column.value else None, numeric=column.value is not None)
        for column in COLUMNS
    ]
    cells[0] |= {"href": links[id(group.runs[0])], "swatch": style}
    done = f"{row.seeds}" if row.seeds == row.runs else f"{row.seeds} of {row.runs}"
    told = [{"name": "", "runs": run_links(group.runs, links)}]
    cells.insert(_BEFORE_RUNS, cell(f"{done}:", float(row.seeds), links=told))
    return {"cells": cells, "status": row.status}


def _run(run: Record, label: str, style: Style, anchor: str, detailed: bool) -> dict[str, Any]:
    bpb = number(run, "results", "heldout_bpb")
    tables = []
    for key, value in run.items() if detailed else ():
        if key in _NOT_IN_DETAILS:
            continue
        # The configuration is long: each of its parts is a table of its own.
        split = key == "config" and isinstance(value, dict)
        parts = [(f"{key}: {part}", item) for part, item in value.items()] if split else [(key, value)]
        tables += [(name, [(k or name, _cell(v)) for k, v in flatten(item)]) for name, item in parts]
    environment = [dig(run, "environment", key) for key in ("hardware", "backends", "commit")]
    return {
        "anchor": anchor,
        "label": label,
        "seed": run.get("seed", MISSING),
        "status": run.get("status") or "failed",
        "score": "" if bpb is None else f"{bpb:.4f} bits per byte",
        "id": run["id"],
        "reason": run.get("reason") or "",
        "where": ", ".join(_cell(value) for value in environment if value),
        "tables": tables,
        "style": style,
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
