"""Commands of `e88 data`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e88.cli import app, options

if TYPE_CHECKING:
    from e88.data.corpus import Corpus


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="'stdlib', a file, a folder, an archive, or a prepared folder.")]
    = "stdlib",
    out: Annotated[str | None, typer.Option(help="Write a self-contained prepared folder here.")] = None,
    tokenizer: options.Tokenizer = None,
    as_json: options.Json = False,
) -> None:
    """Prepare data, or open it, check it against its hashes, and say what it is."""
    from e88.data.corpus import check_out, open_corpus
    from e88.data.sources import find_source
    from e88.errors import UserError

    if out is not None:
        # Before any work: an output that cannot be written should not cost an hour.
        target = check_out(out)
        if find_source(source).holds(target):
            raise UserError(f"{target} lies inside the source; choose another folder for --out")
    corpus = open_corpus(source, tokenizer=tokenizer)
    if out is not None:
        corpus.export(out)
        corpus = open_corpus(out)
    else:
        corpus.verify()
    found = summary(corpus, out)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def summary(corpus: Corpus, out: str | None) -> dict[str, Any]:
    """What `e88 data --json` prints."""
    meta = corpus.meta
    return {
        **corpus.describe(),
        "source": meta.source,
        "split": meta.split,
        "left_out": meta.left_out,
        "separator": "0x1e",
        "splits": {
            split.name: {
                "bytes": split.bytes,
                "tokens": len(split),
                "documents": split.documents,
                "separators": split.separators,
                "sha256": split.sha256,
            }
            for split in corpus.splits
        },
        "sample": sample_line(corpus),
        "out": out,
    }


def sample_line(corpus: Corpus, width: int = 80) -> str:
    """A line of the validation split with something to read on it, cut to `width` characters."""
    text = corpus.decode(corpus.valid[:4096]).decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\x1e", "\n").splitlines()]
    line = next((line for line in lines if len(line) > 20), max(lines, key=len, default=""))
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line[:width])


def _print(found: dict[str, Any]) -> None:
    tokens = found["tokenizer"]
    if tokens != "bytes":
        tokens += f", {found['vocab_size']:,} ids, {found['bytes_per_token']:.4g} bytes a token"
    rows = {
        "data": f"{found['name']} ({found['source']}, split {found['split']})",
        "hash": found["hash"],
        "tokens": tokens,
        "left out": ", ".join(f"{count:,} {reason}" for reason, count in found["left_out"].items() if count),
        "sample": found["sample"],
        "written": found["out"],
    }
    for key, value in rows.items():
        if value:
            typer.echo(f"{key:10}{value}")
    typer.echo(f"\n{'split':6}{'bytes':>15}{'tokens':>15}{'documents':>11}  sha256 of the text (documents end at 0x1e)")
    for name, split in found["splits"].items():
        sizes = f"{split['bytes']:15,}{split['tokens']:15,}{split['documents']:11,}"
        typer.echo(f"{name:6}{sizes}  {split['sha256']}")
