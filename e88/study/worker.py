"""One run in a process of its own: `python -m e88.study.worker FOLDER`, with the spec in FOLDER/spec.json."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import traceback
from pathlib import Path

EXIT_FAILED, EXIT_DIVERGED, EXIT_INTERRUPTED = 1, 3, 130


def main(folder: Path) -> int:
    """Train as the spec says, resuming where a checkpoint lies; the reason of a failure goes to error.txt."""
    from e88.data.corpus import open_corpus
    from e88.runtime import choose_device
    from e88.study.progress import Progress
    from e88.study.spec import RunSpec
    from e88.training.loop import Interrupted, train

    try:
        data = json.loads((folder / "spec.json").read_text())
        device = choose_device(data.pop("device"))
        spec = RunSpec.from_dict(data)
        corpus = open_corpus(spec.data, tokenizer=spec.tokenizer)
        with Progress(spec.name, corpus.bytes_per_token) as progress:
            record = train(
                spec.model, spec.training, corpus, folder, name=spec.name, device=device, resume=True, reporter=progress
            )
    except Interrupted:
        return EXIT_INTERRUPTED
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc())
        (folder / "error.txt").write_text(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return EXIT_FAILED
    return EXIT_DIVERGED if record["status"] == "diverged" else 0


def _stop_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, so that a killed runner leaves no orphan (Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


if __name__ == "__main__":
    _stop_with_parent()
    sys.exit(main(Path(sys.argv[1])))
