"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from e88.errors import UserError


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Have `write` fill a temporary file beside `path`, put that on disk, and rename it over `path`.

    A failure or a kill at any moment leaves what was at `path` before. Raises UserError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, _mode_of_new_files())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}); free space or choose another place") from error
    finally:
        # Nothing is left beside a failure; where even the folder is missing there is nothing to remove.
        try:
            temporary.unlink()
        except OSError:
            pass
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Replace the file at `path` by `text` (UTF-8, unchanged line ends), whole or not at all."""
    return write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()))


def _mode_of_new_files() -> int:
    """The permissions of an ordinary new file; some libraries make theirs private."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask
