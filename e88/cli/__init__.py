"""The `e88` command. Handlers import what they need when called: `e88 --help` and `e88 size` never load torch."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import typer

from e88.errors import UserError

EXIT_FAILED = 1
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
for _module in ("size", "data", "train", "replay", "generate", "bench", "study", "search", "doctor", "profile"):
    importlib.import_module(f"e88.cli.{_module}")


def main() -> None:
    """Entry point: exit code 0 done, 2 wrong use or input (one line on stderr), 3 diverged, 130 interrupted."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("e88: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has had enough (`e88 presets | head`); what is still buffered must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        # Typer's usage errors share no public base class across its versions, but all can say what is wrong.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message().rstrip('.')}; see e88 --help" if str(error) else "no command; see e88 --help")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print(f"e88: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USAGE)
