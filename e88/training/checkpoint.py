"""Checkpoints: one safetensors file, written whole or not at all, read without pickle.

Tensors are named `model.*`, `optimizer.*`, `rng.*`; everything else is JSON in the file's metadata under `e88`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from e88.errors import UserError
from e88.files import write_atomic
from e88.layers.common import keep_decay_exemptions
from e88.models.config import ModelConfig
from e88.models.lm import LanguageModel, LMState

FORMAT = 1


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named tensors and JSON metadata as one safetensors file, with a checksum over both."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **meta})

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata={"e88": text, "checksum": _checksum(plain, text)})
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomic(path, write)


def load_tensors(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors whose names start with `prefix`, metadata). Raises UserError for a missing, corrupt or foreign file."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.safetensors"
    if not path.exists():
        raise UserError(f"no file {path}; give a checkpoint written by e88 train")
    try:
        header, tensors = _read(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable safetensors file ({reason}); use an intact checkpoint") from error
    if not {"e88", "checksum"} <= header.keys():
        raise UserError(f"{path} was not written by e88; use a checkpoint or state file that e88 wrote")
    if _checksum(tensors, header["e88"]) != header["checksum"]:
        raise UserError(f"{path} is damaged: it does not match its checksum; use another copy")
    meta = json.loads(header["e88"])
    if meta["format"] != FORMAT:
        raise UserError(f"{path} has format {meta['format']}, not {FORMAT}; read it with the version that wrote it")
    return {name: t for name, t in tensors.items() if name.startswith(prefix)}, meta


def _read(path: Path, tries: int = 20) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of one file: the library opens a path twice, and a running training may replace it between."""
    for _ in range(tries):
        before = _version(path.stat())
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError):
            if _version(path.stat()) == before:
                raise
            continue
        if _version(path.stat()) == before:
            return found
    raise OSError("it is replaced faster than it can be read")


def _version(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """CRC-32 over the metadata and every tensor's name, dtype, shape and bytes."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested dict or list into `tensors` under dotted names; returns the JSON-able rest."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"__tensor__": prefix}
    if isinstance(tree, dict):
        return {str(k): flatten(v, f"{prefix}.{k}", tensors) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [flatten(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    assert tree is None or isinstance(tree, (bool, int, float, str)), f"cannot save {type(tree)} at {prefix}"
    return tree


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`; keys that were integers become integers again."""
    if isinstance(tree, dict):
        if set(tree) == {"__tensor__"}:
            return tensors[tree["__tensor__"]]
        return {int(k) if k.isdigit() else k: unflatten(v, tensors) for k, v in tree.items()}
    return [unflatten(v, tensors) for v in tree] if isinstance(tree, list) else tree


def load_model(path: str | Path, device: torch.device) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, and the checkpoint's metadata."""
    tensors, meta = load_tensors(path, "model.")
    if "model" not in meta or not tensors:
        raise UserError(f"{path} holds no model (it may be a state file); give a checkpoint written by e88 train")
    config = ModelConfig.from_dict(meta["model"])
    with torch.device("meta"):
        model = LanguageModel(config)
    restore_model(model, tensors, path)
    return model.to(device).eval(), meta


def restore_model(model: LanguageModel, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Put the tensors named `model.*` into the model in place of its own."""
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        with keep_decay_exemptions(model):
            model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own configuration: {str(error).splitlines()[-1].strip()}") from error


def save_state(path: str | Path, state: LMState, pending: list[int], config: ModelConfig) -> None:
    """Write a recurrent state, so that generation can go on from it later; `pending`: tokens it has not read yet."""
    tensors = {f"state.{i}.{name}": t for i, layer in enumerate(state) for name, t in layer.items()}
    save_tensors(Path(path), tensors, {"kind": "state", "model": config.to_dict(), "pending": pending})


def load_state(path: str | Path, config: ModelConfig, device: torch.device) -> tuple[LMState, list[int]]:
    """A state written by `save_state` for the same model configuration, and its pending tokens; UserError for any
    other file."""
    tensors, meta = load_tensors(path, "state.")
    if meta.get("kind") != "state":
        raise UserError(f"{path} is not a state file; give one written by e88 generate --save-state")
    if meta["model"] != config.to_dict():
        raise UserError(f"{path} holds the state of a model of another configuration; use it with its own checkpoint")
    state: LMState = [{} for _ in range(config.depth)]
    for name, tensor in tensors.items():
        _, layer, key = name.split(".", 2)
        state[int(layer)][key] = tensor.to(device)
    return state, meta["pending"]
