"""The tables and pictures of docs/findings.md, made from the reports of studies under results/.

    python benchmarks/findings.py            # write them anew
    python benchmarks/findings.py --check    # exit code 1 where they are not what the records say

A table stands between `<!-- models FOLDER SCALE [WORDS] -->` or `<!-- claims FOLDER SCALE [PATTERN ...] -->` and
`<!-- end -->`. FOLDER is a store under results/ with the report of its study (`e88 study report`). WORDS: of the
comparison's title, such as a budget; PATTERN: names of claims, with * and ?. A held-out figure leads to its record, a
line of the store; a verdict to its place on the study's page, which lists the runs behind it. docs/minute-500m.svg,
docs/ten-minutes-500m.svg and docs/positions-500m.svg have the models of the 500M benchmark that ran for so long, the
documents' rows of E88 apart.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from e88.report import write_figure
from e88.report.study import estimate_text, scale_text
from e88.study.claims import Claim
from e88.study.statistics import Estimate
from e88.study.verdict import Verdict

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "findings.md"
# File in docs/ -> (words of the comparison's title, against what).
FIGURES = {
    "minute-500m.svg": ("60 s of", "time"),
    "ten-minutes-500m.svg": ("10 min", "time"),
    "positions-500m.svg": ("10 min", "position"),
}
TABLE = re.compile(r"(<!-- (models|claims) (\S+) (\S+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def records(folder: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """id -> the number of its line and its record, the last of each id."""
    lines = (ROOT / "results" / folder / "records.jsonl").read_text().splitlines()
    return {record["id"]: (number, record) for number, record in enumerate(map(json.loads, lines), 1)}


def comparison(folder: str, scale: str, words: str) -> list[dict[str, str]]:
    """The models of a comparison, the best first, with the ids of their runs."""
    with open(ROOT / "results" / folder / f"study-{scale}.csv") as file:
        rows = [row for row in csv.DictReader(file) if words in row["comparison"]]
    if not rows:
        raise SystemExit(f"results/{folder} has no comparison with '{words}' at scale {scale}")
    return rows


def models(folder: str, scale: str, words: str) -> Iterator[str]:
    """One line for each model of a comparison, the best first."""
    known, place = records(folder), f"../results/{folder}/records.jsonl"
    yield "| Model | lr | Bits per byte | 95 % | Each run | tok/s | Steps | Params | State a layer | Ran on |"
    yield "|---|---:|---:|---|---|---:|---:|---:|---:|---|"
    for row in comparison(folder, scale, words):
        runs = [known[run] for run in row["ids"].split()]
        each = [f"[{told(record)}]({place}#L{line})" for line, record in runs]
        lr = {record["config"]["training"]["lr"] for _, record in runs}
        bpb, interval = "", ""
        if row["heldout_bpb"]:
            bpb = f"{float(row['heldout_bpb']):.4f}"
            over = f" ({row['heldout_bpb_over']})" if row["heldout_bpb_over"] == "windows" else ""
            interval = f"{float(row['heldout_bpb_low']):.4f} to {float(row['heldout_bpb_high']):.4f}{over}"
        numbers = [f"{float(row[key]):,.0f}" if row[key] else "" for key in ("tokens_per_second", "steps")]
        size = [f"{float(row['params']) / 1e6:.1f}M", f"{float(row['state_per_layer']):,.0f}"]
        cells = [row["model"], f"{min(lr):g}", bpb, interval, " ".join(each), *numbers, *size, row["backend"]]
        yield "| " + " | ".join(cells) + " |"


def told(record: dict[str, Any]) -> str:
    """What a run came to."""
    bpb = record["results"].get("heldout_bpb")
    return f"{bpb:.4f}" if record["status"] == "done" else record["status"]


def claims(folder: str, scale: str, patterns: str) -> Iterator[str]:
    """One line for each claim that was decided or could not be."""
    wanted = patterns.split() or ["*"]
    report = json.loads((ROOT / "results" / folder / f"study-{scale}.json").read_text())
    page = f"../results/{folder}/study-{scale}.html"
    yield "| Finding | Where | Verdict | Figure (95 %) | At |"
    yield "|---|---|---|---|---|"
    for told in report["verdicts"]:
        estimate = told["estimate"] and Estimate(**told["estimate"])
        verdict = Verdict(**{**told, "claim": Claim(**told["claim"]), "estimate": estimate})
        claim = verdict.claim
        if not any(fnmatchcase(claim.name, pattern) for pattern in wanted):
            continue
        seeds = "" if verdict.scale == "exact" else f", {verdict.seeds} seed{'s' * (verdict.seeds != 1)}"
        outcome = f"[{verdict.outcome}]({page}#claim-{claim.name})"
        figure = estimate_text(verdict) or verdict.reason
        cells = [claim.says, claim.source, outcome, figure, scale_text(verdict) + seeds]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def picture(words: str, by: str, path: Path) -> Path:
    """A comparison of the 500M benchmark without the documents' rows of E88, each run under its model's name in the
    study."""
    known = records("benchmark_500m")
    rows = [row for row in comparison("benchmark_500m", "full", words) if not row["model"].startswith("e88-b")]
    runs = [{**known[run][1], "name": row["model"]} for row in rows for run in row["ids"].split()]
    return write_figure(runs, path, by)


def rewritten(text: str) -> str:
    """The page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        opening, kind, folder, scale, rest, end = match.groups()
        make = {"models": models, "claims": claims}[kind]
        return opening + "\n" + "\n".join(make(folder, scale, rest.strip())) + "\n\n" + end

    return TABLE.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        new = {PAGE: rewritten(PAGE.read_text())}
        for name, (words, by) in FIGURES.items():
            new[ROOT / "docs" / name] = picture(words, by, Path(folder) / name).read_text()
    for path, text in new.items():
        if options.check and (not path.exists() or path.read_text() != text):
            print(f"{path.name} is not what the records say; run python benchmarks/findings.py", file=sys.stderr)
            return 1
        if not options.check:
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
