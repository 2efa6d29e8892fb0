"""Counts against the documents' figures, against the design's formula, and against an operation counter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from e88.sizing.closed_form import (
    count_params,
    describe,
    dim_over_inner,
    flops_per_token,
    mixing_flops_per_token,
    params_by_group,
    projection_ratio,
    state_per_layer,
)
from e88.sizing.presets import preset

BENCHMARK_ROWS = {
    "E88_b56n32": 504,
    "E88_b60n32": 508,
    "E88_b64n32": 508,
    "E88_b44n48": 488,
    "E88_b28n64": 502,
    "E88_b40n48": 507,
    "E88_b32n64": 506,
}


def test_totals_of_the_baselines() -> None:
    assert count_params(preset("gdn-500m-doc")) == 533_694_928
    assert round(count_params(preset("gdn-500m")), -5) == 533_800_000
    assert round(count_params(preset("mamba2-500m")), -5) == 508_300_000
    assert round(count_params(preset("E88_b64n32-guide")), -5) == 541_700_000
    assert round(count_params(preset("transformer-500m")), -6) == 510_000_000


@pytest.mark.parametrize(("name", "printed"), BENCHMARK_ROWS.items())
def test_benchmark_rows_with_the_documents_two_vectors_per_norm(name: str, printed: int) -> None:
    config = preset(name)
    second_vectors = (config.depth + 1) * config.dim
    assert round((count_params(config) + second_vectors) / 1e6) == printed
    # With one vector, as built, b44n48 is 487.49M and the others round the same.
    assert round(count_params(config) / 1e6) == printed - (name == "E88_b44n48")


@given(
    dim=st.integers(1, 4096),
    depth=st.integers(1, 64),
    heads=st.integers(1, 128),
    n_state=st.integers(1, 256),
    vocab=st.integers(1, 50_000),
    gate=st.booleans(),
)
def test_plain_form_is_the_formula_of_the_design(
    dim: int, depth: int, heads: int, n_state: int, vocab: int, gate: bool
) -> None:
    mixer = E88Config(n_heads=heads, n_state=n_state, gate=gate)
    config = ModelConfig(dim=dim, depth=depth, mixer=mixer, vocab_size=vocab)
    layer = (5 if gate else 4) * dim * heads * n_state + dim * heads + 2 * heads + dim
    assert count_params(config) == sum(params_by_group(config).values()) == depth * layer + vocab * dim + dim


def test_state_of_the_documents() -> None:
    assert state_per_layer(preset("E88_b56n32")) == 57_344
    assert state_per_layer(preset("mamba2-500m")) == 409_600
    assert state_per_layer(preset("gdn-500m-doc")) == 294_912
    planned = GatedDeltaNetConfig(n_heads=12, expand_v=2)
    assert state_per_layer(ModelConfig(dim=1536, depth=1, mixer=planned)) == 393_216
    assert state_per_layer(preset("transformer-500m"), window=100) == 2 * 1536 * 100


def test_expand_v_widens_values_alone() -> None:
    narrow = ModelConfig(dim=64, depth=3, mixer=E88Config(n_heads=4, n_state=16, gate=True))
    wide = replace(narrow, mixer=replace(narrow.mixer, expand_v=2.0))
    assert state_per_layer(wide) == 2 * state_per_layer(narrow)
    difference = {k: wide_k - params_by_group(narrow)[k] for k, wide_k in params_by_group(wide).items()}
    extra = 3 * 64 * 4 * 16
    assert {k: v for k, v in difference.items() if v} == {"projections": extra, "gate": extra, "output": extra}


def test_ratios_are_inverse_and_only_for_e88() -> None:
    config = preset("E88_b56n32")
    ratio, inverse = projection_ratio(config), dim_over_inner(config)
    assert ratio == 56 * 32 / 2176 and inverse == 2176 / (56 * 32)
    for name in ("mamba2-500m", "gdn-500m", "transformer-500m"):
        assert projection_ratio(preset(name)) is None and dim_over_inner(preset(name)) is None


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(dim=32, depth=2, mixer=E88Config(n_heads=3, n_state=8, gate=True, write_gate=True), mlp_hidden=40),
        ModelConfig(dim=48, depth=1, mixer=E88Config(n_heads=2, n_state=16, tie_kv=True, decay="sigmoid")),
        ModelConfig(dim=32, depth=1, mixer=E88Config(n_heads=2, n_state=8, expand_v=2, decay="constant")),
        ModelConfig(dim=32, depth=2, mixer=AttentionConfig(n_heads=2), mlp_hidden=48),
        ModelConfig(dim=32, depth=1, mixer=GatedDeltaNetConfig(n_heads=2, head_dim=8, expand_v=2, conv=0)),
    ],
)
def test_matrix_flops_against_torch_counter(config: ModelConfig) -> None:
    """PyTorch's operation counter over a forward pass sees the same matrix products (the rest is not `mm`)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from e88.models.lm import LanguageModel

    tokens = torch.zeros(1, 12, dtype=torch.int64)
    model = LanguageModel(config)
    model.set_backend("reference" if config.mixer.kind == "e88" else "torch")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    recurrence = 3 * config.depth * mixing_flops_per_token(config)
    assert flops_per_token(config) - recurrence == 3 * products / tokens.numel()


def test_recurrence_flops_follow_the_options() -> None:
    def mixing(**options: object) -> float:
        return mixing_flops_per_token(ModelConfig(dim=8, depth=1, mixer=E88Config(n_heads=2, n_state=4, **options)))

    assert mixing() == 8 * 2 * 4 * 4
    assert mixing(linear_state=True) == mixing(decay="none") == 7 * 32
    assert mixing(linear_state=True, decay="none") == 6 * 32


@given(window=st.integers(1, 200))
def test_attention_flops_count_visible_keys(window: int) -> None:
    config = ModelConfig(dim=64, depth=1, mixer=AttentionConfig(n_heads=2))
    pairs = sum(query + 1 for query in range(window))
    assert mixing_flops_per_token(config, window) * window == pytest.approx(4 * 64 * pairs)


@pytest.mark.parametrize("mixer", [E88Config(n_heads=2), GatedDeltaNetConfig(n_heads=1), Mamba2Config()])
def test_window_matters_to_attention_alone(mixer: E88Config | GatedDeltaNetConfig | Mamba2Config) -> None:
    config = ModelConfig(dim=64, depth=2, mixer=mixer)
    assert flops_per_token(config, 128) == flops_per_token(config, 1024)
    assert state_per_layer(config, 128) == state_per_layer(config, 1024)


@pytest.mark.parametrize("name", ["E88_b56n32", "mamba2-500m", "gdn-500m", "transformer-500m"])
def test_describe(name: str) -> None:
    size = describe(preset(name), window=256)
    assert list(size) == [
        "params", "params_by_group", "state_per_layer", "state_total", "state_bytes", "projection_ratio",
        "dim_over_inner", "flops_per_token", "verdicts", "warnings",
    ]  # fmt: skip
    assert json.loads(json.dumps(size)) == size
    assert size["params"] == sum(size["params_by_group"].values())
    assert size["state_bytes"] == 4 * size["state_total"] == 4 * preset(name).depth * size["state_per_layer"]
    assert bool(size["verdicts"]) == name.startswith("E88")
