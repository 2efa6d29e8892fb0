"""The closed form equals the real model, group by group, for every kind and option."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e88.models.config import (
    DECAY_MODES,
    AttentionConfig,
    E88Config,
    GatedDeltaNetConfig,
    Mamba2Config,
    MixerConfig,
    ModelConfig,
)
from e88.sizing.closed_form import params_by_group
from e88.sizing.exact import exact_params_by_group, group_of
from e88.sizing.presets import preset

CONV = st.sampled_from((0, 2, 4, 8))


@st.composite
def e88_mixers(draw: st.DrawFn) -> E88Config:
    tie_kv = draw(st.booleans())
    return E88Config(
        n_heads=draw(st.integers(1, 6)),
        n_state=draw(st.sampled_from((4, 8, 24))),
        expand_v=1.0 if tie_kv else draw(st.sampled_from((0.5, 1.0, 2.0))),
        decay=draw(st.sampled_from(DECAY_MODES)),
        gate=draw(st.booleans()),
        conv=draw(CONV),
        head_norm=draw(st.booleans()),
        write_gate=draw(st.booleans()),
        tie_kv=tie_kv,
        linear_state=draw(st.booleans()),
    )


def models(mixers: st.SearchStrategy[MixerConfig], dims: st.SearchStrategy[int]) -> st.SearchStrategy[ModelConfig]:
    return st.builds(
        ModelConfig,
        dim=dims,
        depth=st.integers(1, 3),
        mixer=mixers,
        vocab_size=st.sampled_from((7, 256)),
        mlp_hidden=st.sampled_from((0, 24)),
    )


GATED_DELTANET = st.builds(
    GatedDeltaNetConfig,
    n_heads=st.integers(1, 4),
    head_dim=st.sampled_from((8, 16)),
    expand_v=st.sampled_from((1.0, 2.0)),
    conv=CONV,
    gate=st.booleans(),
)
MAMBA2 = st.builds(
    Mamba2Config,
    d_state=st.sampled_from((8, 32)),
    head_dim=st.sampled_from((4, 8)),
    expand=st.integers(1, 3),
    n_groups=st.sampled_from((1, 2)),
    conv=st.sampled_from((2, 4)),
)
ATTENTION = st.builds(AttentionConfig, n_heads=st.sampled_from((1, 2, 4)))


@settings(max_examples=60)
@given(models(e88_mixers(), st.integers(1, 40)))
def test_e88(config: ModelConfig) -> None:
    assert params_by_group(config) == exact_params_by_group(config)


@settings(max_examples=30)
@given(models(st.one_of(GATED_DELTANET, MAMBA2, ATTENTION), st.sampled_from((16, 32, 48))))
def test_rivals(config: ModelConfig) -> None:
    assert params_by_group(config) == exact_params_by_group(config)


@pytest.mark.parametrize(
    "name", ["tiny-e88", "tiny-gdn", "tiny-mamba2", "tiny-transformer", "E88_b56n32", "gdn-500m-doc", "mamba2-500m"]
)
def test_presets(name: str) -> None:
    assert params_by_group(preset(name)) == exact_params_by_group(preset(name))


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(KeyError):
        group_of("blocks.0.mixer.surprise.weight")
