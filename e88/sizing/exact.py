"""The groups of `closed_form.py`, counted from the real model on the meta device (no memory, no arithmetic)."""

from __future__ import annotations

import torch

from e88.models.config import ModelConfig
from e88.sizing.closed_form import GROUPS

# Leading part of a mixer parameter's name -> group, for our layers and for the rivals' libraries.
_MIXER_GROUPS = {
    "qkv_proj": "projections",
    "q_proj": "projections",
    "k_proj": "projections",
    "v_proj": "projections",
    "in_proj": "projections",
    "a_proj": "decay",
    "A_log": "decay",
    "dt_bias": "decay",
    "decay_logit": "decay",
    "g_proj": "gate",
    "b_proj": "write_gate",
    "qkv_conv": "conv",
    "q_conv1d": "conv",
    "k_conv1d": "conv",
    "v_conv1d": "conv",
    "conv1d": "conv",
    "D": "skip",
    "o_norm": "head_norm",
    "norm": "head_norm",
    "o_proj": "output",
    "out_proj": "output",
}


def group_of(name: str) -> str:
    """The group of a `LanguageModel` parameter. KeyError for a name of none, so that nothing goes uncounted."""
    parts = name.split(".")
    if parts[0] == "embedding":
        return "embedding"
    if parts[0] == "norm":
        return "norms"
    assert parts[0] == "blocks", name
    if parts[2] in ("norm", "mlp_norm"):
        return "norms"
    if parts[2] == "mlp":
        return "mlp"
    return _MIXER_GROUPS[parts[3]]


def exact_params_by_group(config: ModelConfig) -> dict[str, int]:
    """Parameters of each group that the built model has, in the order of `GROUPS`; shared parameters count once."""
    from e88.models.lm import LanguageModel

    with torch.device("meta"):
        model = LanguageModel(config)
    counts = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        counts[group_of(name)] += parameter.numel()
    return {group: count for group, count in counts.items() if count}
