"""Exact sizes of a `ModelConfig` from arithmetic alone: parameters, state, training FLOPs.

    D dim, L depth, H heads, K key width of a head, V value width of a head, w convolution width

Every layer is written once, as a list of (group, shape). A shape of two axes is a weight that multiplies
activations; a shape of one axis (norms, biases, A_log) is not, and so costs no matrix FLOPs. `exact.py` counts the
same groups from the real model, and the tests hold the two equal.
"""

from __future__ import annotations

from math import prod
from typing import Any

from e88.models.config import (
    AttentionConfig,
    E88Config,
    GatedDeltaNetConfig,
    Mamba2Config,
    MixerConfig,
    ModelConfig,
)
from e88.sizing.advice import Hardware, verdicts, warnings

# The order in which groups are shown.
GROUPS = (
    "embedding",
    "projections",
    "decay",
    "gate",
    "write_gate",
    "conv",
    "skip",
    "head_norm",
    "output",
    "norms",
    "mlp",
)
FLOAT32_BYTES = 4

Shapes = list[tuple[str, tuple[int, ...]]]


def _e88_shapes(dim: int, c: E88Config) -> Shapes:
    heads, k_dim, v_dim = c.n_heads, c.head_k_dim, c.head_v_dim
    qkv = heads * (2 * k_dim if c.tie_kv else 2 * k_dim + v_dim)
    shapes: Shapes = [("projections", (qkv, dim))]
    if c.decay in ("mamba", "sigmoid"):
        shapes.append(("decay", (heads, dim)))
    # mamba has A_log and dt_bias, sigmoid a bias, constant one logit per head.
    vectors = {"mamba": 2, "sigmoid": 1, "constant": 1, "none": 0}[c.decay]
    shapes += [("decay", (heads,))] * vectors
    if c.gate:
        shapes.append(("gate", (heads * v_dim, dim)))
    if c.write_gate:
        shapes.append(("write_gate", (heads, dim)))
    if c.conv:
        shapes.append(("conv", (qkv, c.conv)))
    if c.head_norm:
        shapes.append(("head_norm", (v_dim,)))
    shapes.append(("output", (dim, heads * v_dim)))
    return shapes


def _gated_deltanet_shapes(dim: int, c: GatedDeltaNetConfig) -> Shapes:
    heads, key, value = c.n_heads, c.n_heads * c.head_dim, c.n_heads * c.head_v_dim
    shapes: Shapes = [("projections", (2 * key + value, dim))]
    shapes += [("decay", (heads, dim)), ("decay", (heads,)), ("decay", (heads,)), ("write_gate", (heads, dim))]
    if c.gate:
        shapes.append(("gate", (value, dim)))
    if c.conv:
        shapes.append(("conv", (2 * key + value, c.conv)))
    shapes += [("head_norm", (c.head_v_dim,)), ("output", (dim, value))]
    return shapes


def _mamba2_shapes(dim: int, c: Mamba2Config) -> Shapes:
    inner = c.expand * dim
    heads = inner // c.head_dim
    channels = inner + 2 * c.n_groups * c.d_state
    return [
        # One matrix for the gate z, x, B, C and dt.
        ("projections", (inner + channels + heads, dim)),
        ("decay", (heads,)),
        ("decay", (heads,)),
        ("conv", (channels, c.conv)),
        ("conv", (channels,)),
        ("skip", (heads,)),
        ("head_norm", (inner,)),
        ("output", (dim, inner)),
    ]


def mixer_shapes(dim: int, mixer: MixerConfig) -> Shapes:
    """(group, shape) of every parameter of one mixer of width `dim`.

    Sources: E88 as its documents; Gated DeltaNet as flash-linear-attention's layer; Mamba2 as mamba-ssm's layer.
    """
    if isinstance(mixer, E88Config):
        return _e88_shapes(dim, mixer)
    if isinstance(mixer, GatedDeltaNetConfig):
        return _gated_deltanet_shapes(dim, mixer)
    if isinstance(mixer, Mamba2Config):
        return _mamba2_shapes(dim, mixer)
    assert isinstance(mixer, AttentionConfig)
    return [("projections", (3 * dim, dim)), ("output", (dim, dim))]


def block_shapes(config: ModelConfig) -> Shapes:
    """(group, shape) of every parameter of one block with the model's first mixer: norm, mixer and, where asked for,
    norm and SwiGLU MLP."""
    dim, hidden = config.dim, config.mlp_hidden
    shapes: Shapes = [("norms", (dim,)), *mixer_shapes(dim, config.mixer)]
    if hidden:
        shapes += [("norms", (dim,)), ("mlp", (2 * hidden, dim)), ("mlp", (dim, hidden))]
    return shapes


def block_params(config: ModelConfig) -> int:
    """Parameters of one block with the model's first mixer; a model of one mixer has `depth` of them, the embedding and
    the final norm."""
    return sum(prod(shape) for _, shape in block_shapes(config))


