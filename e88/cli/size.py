"""`e88 size` and `e88 presets`: shapes, counts and the documents' tables, without loading torch."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from e88.cli import app
from e88.errors import UserError

if TYPE_CHECKING:
    from e88.models.config import ModelConfig
    from e88.sizing.advice import Hardware

Flag = bool | None
REQUIRED = ("dim", "depth", "n_heads")
MODEL_KEYS = ("dim", "depth", "vocab_size", "mlp_hidden")


@app.command()
def size(
    name: Annotated[str | None, typer.Argument(metavar="PRESET", help="A preset (see e88 presets).")] = None,
    dim: Annotated[int | None, typer.Option(help="Width of the residual stream.")] = None,
    depth: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    n_heads: Annotated[int | None, typer.Option(help="Heads per layer.")] = None,
    n_state: Annotated[int | None, typer.Option(help="State width of a head.  [default: 32]")] = None,
    expand_v: Annotated[float | None, typer.Option(help="Value width over key width.  [default: 1]")] = None,
    decay: Annotated[str | None, typer.Option(help="mamba, sigmoid, constant or none.  [default: mamba]")] = None,
    gate: Annotated[Flag, typer.Option("--gate/--no-gate", help="Output gate.")] = None,
    conv: Annotated[int | None, typer.Option(help="Width of the short convolution, 0 for none.")] = None,
    head_norm: Annotated[Flag, typer.Option("--head-norm/--no-head-norm", help="RMSNorm of each head.")] = None,
    write_gate: Annotated[Flag, typer.Option("--write-gate/--no-write-gate", help="Scale each write.")] = None,
    tie_kv: Annotated[Flag, typer.Option("--tie-kv/--no-tie-kv", help="One projection for k and v.")] = None,
    linear_state: Annotated[Flag, typer.Option("--linear-state/--tanh-state", help="No tanh (ablation).")] = None,
    mlp_hidden: Annotated[int | None, typer.Option(help="Width of the SwiGLU MLP, 0 for none.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary.  [default: 256]")] = None,
    params: Annotated[str | None, typer.Option(help="Search shapes of this size: 100M, 1.5B, 530k.")] = None,
    against: Annotated[str | None, typer.Option(help="Rivals matched to the size: mamba2,gdn,transformer.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Shapes to show of a search.")] = 5,
    hardware: Annotated[
        str | None,
        typer.Option(help="Whose n_state: h200, a100, ..., auto (see e88 profile) or a profile's file."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens per sequence, for FLOPs and memory.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch, for memory.")] = 32,
    table: Annotated[str | None, typer.Option(help="balanced, sizing, benchmark, plan, state or all.")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="All tables of the documents again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Exact parameters, state, balance and cost of a shape; or shapes for a size; or the documents' tables.

    e88 size --dim 2176 --depth 32 --n-heads 56 | e88 size e88-500m --gate | e88 size --params 500M --against mamba2
    """
    model = {"dim": dim, "depth": depth, "vocab_size": vocab_size, "mlp_hidden": mlp_hidden}
    layer = {
        "n_heads": n_heads, "n_state": n_state, "expand_v": expand_v, "decay": decay, "gate": gate, "conv": conv,
        "head_norm": head_norm, "write_gate": write_gate, "tie_kv": tie_kv, "linear_state": linear_state,
    }  # fmt: skip
    given = {key: value for key, value in {**model, **layer}.items() if value is not None}
    if table or tables:
        result, show = _tables(table or "all"), "tables"
    elif params is not None:
        if name is not None:
            raise UserError("give a preset or --params, not both")
        result, show = _search(params, given, hardware, top, window), "search"
    else:
        config = _preset_with(name, given) if name else _shape(given)
        result, show = _describe(name, config, hardware, window, batch), "description"
    if against and show != "tables":
        target = result["target"] if show == "search" else result["params"]
        result["against"] = _rivals(against, target, vocab_size or 256, window)
    if as_json:
        print(json.dumps(result))
        return
    from e88.cli import size_view

    getattr(size_view, f"show_{show}")(result)


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """List the named configurations: ours, the documents' rows, rivals of the same size."""
    from e88.sizing.closed_form import count_params, state_per_layer
    from e88.sizing.presets import PRESETS

    rows = [
        {
            "name": preset.name,
            "params": count_params(preset.config),
            "state_per_layer": state_per_layer(preset.config),
            "config": preset.config.to_dict(),
            "description": preset.description,
            "source": preset.source,
        }
        for preset in PRESETS.values()
    ]
    if as_json:
        print(json.dumps({"presets": rows}))
        return
    from e88.cli import size_view

    size_view.show_presets(rows)


