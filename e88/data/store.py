"""The prepared folder: e88-data.json and the files of the splits, written whole or not at all.

A folder counts as prepared once it stands under its final name: it is built under another name, its description is
written last, everything is flushed to disk, and then it is renamed. A build that is killed leaves only a folder with
a temporary name, which the next build of the same data removes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e88.errors import UserError

FORMAT = 1
META = "e88-data.json"
TOKENIZER = "tokenizer.json"
SEPARATOR = b"\x1e"
SPLITS = ("train", "valid", "test")
BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split. file: relative to the prepared folder, or absolute where a plain file is used in place. offset: bytes.
    length: elements (bytes, or tokens). bytes: of text. sha256: of the text. tokens_sha256: of the token file."""

    file: str
    offset: int
    length: int
    bytes: int
    documents: int
    separators: int
    sha256: str
    tokens_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """exact: the token surfaces, joined, were the text in every document. byte_scale: what the surface lengths are
    multiplied by so that they add up to the bytes of the validation split; 1 where exact."""

    name: str
    sha256: str
    exact: bool
    byte_scale: float


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The content of e88-data.json. source: kind of source. split: how it was split. left_out: reason -> count."""

    name: str
    source: str
    split: str
    left_out: dict[str, int]
    dtype: str
    vocab_size: int
    splits: dict[str, SplitInfo]
    tokenizer: TokenizerInfo | None = None

    @property
    def hash(self) -> str:
        """sha256 over the splits' contents and the tokenizer; the same wherever and from whatever they were made."""
        parts = [[name, s.bytes, s.sha256, s.length, s.tokens_sha256] for name, s in self.splits.items()]
        text = json.dumps([parts, self.tokenizer.sha256 if self.tokenizer else None])
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write e88-data.json and flush the folder's files to disk."""
        data = {"format": FORMAT, "hash": self.hash, **dataclasses.asdict(self)}
        (folder / META).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Meta:
        """The description of a prepared folder; UserError where it is damaged or its files have the wrong sizes."""
        try:
            data = json.loads((folder / META).read_text(encoding="utf-8"))
            found, wanted = data.pop("format"), data.pop("hash")
            if found != FORMAT:
                raise UserError(f"{folder} has data format {found}, this version reads {FORMAT}; prepare it again")
            splits = {name: SplitInfo(**data["splits"][name]) for name in SPLITS}
            tokenizer = TokenizerInfo(**data["tokenizer"]) if data["tokenizer"] else None
            meta = cls(**{**data, "splits": splits, "tokenizer": tokenizer})
            itemsize = np.dtype(meta.dtype).itemsize
            if meta.hash != wanted:
                raise UserError(f"{folder / META} does not match its own hash; prepare the data again")
            for split in splits.values():
                path = folder / split.file
                if split.length < 1 or path.stat().st_size < split.offset + split.length * itemsize:
                    raise UserError(f"{path} is shorter than {META} says; prepare the data again")
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{folder} is incomplete ({_reason(error)}); prepare the data again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / META} is damaged; prepare the data again") from error
        return meta


def is_prepared(folder: Path) -> bool:
    """Whether the folder is whole: its description reads well and the files have the sizes it gives."""
    try:
        Meta.read(folder)
    except UserError:
        return False
    return True


def write_split(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, int, str]:
    """Write pieces one after the other; returns bytes, separators among them, and the sha256."""
    with path.open("xb") as file:
        return measure(pieces, file.write)


def measure(pieces: Iterable[bytes | memoryview], write: Callable[[Any], Any] | None = None) -> tuple[int, int, str]:
    """Bytes, separators and sha256 of pieces, each passed on to `write` where given."""
    digest, size, separators = hashlib.sha256(), 0, 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
        separators += bytes(piece).count(SEPARATOR)
        if write is not None:
            write(piece)
    return size, separators, digest.hexdigest()


def blocks(data: np.ndarray, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
    """The bytes [start, stop) of an array, in views of at most BLOCK elements."""
    stop = len(data) if stop is None else stop
    for at in range(start, stop, BLOCK):
        yield data[at : min(at + BLOCK, stop)].data.cast("B")


def cached(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The prepared folder `cache/key`, built by `build(folder)` unless it is there. Any number of processes may ask at
    once: one builds, the others wait for it."""
    target = cache / key
    if is_prepared(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / f"{key}.lock", "ab")
    except OSError as error:
        hint = "set E88_CACHE to a folder you can write to"
        raise UserError(f"cannot write to the cache {cache} ({_reason(error)}); {hint}") from error
    with lock:
        locked = _lock(lock.fileno())
        if is_prepared(target):
            return target
        if locked:
            # Whoever held the lock before us is gone, so nobody writes to these any more.
            for leftover in cache.glob(f"{key}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        publish(target, build, keep=True)
    return target


def publish(target: Path, build: Callable[[Path], None], *, keep: bool = False) -> None:
    """Build a folder beside `target` and rename it to `target`, replacing what is there; with `keep`, not a prepared
    folder that has appeared since, which is as good where both were made from the same data."""
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
    old = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        build(temporary)
        if keep and is_prepared(target):
            return
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if keep and is_prepared(target):
                return
            if old.exists():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _lock(descriptor: int) -> bool:
    """Take an exclusive lock that ends with the process; False where the system has none."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if sys.stderr.isatty():
            print("waiting for another process that prepares the same data", file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextmanager
def user_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into a UserError that says what was being done, to what, and why it failed."""
    try:
        yield
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        raise UserError(f"cannot {doing}: {_reason(error)}{name}") from error
