"""An E88 shape of a fixed parameter count at a depth, an n_state and a width of heads that are given."""

from __future__ import annotations

import dataclasses
import math

from e88.errors import UserError
from e88.models.config import E88Config, ModelConfig
from e88.sizing.closed_form import block_params, count_params

# Small models have few shapes of a count unless their width is fine; wide ones want aligned rows.
WIDTH_STEPS = ((128, 2), (1024, 8), (math.inf, 32))
# How far heads may end up from the width asked for, in factors of two: rounding moves few heads that far.
OFF_RATIO = 0.5


def fit(
    target: int, template: ModelConfig, *, depth: int, n_state: int, ratio: float, tolerance: float
) -> ModelConfig | None:
    """The configuration within `tolerance` (relative) of `target` parameters with n_heads * n_state / dim nearest to
    `ratio`; None where there is none near it.

    template: everything else; an MLP keeps its width relative to dim. Raises UserError for a template of another kind
    than E88.
    """
    if not isinstance(template.mixer, E88Config):
        raise UserError(
            f"shapes are searched for E88 models, not for {template.mixer.kind}; give an e88 preset or file"
        )
    if template.hybrid is not None:
        raise UserError("shapes are searched for models of one mixer; leave out hybrid")
    best: tuple[float, ModelConfig] | None = None
    dim = 16
    while True:
        one = _shape(template, dim, depth, n_state, 1)
        if count_params(one) > target * (1 + tolerance):
            break
        per_head = depth * (block_params(_shape(template, dim, depth, n_state, 2)) - block_params(one))
        extra = (target - count_params(one)) / per_head
        for heads in {1 + max(math.floor(extra), 0), 1 + max(math.ceil(extra), 0)}:
            config = _shape(template, dim, depth, n_state, heads)
            if abs(count_params(config) - target) <= tolerance * target:
                off = abs(math.log2(heads * n_state / dim / ratio))
                if off <= OFF_RATIO and (best is None or off < best[0]):
                    best = off, config
        dim += next(step for below, step in WIDTH_STEPS if dim < below)
    return best[1] if best else None


def _shape(template: ModelConfig, dim: int, depth: int, n_state: int, heads: int) -> ModelConfig:
    assert isinstance(template.mixer, E88Config)
    mixer = dataclasses.replace(template.mixer, n_heads=heads, n_state=n_state)
    hidden = template.mlp_hidden and max(round(template.mlp_hidden * dim / template.dim), 1)
    return dataclasses.replace(template, dim=dim, depth=depth, mixer=mixer, mlp_hidden=hidden)