def _shape(given: dict[str, Any]) -> ModelConfig:
    """An E88 model from the options alone."""
    from e88.models.config import E88Config, ModelConfig

    missing = [f"--{key.replace('_', '-')}" for key in REQUIRED if key not in given]
    if missing:
        raise UserError(f"a shape needs {', '.join(missing)}; or give a preset (see e88 presets) or --params 500M")
    model = {key: value for key, value in given.items() if key in MODEL_KEYS}
    layer = {key: value for key, value in given.items() if key not in MODEL_KEYS}
    return ModelConfig(mixer=E88Config(**layer), **model)


def _preset_with(name: str, given: dict[str, Any]) -> ModelConfig:
    """A preset with the options given in place of its own."""
    from e88.sizing.presets import find_preset

    preset = find_preset(name)
    mixer = preset.config.mixer
    known = {field.name for field in dataclasses.fields(mixer)}
    for key in given:
        if key not in known and key not in MODEL_KEYS:
            own = ", ".join(sorted(known))
            raise UserError(f"{preset.name} is a {mixer.kind} model and has no {key}; its own options are {own}")
    model = {key: value for key, value in given.items() if key in MODEL_KEYS}
    layer = {key: value for key, value in given.items() if key not in MODEL_KEYS}
    return preset.config.with_mixer(dataclasses.replace(mixer, **layer), **model)


def _describe(name: str | None, config: ModelConfig, hardware: str | None, window: int, batch: int) -> dict[str, Any]:
    from e88.sizing import advice, closed_form, profiles
    from e88.sizing.memory import training_memory
    from e88.sizing.presets import find_preset

    on = None if hardware is None else profiles.choose(hardware)
    result = {
        "name": find_preset(name).name if name else None,
        "config": config.to_dict(),
        "window": window,
        **closed_form.describe(config, window, on),
        "notes": advice.notes(config),
        "batch": batch,
        "memory": training_memory(config, batch, window),
    }
    if on is not None:
        result["hardware"] = dataclasses.asdict(on)
        result["recurrence_ns"] = _recurrence_ns(config, on)
    return result


def _recurrence_ns(config: ModelConfig, on: Hardware) -> float | None:
    """Measured time of all layers' recurrence per token in nanoseconds; None where it was not measured."""
    from e88.models.config import E88Config

    total = 0.0
    for part in config.parts():
        mixer = part.mixer
        if not isinstance(mixer, E88Config) or mixer.expand_v != 1 or mixer.linear_state:
            return None
        time = on.nanoseconds(mixer.n_heads, mixer.n_state)
        if time is None:
            return None
        total += time * part.depth
    return total


def _search(params: str, given: dict[str, Any], hardware: str | None, top: int, window: int) -> dict[str, Any]:
    from e88.models.config import E88Config
    from e88.sizing import profiles, solve
    from e88.sizing.closed_form import describe
    from e88.sizing.units import parse_count

    target = parse_count(params)
    fixed = {key: value for key, value in given.items() if key in (*MODEL_KEYS, "n_heads", "n_state")}
    options = {key: value for key, value in given.items() if key not in fixed}
    template = E88Config(n_heads=1, **options)
    on = profiles.choose(hardware)
    found = solve.solve(target, template=template, on=on, top=top, **fixed)
    return {
        "target": target,
        "tolerance": solve.TOLERANCE,
        "window": window,
        "hardware": dataclasses.asdict(on),
        "ranking": solve.RANKING,
        "candidates": [
            {
                "config": candidate.config.to_dict(),
                **describe(candidate.config, window, on),
                "recurrence_ns": _recurrence_ns(candidate.config, on),
                "difference": candidate.params / target - 1,
                "score": candidate.score,
                "penalties": candidate.penalties,
            }
            for candidate in found
        ],
    }


def _rivals(names: str, target: int, vocab_size: int, window: int) -> list[dict[str, Any]]:
    from e88.sizing.closed_form import describe
    from e88.sizing.solve import matched

    rivals = []
    for name in (part.strip() for part in names.split(",") if part.strip()):
        config = matched(name, target, vocab_size=vocab_size)
        size = describe(config, window)
        rivals.append({"name": name, "config": config.to_dict(), **size, "difference": size["params"] / target - 1})
    return rivals


def _tables(name: str) -> dict[str, Any]:
    from e88.sizing.tables import document_tables

    return {"tables": document_tables(name)}
