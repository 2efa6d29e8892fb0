"""Tokenising prepared bytes: one token file a split, and an account of the bytes that the tokens stand for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from e88.data.progress import Progress
from e88.data.store import SEPARATOR, SPLITS, TOKENIZER, Meta, TokenizerInfo
from e88.data.tokenizer import Tokenizer
from e88.errors import UserError

# A longer document is encoded in pieces, cut after a line; pieces are encoded together, a batch at a time.
PIECE = 256 << 10
BATCH = 4 << 20


def prepare_tokens(base: Meta, data: dict[str, np.ndarray], tokenizer: Tokenizer, folder: Path) -> None:
    """Fill an empty folder with the tokens of a prepared byte corpus, whose splits (uint8) are `data`.

    Raises UserError where the data is not UTF-8 or a split comes out empty.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    splits, exact, scale = {}, True, 1.0
    with Progress(f"tokenising {base.name}", sum(map(len, data.values()))) as bar:
        done = 0
        for name in SPLITS:
            count = _Count()
            with (folder / f"{name}.bin").open("xb") as file:
                for ids, seen in _encoded(data[name], name, tokenizer, count):
                    encoded = np.array(ids, dtype=dtype).tobytes()
                    count.digest.update(encoded)
                    file.write(encoded)
                    bar.update(done + seen)
            if count.tokens == 0:
                raise UserError(f"the tokenizer {tokenizer.name} gives no token for the {name} split of {base.name}")
            done += len(data[name])
            exact = exact and count.exact
            if name == "valid":
                scale = count.text / max(count.surfaces, 1)
            splits[name] = dataclasses.replace(
                base.splits[name], file=f"{name}.bin", offset=0, length=count.tokens, bytes=count.text,
                tokens_sha256=count.digest.hexdigest(),
            )  # fmt: skip
    (folder / TOKENIZER).write_text(tokenizer.json, encoding="utf-8")
    described = TokenizerInfo(
        name=tokenizer.name, sha256=tokenizer.sha256, exact=exact, byte_scale=1.0 if exact else scale
    )
    dataclasses.replace(
        base, dtype=dtype.name, vocab_size=tokenizer.vocab_size, splits=splits, tokenizer=described
    ).write(folder)  # fmt: skip


@dataclass
class _Count:
    """Of one split. text: bytes that the tokens stand for. surfaces: bytes of the tokens' surfaces. exact: whether the
    surfaces are the text."""

    text: int = 0
    tokens: int = 0
    surfaces: int = 0
    exact: bool = True
    digest: Any = field(default_factory=hashlib.sha256)


def _encoded(data: np.ndarray, name: str, tokenizer: Tokenizer, count: _Count) -> Iterator[tuple[list[int], int]]:
    """The ids of each piece, with those of the separator after it, and how far into the split that is."""
    for batch in _batches(data):
        encoded = tokenizer.encode([_decoded(data, name, piece) for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            joined = tokenizer.join(ids)
            count.exact = count.exact and joined == data[piece.start : piece.stop].tobytes()
            count.text += piece.stop - piece.start
            count.surfaces += len(joined)
            if piece.separated and tokenizer.separator:
                ids = ids + tokenizer.separator
                count.text += len(SEPARATOR)
                count.surfaces += len(SEPARATOR)
            count.tokens += len(ids)
            yield ids, piece.stop


def _decoded(data: np.ndarray, name: str, piece: _Piece) -> str:
    try:
        return data[piece.start : piece.stop].tobytes().decode()
    except UnicodeDecodeError as error:
        where = f"byte {piece.start + error.start} of the {name} split is not UTF-8"
        raise UserError(f"{where}; a tokenizer reads only text: leave it out to use bytes") from error


class _Piece(NamedTuple):
    """data[start:stop], with a separator after it or not."""

    start: int
    stop: int
    separated: bool


def _batches(data: np.ndarray) -> Iterator[list[_Piece]]:
    """Pieces in lists of about BATCH bytes."""
    batch: list[_Piece] = []
    size = 0
    for piece in _pieces(data):
        batch.append(piece)
        size += piece.stop - piece.start + 64
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(data: np.ndarray) -> Iterator[_Piece]:
    """Consecutive pieces; each byte lies in exactly one or is the separator after one."""
    start = 0
    while start < len(data):
        near = data[start : start + PIECE].tobytes()
        end = near.find(SEPARATOR)
        if end >= 0:
            yield _Piece(start, start + end, True)
            start += end + 1
            continue
        if start + PIECE < len(data):
            # Without a line end, where the next UTF-8 character starts.
            ends = range(PIECE, max(PIECE - 4, 0), -1)
            character = next((end for end in ends if data[start + end] & 0xC0 != 0x80), PIECE)
            near = near[: near.rfind(b"\n") + 1 or character]
        yield _Piece(start, start + len(near), False)
        start += len(near)
