"""Which bytes go to train, valid and test. Fixed by the content alone: no seed to choose, no order to depend on."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from e88.data.store import SEPARATOR, SPLITS
from e88.errors import UserError

# valid and test each aim at this share of the data, and at no more than this many bytes.
HELD_OUT_SHARE = 20
HELD_OUT_BYTES = 4 << 20
SEED = b"e88 split 1"
_NAMED = re.compile(r"(train|valid|validation|val|test)(?:[-_.]?\d+(?:-of-\d+)?)?((?:\.[A-Za-z]\w*)*)")
_ALIASES = {"val": "valid", "validation": "valid"}

Span = tuple[int, int]


@dataclass(frozen=True)
class Document:
    """A document of `size` bytes at `start` of the gathered file. digest: sha256 of its bytes."""

    name: str
    start: int
    size: int
    digest: bytes

    @property
    def span(self) -> Span:
        return self.start, self.start + self.size


@dataclass(frozen=True)
class Plan:
    """how: in words. spans: for each split the byte ranges [start, stop) to be joined. whole: each is one document."""

    how: str
    spans: dict[str, list[Span]]
    whole: bool


def held_out_bytes(total: int) -> int:
    """Bytes aimed at for each of valid and test, at least 1."""
    return max(1, min(total // HELD_OUT_SHARE, HELD_OUT_BYTES))


def plan(documents: list[Document], data: np.ndarray, left_out: Counter[str]) -> Plan:
    """Split documents lying in `data` (uint8): as named, else document by document, else each cut in three.

    `left_out` counts the documents that are in no split. Raises UserError where there is too little.
    """
    documents = sorted(documents, key=lambda d: d.name)
    named = _named(documents)
    if named:
        left_out["outside the named splits"] += len(documents) - sum(map(len, named.values()))
        return Plan("as named in the source", _spans(named), whole=False)
    first: dict[bytes, Document] = {}
    for document in documents:
        first.setdefault(document.digest, document)
    distinct = list(first.values())
    if len(distinct) < len(documents):
        left_out["duplicate"] += len(documents) - len(distinct)
    if len(distinct) >= len(SPLITS):
        return Plan("by document", _spans(_by_document(distinct)), whole=True)
    spans: dict[str, list[Span]] = {name: [] for name in SPLITS}
    longest = max(distinct, key=lambda d: d.size)
    for document in distinct:
        if document.size < len(SPLITS) and document is not longest:
            spans["train"].append(document.span)
            continue
        for name, span in cut(data, *document.span).items():
            spans[name].append(span)
    return Plan("contiguous", spans, whole=False)


def cut(data: np.ndarray, start: int, stop: int) -> dict[str, Span]:
    """Three consecutive ranges of data[start:stop], cut between documents, else between lines, where one is near.

    A separator at a cut belongs to neither side. Raises UserError below 3 bytes.
    """
    total = stop - start
    if total < len(SPLITS):
        raise UserError(f"the data has {total} bytes, too few for train, valid and test; give more")
    held = held_out_bytes(total)
    train_end, valid_start = _boundary(data, stop - 2 * held, held // 2)
    valid_end, test_start = _boundary(data, stop - held, held // 2)
    return {"train": (start, train_end), "valid": (valid_start, valid_end), "test": (test_start, stop)}


def _boundary(data: np.ndarray, at: int, reach: int) -> Span:
    """Where the part before ends and the next one starts, at most `reach` bytes after `at`."""
    near = bytes(data[at : at + reach])
    if (found := near.find(SEPARATOR)) >= 0:
        return at + found, at + found + 1
    if (found := near.find(b"\n")) >= 0:
        return at + found + 1, at + found + 1
    # Not within a UTF-8 character.
    skip = next((i for i, byte in enumerate(near[:4]) if byte & 0xC0 != 0x80), 0)
    return at + skip, at + skip


def _named(documents: list[Document]) -> dict[str, list[Document]] | None:
    """Documents by split where the source's top folder has train, valid and test files (or numbered parts of them)
    with one suffix."""
    paths = [PurePosixPath(d.name) for d in documents]
    parents = [path.parent.parts for path in paths]
    if not parents:
        return None
    top = min(parents, key=len)
    common = next(n for n in range(len(top), -1, -1) if all(p[:n] == top[:n] for p in parents))
    groups: dict[str, dict[str, list[Document]]] = {}
    for document, path in zip(documents, paths, strict=True):
        match = _NAMED.fullmatch(path.name)
        if match and path.parent.parts == top[:common]:
            name = _ALIASES.get(match[1], match[1])
            groups.setdefault(match[2], {}).setdefault(name, []).append(document)
    for _, group in sorted(groups.items()):
        if set(group) == set(SPLITS):
            return group
    return None


def _by_document(documents: list[Document]) -> dict[str, list[Document]]:
    """Split three or more distinct documents, taken in an order drawn by their content.

    Held-out documents are to be many and small; only where that leaves too little are larger ones let in.
    """
    total = sum(d.size for d in documents)
    held = held_out_bytes(total)
    drawn = sorted(documents, key=lambda d: hashlib.sha256(SEED + d.digest).digest())
    limit = max(1, held // 4)
    splits = _fill(drawn, held, limit)
    while splits is None and limit < total // 3:
        limit = min(2 * limit, total // 3)
        splits = _fill(drawn, held, limit)
    if splits is None:
        # Few documents of very unequal sizes: the smallest two are held out.
        order = sorted(documents, key=lambda d: (d.size, d.digest))
        splits = {"valid": order[:1], "test": order[1:2], "train": order[2:]}
    return {name: sorted(splits[name], key=lambda d: d.name) for name in SPLITS}


def _fill(drawn: list[Document], held: int, limit: int) -> dict[str, list[Document]] | None:
    """valid and then test take documents of at most `limit` bytes until they have `held` bytes, train the others; None
    where one of them gets less than half of that, or train nothing."""
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    room = {"valid": held, "test": held}
    for document in drawn:
        name = next((n for n, left in room.items() if left > 0 and document.size <= limit), "train")
        splits[name].append(document)
        if name in room:
            room[name] -= document.size
    return splits if splits["train"] and max(room.values()) <= held // 2 else None


def _spans(splits: dict[str, list[Document]]) -> dict[str, list[Span]]:
    return {name: [d.span for d in splits[name]] for name in SPLITS}
