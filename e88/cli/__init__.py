"""The `e88` command. Handlers import what they need when called: `e88 --help` and `e88 size` never load torch."""

from __future__ import annotations

import importlib
import sys

import typer

from e88.errors import UserError

EXIT_USAGE = 2
EXIT_DIVERGED = 3

app = typer.Typer(
    name="e88",
    help="Size, train, compare and report E88 and its rivals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Each module adds its commands to `app` when imported; the order is the order of the help page.
for _module in ("size", "data", "train", "generate", "bench", "doctor"):
    importlib.import_module(f"e88.cli.{_module}")


def main() -> None:
    """Entry point: exit code 0 done, 2 wrong use or input (one line on stderr), 3 diverged, 130 interrupted."""
    try:
        app()
    except UserError as error:
        print(f"e88: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("e88: interrupted", file=sys.stderr)
        sys.exit(130)
