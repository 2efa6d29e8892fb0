"""The one exception a user is meant to see: one line, what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong use or wrong input. The command line prints it without a traceback and exits with code 2."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not in `known`, with the nearest known names or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
    return UserError(f"unknown {kind} '{name}'; {hint}")
