"""Writing a report's files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from e88.errors import UserError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Replace the file at `path` by `text` in one step, making its folder; UserError where that cannot be done."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
            # mkstemp makes files private; a report is to be read by whoever may read new files here.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another place") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
