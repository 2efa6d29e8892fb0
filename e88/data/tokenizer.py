"""Tokenizers: Hugging Face `tokenizers` JSON files, with the bytes that each token stands for.

The surface of a token is the bytes it adds to the text. For byte-level BPE it is read off the vocabulary through the
byte alphabet, for SentencePiece-like vocabularies by turning the word mark into a space and `<0x..>` into a byte.
Whether surfaces, joined, give the text back is not assumed: it is checked on every document when data is prepared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from e88.errors import UserError

WORD_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A tokenizer file, made a function of the text alone.

    Three things a file may ask for are switched off: a space put before each text (it stands for no byte of it), BPE
    dropout (random), truncation and padding.
    """

    def __init__(self, text: str, name: str) -> None:
        """text: the file's JSON. Raises UserError where it is not a tokenizer."""
        try:
            self._config = _faithful(json.loads(text))
            vocabulary = _vocabulary(self._config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is not a tokenizer file; it must be a tokenizer.json of `tokenizers`") from error
        if not vocabulary:
            raise UserError(f"the tokenizer {name} has an empty vocabulary")
        self.name = name
        self.json = json.dumps(self._config, ensure_ascii=False)
        self.sha256 = hashlib.sha256(self.json.encode()).hexdigest()
        self.vocab_size = max(vocabulary) + 1
        self._vocabulary = vocabulary

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a JSON file; UserError where it is missing or not one."""
        path = Path(path).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a tokenizer file; it must be a tokenizer.json of `tokenizers`") from error
        return cls(text, path.name)

    @cached_property
    def _kind(self) -> str:
        """How the vocabulary writes text: `byte-level`, `marked` (a mark for each space) or `plain`."""
        stages = [self._config.get(stage) for stage in ("normalizer", "pre_tokenizer", "decoder")]
        if "ByteLevel" in _types(stages):
            return "byte-level"
        return "marked" if WORD_MARK in json.dumps(stages, ensure_ascii=False) else "plain"

    @cached_property
    def surfaces(self) -> list[bytes]:
        """The bytes of each id; empty for ids that the vocabulary does not use."""
        model = self._config["model"]
        added = {token["id"] for token in self._config.get("added_tokens") or []}
        found = [b""] * self.vocab_size
        for index, token in self._vocabulary.items():
            if index in added:
                found[index] = token.encode()
            elif self._kind == "byte-level":
                found[index] = b"".join(_BYTES.get(char) or char.encode() for char in token)
            elif model.get("byte_fallback") and (match := _BYTE_TOKEN.fullmatch(token)):
                found[index] = bytes([int(match[1], 16)])
            else:
                prefix = model.get("continuing_subword_prefix") or ""
                token = token.removeprefix(prefix)
                found[index] = (token.replace(WORD_MARK, " ") if self._kind == "marked" else token).encode()
        return found

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of each surface."""
        return np.array([len(surface) for surface in self.surfaces], dtype=np.int64)

    @cached_property
    def _library(self) -> Any:
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            if error.name != "tokenizers":
                raise
            raise UserError("a tokenizer needs the package tokenizers: pip install tokenizers") from error
        try:
            return tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:
            line = " ".join(str(error).split())
            raise UserError(f"the tokenizer {self.name} cannot be read: {line}") from error

    @cached_property
    def separator(self) -> list[int]:
        """Ids that stand for exactly the separator byte, or none where the tokenizer cannot express it."""
        (ids,) = self.encode(["\x1e"])
        return ids if self.join(ids) == b"\x1e" else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens of the tokenizer's own making."""
        return [e.ids for e in self._library.encode_batch(list(texts), add_special_tokens=False)]

    def join(self, ids: Sequence[int]) -> bytes:
        """The surfaces of ids, joined."""
        return b"".join([self.surfaces[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> bytes:
        """The text of ids: their surfaces, or by the tokenizer's own decoder where it puts spaces between tokens."""
        if self._kind != "plain":
            return self.join(ids)
        return self._library.decode(list(ids), skip_special_tokens=False).encode()


def _faithful(config: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    config["truncation"] = config["padding"] = None
    config["model"] = dict(config["model"])
    if "dropout" in config["model"]:
        config["model"]["dropout"] = None
    for stage in ("normalizer", "pre_tokenizer"):
        config[stage] = _without_prefix(config.get(stage))
    return config


def _without_prefix(stage: Any) -> Any:
    """A normalizer or pre-tokenizer that adds no space at the start of a text."""
    if not isinstance(stage, dict):
        return stage
    if stage.get("type") == "Prepend":
        return None
    stage = dict(stage)
    if "add_prefix_space" in stage:
        stage["add_prefix_space"] = False
    if "prepend_scheme" in stage:
        stage["prepend_scheme"] = "never"
    for key in ("normalizers", "pretokenizers"):
        if key in stage:
            stage[key] = [kept for inner in stage[key] if (kept := _without_prefix(inner)) is not None]
    return stage


def _vocabulary(config: dict[str, Any]) -> dict[int, str]:
    """id -> token, added tokens last. Unigram lists [token, score], the other models map token to id."""
    vocab = config["model"]["vocab"]
    tokens = {i: token for i, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else {
        int(i): token for token, i in vocab.items()
    }  # fmt: skip
    tokens.update({int(token["id"]): str(token["content"]) for token in config.get("added_tokens") or []})
    return tokens


def _types(stage: Any) -> set[str]:
    """All `type` names within a stage."""
    if isinstance(stage, dict):
        own = {stage["type"]} if isinstance(stage.get("type"), str) else set()
        return own.union(*map(_types, stage.values()))
    return set().union(*map(_types, stage)) if isinstance(stage, list) else set()


def _byte_alphabet() -> dict[str, bytes]:
    """The characters that byte-level BPE writes for bytes: visible Latin-1 ones for themselves, the others, in order,
    from U+0100 on (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(visible))
    alphabet = {chr(byte): bytes([byte]) for byte in visible}
    alphabet.update({chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()
