"""A corpus: three memory-mapped splits of bytes or tokens, the same on every machine that reads the same source."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from e88.data.codec import Codec
from e88.data.prepare import prepare
from e88.data.sources import find_source
from e88.data.store import (
    META,
    SPLITS,
    TOKENIZER,
    Meta,
    SplitInfo,
    blocks,
    cached,
    measure,
    publish,
    user_errors,
    write_split,
)  # fmt: skip
from e88.data.tokenizer import Tokenizer
from e88.data.tokens import prepare_tokens
from e88.errors import UserError
from e88.runtime import cache_folder


@dataclass(frozen=True, eq=False)
class Split:
    """One split. data: 1-D array of uint8 (bytes) or uint16 / uint32 (tokens), a read-only memory map. bytes: of text
    that it stands for. documents: in it. separators: 0x1e bytes in its text. sha256: of its text."""

    name: str
    data: np.ndarray
    bytes: int
    documents: int = 1
    separators: int = 0
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, where: slice) -> np.ndarray:
        return self.data[where]


@dataclass(frozen=True, eq=False)
class Corpus:
    """hash: sha256 (hex) over the splits' contents and the tokenizer. bytes_per_token: mean over the validation split,
    1.0 for bytes. tokenizer: `bytes`, or the file's name with whether its byte counts are exact."""

    name: str
    hash: str
    train: Split
    valid: Split
    test: Split
    vocab_size: int
    bytes_per_token: float
    tokenizer: str
    meta: Meta = field(repr=False)
    _tokenizer: Callable[[], Tokenizer] | None = field(default=None, repr=False)

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        return self.train, self.valid, self.test

    def describe(self) -> dict[str, Any]:
        """What a record keeps of the data; sizes in bytes of text."""
        return {
            "name": self.name,
            "hash": self.hash,
            **{f"{split.name}_bytes": split.bytes for split in self.splits},
            "vocab_size": self.vocab_size,
            "bytes_per_token": self.bytes_per_token,
            "tokenizer": self.tokenizer,
        }

    def bytes_of(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of text that each token stands for, in the shape of `tokens`: int64, or float64 where the tokenizer's
        byte counts are not exact and are scaled to add up to the validation split's bytes."""
        info = self.meta.tokenizer
        if self._tokenizer is None or info is None:
            return np.ones(np.shape(tokens), dtype=np.int64)
        lengths = self._tokenizer().lengths[tokens]
        return lengths if info.exact else lengths * info.byte_scale

    @property
    def codec(self) -> Codec:
        """Text to ids and back, as a checkpoint keeps it."""
        return Codec(self._tokenizer() if self._tokenizer else None)

    def encode(self, text: bytes) -> np.ndarray:
        """int64 [n] ids of a text; UserError where a tokenizer is given bytes that are not UTF-8."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids."""
        return self.codec.decode(ids)

    def verify(self) -> None:
        """Read everything and compare with the recorded hashes; UserError where the data has changed."""
        for split in self.splits:
            info = self.meta.splits[split.name]
            if measure(blocks(split.data))[2] != (info.tokens_sha256 or info.sha256):
                raise UserError(f"the {split.name} split of {self.name} is not what was prepared; prepare it again")

    def export(self, out: str | Path) -> None:
        """Write a self-contained prepared folder that `open_corpus` reads on any machine.

        An earlier prepared folder at `out` is replaced. Raises UserError where `out` is anything else that is not
        empty, or cannot be written.
        """
        target = check_out(out)
        with user_errors(f"write {target}"):
            publish(target, self._copy)

    def _copy(self, folder: Path) -> None:
        splits = {}
        for split in self.splits:
            info = self.meta.splits[split.name]
            _, _, digest = write_split(folder / f"{split.name}.bin", blocks(split.data))
            if digest != (info.tokens_sha256 or info.sha256):
                raise UserError(f"the {split.name} split of {self.name} is not what was prepared; prepare it again")
            splits[split.name] = dataclasses.replace(info, file=f"{split.name}.bin", offset=0)
        if self._tokenizer is not None:
            (folder / TOKENIZER).write_text(self._tokenizer().json, encoding="utf-8")
        dataclasses.replace(self.meta, splits=splits).write(folder)


def open_corpus(
    source: str | Path, *, tokenizer: str | Path | None = None, cache: Path | None = None
) -> Corpus:
    """Open data as bytes, or as tokens where a tokenizer file is given, preparing it first where that is needed.

    source: `stdlib` (the standard library of the running Python), a prepared folder, or any file, folder, .tar,
    compressed .tar or compressed file. cache: where prepared data is kept, one folder a source (default:
    `$E88_CACHE/data`, else ~/.cache/e88/data). Raises UserError for whatever cannot be read, prepared or written.
    """
    found = find_source(source)
    folder = cache_folder() / "data" if cache is None else Path(cache)
    with user_errors(f"prepare {source}"):
        if found.kind == "prepared":
            base = found.path
        elif found.holds(folder):
            raise UserError(f"the cache {folder} lies inside the data {source}; set E88_CACHE to a folder elsewhere")
        else:
            base = cached(folder, found.fingerprint(), partial(prepare, found))
        corpus = _load(base)
        if tokenizer is None:
            return corpus
        if corpus.meta.tokenizer is not None:
            raise UserError(f"{source} already holds tokens of {corpus.meta.tokenizer.name}; leave the tokenizer out")
        loaded = Tokenizer.load(tokenizer)
        key = hashlib.sha256(f"{corpus.hash} {loaded.sha256}".encode()).hexdigest()[:24]
        data = {split.name: split.data for split in corpus.splits}
        return _load(cached(folder, key, partial(prepare_tokens, corpus.meta, data, loaded)))


def check_out(out: str | Path) -> Path:
    """The resolved path of a folder to be written: absent, empty or an earlier prepared folder; else UserError."""
    target = Path(out).expanduser().resolve()
    with user_errors(f"write {target}"):
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file; give --out a folder")
        if not target.parent.is_dir():
            raise UserError(f"the folder {target.parent} does not exist; create it first")
        if not os.access(target.parent, os.W_OK):
            raise UserError(f"cannot write in {target.parent}; give --out a folder elsewhere")
        names = {path.name for path in target.iterdir()} if target.exists() else set()
    if names and (META not in names or not names <= {META, TOKENIZER, *(f"{name}.bin" for name in SPLITS)}):
        raise UserError(f"{target} is not empty and not a prepared folder; choose another for --out")
    return target


def _load(folder: Path) -> Corpus:
    meta = Meta.read(folder)
    info = meta.tokenizer
    valid = meta.splits["valid"]
    described, tokenizer = "bytes", None
    if info is not None:
        described = f"{info.name} {info.sha256[:12]} ({'exact' if info.exact else 'scaled'} byte counts)"
        tokenizer = _Lazy(folder / TOKENIZER, info.name)
    return Corpus(
        name=meta.name, hash=meta.hash, vocab_size=meta.vocab_size, bytes_per_token=valid.bytes / valid.length,
        tokenizer=described, meta=meta, _tokenizer=tokenizer,
        **{name: _split(folder, name, meta.splits[name], meta.dtype) for name in SPLITS},
    )  # fmt: skip


def _split(folder: Path, name: str, info: SplitInfo, dtype: str) -> Split:
    path = folder / info.file
    data = np.memmap(path, dtype=np.dtype(dtype), mode="r", offset=info.offset, shape=(info.length,))
    return Split(name, data, info.bytes, info.documents, info.separators, info.sha256)


class _Lazy:
    """A prepared folder's tokenizer, read when first asked for: training needs it only to count bytes."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._tokenizer: Tokenizer | None = None

    def __call__(self) -> Tokenizer:
        if self._tokenizer is None:
            with user_errors("read the tokenizer"):
                self._tokenizer = Tokenizer(self._path.read_text(encoding="utf-8"), self._name)
        return self._tokenizer
