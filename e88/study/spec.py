"""What one run is: a model, a training configuration, data. From a preset, a TOML file, or both with options on top."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from e88.errors import UserError, unknown_name
from e88.models.config import ModelConfig
from e88.sizing.presets import preset
from e88.training.config import TrainingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_DATA = "stdlib"


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """name: the preset's, or the user's. data: what `e88.data.corpus.open_corpus` opens. tokenizer: a JSON file."""

    name: str
    model: ModelConfig
    training: TrainingConfig
    data: str = DEFAULT_DATA
    tokenizer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "model": self.model.to_dict(), "training": self.training.to_dict(),
            "data": self.data, "tokenizer": self.tokenizer,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSpec:
        """The spec of a mapping with the keys name, model, training, data, tokenizer; UserError for any other."""
        known = ("name", "model", "training", "data", "tokenizer")
        for key in data:
            if key not in known:
                raise unknown_name("key", key, known)
        for key in ("model", "training"):
            if not isinstance(data.get(key), Mapping):
                raise UserError(f"the configuration needs a [{key}] table")
        return cls(
            name=str(data.get("name", "model")),
            model=ModelConfig.from_dict(data["model"]),
            training=TrainingConfig.from_dict(data["training"]),
            data=str(data.get("data", DEFAULT_DATA)),
            tokenizer=data.get("tokenizer"),
        )

    def with_vocabulary(self, size: int) -> RunSpec:
        """The spec for data with `size` token ids: a tokenizer's vocabulary becomes the model's."""
        return replace(self, model=replace(self.model, vocab_size=size)) if self.tokenizer else self


@cache
def _recipes() -> dict[str, Any]:
    return tomllib.loads((resources.files("e88.study") / "recipes.toml").read_text())


def recipe(name: str) -> dict[str, Any]:
    """Training options of a preset, its own on top of those of its kind, chosen on a published grid (recipes.toml)."""
    return {**_recipes()["kinds"][preset(name).mixer.kind], **_recipes().get(name.lower(), {})}


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; UserError where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a TOML configuration") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {str(error).splitlines()[0]}; correct it") from error


def make_spec(
    source: str, options: Mapping[str, Any], *, data: str | None = None, tokenizer: str | None = None
) -> RunSpec:
    """A run from a preset's name or a TOML file, with training options on top of the preset's recipe.

    A budget among the options replaces the source's.
    """
    base: dict[str, Any]
    if source.endswith(".toml"):
        base = read_toml(Path(source))
        base.setdefault("name", Path(source).stem)
        if isinstance(base.get("model"), str):
            base["model"] = preset(base["model"]).to_dict()
    else:
        base = {"name": source, "model": preset(source).to_dict(), "training": recipe(source)}
    base["training"] = {**base.get("training", {}), **options}
    for key, value in (("data", data), ("tokenizer", tokenizer)):
        if value is not None:
            base[key] = value
    return RunSpec.from_dict(base)


def to_toml(spec: RunSpec) -> str:
    """A run as `make_spec` reads it from a file."""
    lines: list[str] = []

    def table(values: Mapping[str, Any], path: str) -> None:
        plain = {key: value for key, value in values.items() if not isinstance(value, Mapping) and value is not None}
        if path:
            lines.extend(["", f"[{path}]"])
        # JSON writes strings, numbers and truth values as TOML does.
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in plain.items())
        for key, value in values.items():
            if isinstance(value, Mapping):
                table(value, f"{path}.{key}" if path else key)

    table(spec.to_dict(), "")
    return "\n".join(lines) + "\n"


def parse_assignments(pairs: list[str]) -> dict[str, Any]:
    """["lr=1e-3", "clip=0.5"] -> {"lr": 0.001, "clip": 0.5}; values are TOML, or plain strings."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"'{pair}' is not KEY=VALUE; write for instance --set lr=1e-3")
        try:
            options[key.strip()] = tomllib.loads(f"x = {text.strip()}")["x"]
        except tomllib.TOMLDecodeError:
            options[key.strip()] = text.strip()
    return options
