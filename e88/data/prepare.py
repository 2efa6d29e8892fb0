"""Preparing: documents are gathered into one file, split, and written as train.bin, valid.bin and test.bin."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from e88.data import splitting
from e88.data.progress import Progress
from e88.data.sources import Source, UnreadableFile, documents
from e88.data.splitting import Document, Plan
from e88.data.store import SEPARATOR, SPLITS, Meta, SplitInfo, blocks, measure, write_split
from e88.errors import UserError

GATHERED = "gathered.tmp"


def prepare(source: Source, folder: Path) -> None:
    """Fill an empty folder with the prepared bytes of a source. A plain file is described in place, not copied."""
    before = source.fingerprint()
    left_out: Counter[str] = Counter()
    if source.kind == "file":
        how, splits = _in_place(source)
    else:
        how, splits = _gathered(source, folder, left_out)
    if source.fingerprint() != before:
        raise UserError(f"{source.path} changed while it was being read; run again when it is at rest")
    Meta(
        name=source.name, source=source.kind, split=how, left_out=dict(left_out), dtype="uint8", vocab_size=256,
        splits=splits,
    ).write(folder)  # fmt: skip


def _in_place(source: Source) -> tuple[str, dict[str, SplitInfo]]:
    size = source.path.stat().st_size
    if size == 0:
        raise UserError(f"{source.path} is empty; give a file with data")
    data = np.memmap(source.path, dtype=np.uint8, mode="r")
    splits = {}
    with Progress(f"reading {source.name}", size) as bar:
        for name, (start, stop) in splitting.cut(data, 0, len(data)).items():
            pieces = _with_progress(blocks(data, start, stop), bar, start)
            count, separators, digest = measure(pieces)
            splits[name] = SplitInfo(
                file=str(source.path), offset=start, length=count, bytes=count, documents=separators + 1,
                separators=separators, sha256=digest,
            )  # fmt: skip
    return "contiguous", splits


def _with_progress(pieces: Iterator[memoryview], bar: Progress, done: int) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece
        done += len(piece)
        bar.update(done)


def _gathered(source: Source, folder: Path, left_out: Counter[str]) -> tuple[str, dict[str, SplitInfo]]:
    path = folder / GATHERED
    found = _gather(source, path, left_out)
    if not found:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        raise UserError(f"{source.path} holds no data" + (f" (left out: {skipped})" if skipped else ""))
    data = np.memmap(path, dtype=np.uint8, mode="r")
    plan = splitting.plan(found, data, left_out)
    splits = {name: _write(folder, name, data, plan) for name in SPLITS}
    del data
    path.unlink()
    return plan.how, splits


def _gather(source: Source, path: Path, left_out: Counter[str]) -> list[Document]:
    """Write all documents one after the other to `path`."""
    found: list[Document] = []
    with path.open("xb") as file:
        for name, pieces in documents(source, left_out):
            start, digest = file.tell(), hashlib.sha256()
            try:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            except UnreadableFile:
                left_out["unreadable"] += 1
                file.seek(start)
                file.truncate()
                continue
            if file.tell() > start:
                found.append(Document(name, start, file.tell() - start, digest.digest()))
            else:
                left_out["empty"] += 1
    return found


def _write(folder: Path, name: str, data: np.ndarray, plan: Plan) -> SplitInfo:
    spans = plan.spans[name]

    def pieces() -> Iterator[bytes | memoryview]:
        for i, (start, stop) in enumerate(spans):
            if i:
                yield SEPARATOR
            yield from blocks(data, start, stop)

    size, separators, digest = write_split(folder / f"{name}.bin", pieces())
    return SplitInfo(
        file=f"{name}.bin", offset=0, length=size, bytes=size, documents=len(spans) if plan.whole else separators + 1,
        separators=separators, sha256=digest,
    )  # fmt: skip