def params_by_group(config: ModelConfig) -> dict[str, int]:
    """Parameters of each group that the model has, in the order of `GROUPS`; the tied head is the embedding."""
    counts = dict.fromkeys(GROUPS, 0)
    counts["embedding"] = config.vocab_size * config.dim
    counts["norms"] = config.dim
    for part in config.parts():
        for group, shape in block_shapes(part):
            counts[group] += part.depth * prod(shape)
    return {group: count for group, count in counts.items() if count}


def count_params(config: ModelConfig) -> int:
    """Parameters of the model, exactly: the sum of `params_by_group`."""
    return sum(part.depth * block_params(part) for part in config.parts()) + (config.vocab_size + 1) * config.dim


def state_per_layer(config: ModelConfig, window: int = 512) -> int:
    """Elements of one layer's state for one sequence: E88 and Gated DeltaNet H*K*V, Mamba2 expand*D*d_state.

    Attention has no fixed state: its key and value cache after `window` tokens, 2*D*window. The few inputs that a short
    convolution remembers are left out, as in the documents. Of a hybrid the mean over its layers, rounded.
    """
    if config.hybrid is not None:
        return round(state_total(config, window) / config.depth)
    mixer = config.mixer
    if isinstance(mixer, E88Config):
        return mixer.n_heads * mixer.head_k_dim * mixer.head_v_dim
    if isinstance(mixer, GatedDeltaNetConfig):
        return mixer.n_heads * mixer.head_dim * mixer.head_v_dim
    if isinstance(mixer, Mamba2Config):
        return mixer.expand * config.dim * mixer.d_state
    return 2 * config.dim * window


def state_total(config: ModelConfig, window: int = 512) -> int:
    """Elements of all layers' states for one sequence."""
    return sum(part.depth * state_per_layer(part, window) for part in config.parts())


def projection_ratio(config: ModelConfig) -> float | None:
    """H*n_state/dim of an E88 model (the balanced guide's ratio); None for other mixers."""
    return config.mixer.d_inner / config.dim if isinstance(config.mixer, E88Config) else None


def dim_over_inner(config: ModelConfig) -> float | None:
    """dim/(H*n_state) of an E88 model (the sizing guide's ratio); None for other mixers."""
    return config.dim / config.mixer.d_inner if isinstance(config.mixer, E88Config) else None


def mixing_flops_per_token(config: ModelConfig, window: int = 512) -> float:
    """Forward FLOPs per token of sequence mixing in one layer with the model's first mixer, beyond its matrices. An exp
    or tanh counts as one.

    Per state element: E88 reads (2), decays (1), writes k e^T (2), takes tanh (1) and reads out with q (2), so 8 H K V,
    less what an option switches off; Gated DeltaNet the same without tanh, 7 H K V; Mamba2 decays (1), writes (2) and
    reads out (2), 5 expand*D d_state. These are the recurrences themselves, not the extra work of a chunked kernel.
    Attention: scores and weighted sum, 2 D each per visible key, with (window + 1)/2 keys visible on average.
    """
    state = state_per_layer(config.parts()[0], window)
    mixer = config.mixer
    if isinstance(mixer, E88Config):
        return state * (8 - mixer.linear_state - (mixer.decay == "none"))
    if isinstance(mixer, GatedDeltaNetConfig):
        return 7 * state
    if isinstance(mixer, Mamba2Config):
        return 5 * state
    return 4 * config.dim * (window + 1) / 2


def flops_per_token(config: ModelConfig, window: int = 512) -> float:
    """Training FLOPs per token of a `window`-token sequence: 6 per weight that multiplies, 3 times the mixing.

    The 6 is a multiply and an add, forward and twice again backward (Kaplan et al., 2020). The tied matrix counts once,
    as the head; the embedding look-up is free. Norms, activations and the loss are left out.
    """
    flops = 6.0 * config.vocab_size * config.dim
    for part in config.parts():
        weights = sum(prod(shape) for _, shape in block_shapes(part) if len(shape) == 2)
        flops += part.depth * (6 * weights + 3 * mixing_flops_per_token(part, window))
    return flops


def describe(config: ModelConfig, window: int = 512, on: Hardware | None = None) -> dict[str, Any]:
    """Everything about a model's size as one JSON-able mapping.

    `window` (tokens) enters the FLOPs and the state of attention only; `on` (hardware) only the warnings. `state_bytes`
    is float32, for one sequence, over all layers. `projection_ratio`, `dim_over_inner` and the guides' verdicts exist
    for E88 alone: None and [] for other mixers; of a hybrid they are those of its first mixer.
    """
    groups = params_by_group(config)
    total = state_total(config, window)
    return {
        "params": sum(groups.values()),
        "params_by_group": groups,
        "state_per_layer": state_per_layer(config, window),
        "state_total": total,
        "state_bytes": total * FLOAT32_BYTES,
        "projection_ratio": projection_ratio(config),
        "dim_over_inner": dim_over_inner(config),
        "flops_per_token": flops_per_token(config, window),
        "verdicts": verdicts(config),
        "warnings": warnings(config, on),
    }
