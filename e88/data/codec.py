"""Text to token ids and back: bytes as they are, or a tokenizer that travels with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e88.data.tokenizer import Tokenizer
from e88.errors import UserError


class Codec:
    """Bytes are their own ids unless there is a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any] | None) -> Codec:
        """The codec that `to_dict` described; None is bytes."""
        return cls(Tokenizer(saved["json"], saved["name"]) if saved else None)

    def to_dict(self) -> dict[str, str] | None:
        """What a checkpoint keeps: the tokenizer's name and whole JSON, or None for bytes."""
        return {"name": self.tokenizer.name, "json": self.tokenizer.json} if self.tokenizer else None

    @property
    def longest(self) -> int:
        """The most bytes that one id stands for."""
        return max(int(self.tokenizer.lengths.max()), 1) if self.tokenizer else 1

    def encode(self, text: bytes) -> np.ndarray:
        """int64 [n] ids of a text; UserError where a tokenizer is given bytes that are not UTF-8."""
        if self.tokenizer is None:
            return np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        try:
            (ids,) = self.tokenizer.encode([text.decode()])
        except UnicodeDecodeError as error:
            raise UserError(f"the text is not UTF-8 at byte {error.start}; a tokenizer reads only text") from error
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids; nothing for ids beyond the bytes, which a model with a larger vocabulary may draw."""
        items: list[int] = np.asarray(ids).tolist()
        if self.tokenizer is None:
            return bytes(i for i in items if i < 256)
        return self.tokenizer.decode(items)
