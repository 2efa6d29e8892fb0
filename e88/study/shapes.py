"""The models of a study: from a table in its spec to a configuration, at full size or shrunk by a rule.

A table is one of
    preset = NAME, with any other key of the model or its mixer on top
    kind = KIND, params = "500M", and any of dim, depth, n_heads, n_state fixed: solved for the count, balanced
    kind = KIND, match = another model of the study: as many parameters as that has
    kind = KIND and all dimensions
A preset may have `match` too, which holds where the study is shrunk: dimensions for that many parameters, all else as
in the preset. At full size the preset is what it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from e88.errors import UserError
from e88.models.config import (
    AttentionConfig,
    E88Config,
    Mamba2Config,
    MixerConfig,
    ModelConfig,
    build_config,
    build_mixer_config,
)
from e88.sizing.closed_form import block_params
from e88.sizing.presets import preset
from e88.sizing.solve import TOLERANCE, matched, mixer_kind, solve
from e88.sizing.units import parse_count

MODEL_KEYS = ("dim", "depth", "vocab_size", "mlp_hidden", "output_gain", "branch_gain", "hybrid", "hybrid_every")
SOLVED_KEYS = ("dim", "depth", "n_heads", "n_state")
WIDTH_STEP = 8


@dataclass(frozen=True)
class Shrink:
    """A rule that makes a study's models small and keeps what they differ in: widths (dim and heads) divided by
    `width`, depths by `depth`, so parameters by about width² depth; n_state and head widths stay.

    tolerance: of a solved or matched count, relative. Small models have few shapes, so it is wider there.
    """

    width: float = 1.0
    depth: float = 1.0
    tolerance: float = TOLERANCE

    @property
    def params(self) -> float:
        return self.width**2 * self.depth

    @property
    def is_none(self) -> bool:
        return self.width == self.depth == 1


def build(table: Mapping[str, Any], shrink: Shrink, params_of: Callable[[str], int], *, full_size: bool) -> ModelConfig:
    """The configuration of a table. params_of: parameters of another model of the study, for `match`. full_size:
    whether the study is not shrunk, so that a preset's `match` does not hold."""
    options = dict(table)
    match = options.pop("match", None)
    if match is not None and not ("preset" in options and full_size):
        return _matched(options, params_of(match), shrink.tolerance)
    if "preset" in options:
        base = preset(options.pop("preset"))
        return shrunk(_with(base, options), shrink)
    if "kind" not in options:
        raise UserError("a model needs a preset, or a kind with params or all of its dimensions")
    if "params" in options:
        return _solved(options, shrink)
    model = {key: options.pop(key) for key in MODEL_KEYS if key in options}
    return shrunk(ModelConfig.from_dict({**model, "mixer": options}), shrink)


def _matched(options: dict[str, Any], target: int, tolerance: float) -> ModelConfig:
    """A kind's usual form, or a preset's own, in a shape of `target` parameters."""
    if "preset" not in options:
        kind = options.pop("kind", "")
        vocab_size = options.pop("vocab_size", ModelConfig.vocab_size)
        if options:
            raise UserError(f"a model with kind and match has the kind's usual form; drop {', '.join(options)}")
        return matched(kind, target, tolerance, vocab_size=vocab_size)
    form = _with(preset(options.pop("preset")), options)
    if form.hybrid is not None or bool(form.mlp_hidden) != isinstance(form.mixer, AttentionConfig):
        raise UserError("match finds shapes of one mixer, attention with an MLP, others without; leave out match")
    found = matched(form.mixer.kind, target, tolerance, vocab_size=form.vocab_size, options=form.mixer)
    return dataclasses.replace(found, output_gain=form.output_gain, branch_gain=form.branch_gain)


def _with(config: ModelConfig, options: Mapping[str, Any]) -> ModelConfig:
    """A configuration with some of its own, or its mixer's, keys replaced; of two mixers of a kind both follow."""
    model = {key: value for key, value in options.items() if key in MODEL_KEYS}
    mixer = {key: value for key, value in options.items() if key not in MODEL_KEYS}
    built = build_config(type(config.mixer), {**dataclasses.asdict(config.mixer), **mixer})
    if "hybrid" in model:
        model["hybrid"] = build_mixer_config(model["hybrid"], built)
    return config.with_mixer(built, **model)


def _solved(options: dict[str, Any], shrink: Shrink) -> ModelConfig:
    kind = mixer_kind(options.pop("kind"))
    target = round(parse_count(str(options.pop("params"))) / shrink.params)
    fixed = {key: options.pop(key) for key in SOLVED_KEYS if key in options}
    find = {"tolerance": shrink.tolerance, "vocab_size": options.pop("vocab_size", ModelConfig.vocab_size)}
    if "dim" in fixed:
        fixed["dim"] = _width(fixed["dim"] / shrink.width)
    if "n_heads" in fixed:
        fixed["n_heads"] = max(round(fixed["n_heads"] / shrink.width), 1)
    if "depth" in fixed:
        fixed["depth"] = max(round(fixed["depth"] / shrink.depth), 1)
    if kind == "e88":
        template = build_config(E88Config, {"n_heads": 1, **options})
        return solve(target, template=template, top=1, **find, **fixed)[0].config
    if set(fixed) - {"depth"} or options:
        raise UserError(f"a {kind} model is solved from params and depth alone; drop {', '.join({**fixed, **options})}")
    return matched(kind, target, **find, **fixed)


def shrunk(config: ModelConfig, shrink: Shrink) -> ModelConfig:
    """A configuration by the rule: widths divided, then the depth that comes nearest to the divided count."""
    if shrink.is_none:
        return config
    mixers = [_narrow(part.mixer, shrink) for part in config.parts()]
    step = math.lcm(*map(_step, mixers))
    small = dataclasses.replace(
        config,
        dim=_width(config.dim / shrink.width, step if step > 1 else WIDTH_STEP),
        mixer=mixers[0],
        mlp_hidden=round(config.mlp_hidden / shrink.width),
        hybrid=mixers[1] if config.hybrid is not None else None,
    )
    # The embedding does not shrink with the square of the width: the blocks alone are held to the rule.
    depth = round(_blocks(config) / shrink.params / _blocks(small) * small.depth)
    depth = max(depth, 1 if config.hybrid is None else 2)
    return dataclasses.replace(small, depth=depth, hybrid_every=min(config.hybrid_every, depth))


def _blocks(config: ModelConfig) -> int:
    """Parameters of all blocks."""
    return sum(part.depth * block_params(part) for part in config.parts())


def _narrow(mixer: MixerConfig, shrink: Shrink) -> MixerConfig:
    """A mixer with its heads divided by the rule; Mamba2's follow from the width."""
    if isinstance(mixer, Mamba2Config):
        return mixer
    return dataclasses.replace(mixer, n_heads=max(round(mixer.n_heads / shrink.width), 1))


def _step(mixer: MixerConfig) -> int:
    """What the width must be a multiple of for a mixer to fill it with whole heads."""
    if isinstance(mixer, Mamba2Config):
        return math.lcm(mixer.head_dim * mixer.n_groups, mixer.expand) // mixer.expand
    return 2 * mixer.n_heads if isinstance(mixer, AttentionConfig) else 1


def _width(dim: float, step: int = WIDTH_STEP) -> int:
    return max(round(dim / step), 1) * step
