"""Whatever the solver returns is within its tolerance, counted exactly, balanced, and honours what was fixed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from e88.errors import UserError
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, MixerConfig, ModelConfig
from e88.sizing.advice import hardware, verdicts
from e88.sizing.closed_form import params_by_group
from e88.sizing.solve import matched, mixer_kind, solve
from e88.sizing.units import human_bytes, human_count, parse_count

# Log-uniform from 1M to 20B parameters.
TARGETS = st.floats(6, 10.3).map(lambda exponent: round(10**exponent))


def total(config: ModelConfig) -> int:
    return sum(params_by_group(config).values())


@settings(max_examples=40)
@given(
    target=TARGETS,
    gate=st.booleans(),
    conv=st.sampled_from((0, 4)),
    expand_v=st.sampled_from((1.0, 2.0)),
    vocab=st.sampled_from((256, 32_000)),
    on=st.sampled_from((None, "a100", "h200")),
)
def test_everything_found_is_within_one_percent_and_balanced(
    target: int, gate: bool, conv: int, expand_v: float, vocab: int, on: str | None
) -> None:
    template = E88Config(n_heads=1, gate=gate, conv=conv, expand_v=expand_v)
    try:
        found = solve(target, template=template, vocab_size=vocab, on=hardware(on))
    except UserError:
        # A small target can be smaller than every balanced shape with this vocabulary.
        assert target < 20_000_000
        return
    assert 1 <= len(found) <= 5
    assert [c.score for c in found] == sorted(c.score for c in found)
    for candidate in found:
        config = candidate.config
        assert candidate.params == total(config)
        assert abs(candidate.params - target) <= 0.01 * target
        assert all(v["verdict"] == "balanced" for v in verdicts(config))
        mixer = config.mixer
        assert isinstance(mixer, E88Config)
        assert (mixer.gate, mixer.conv, mixer.expand_v, config.vocab_size) == (gate, conv, expand_v, vocab)


@pytest.mark.parametrize(
    "fixed",
    [{"depth": 32}, {"n_state": 48}, {"dim": 2048}, {"depth": 24, "n_state": 64}, {"n_heads": 64}, {"n_state": 40}],
)
def test_fixed_values_are_kept(fixed: dict[str, int]) -> None:
    for candidate in solve(500_000_000, **fixed):  # type: ignore[arg-type]
        config, mixer = candidate.config, candidate.config.mixer
        assert isinstance(mixer, E88Config)
        values = {"dim": config.dim, "depth": config.depth, "n_heads": mixer.n_heads, "n_state": mixer.n_state}
        assert {key: values[key] for key in fixed} == fixed


@pytest.mark.parametrize("on", [None, "rtx4090", "a100", "h100"])
def test_hardware_decides_n_state(on: str | None) -> None:
    mixer = solve(500_000_000, on=hardware(on))[0].config.mixer
    assert isinstance(mixer, E88Config)
    assert hardware(on).low <= mixer.n_state <= hardware(on).high


def test_impossible_wishes_are_one_line_and_name_the_nearest_shape() -> None:
    with pytest.raises(UserError, match="nearest is .* at dim 4096, depth 1, ") as error:
        solve(10_000_000, dim=4096)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="fix fewer values"):
        solve(500_000_000, dim=2048, n_heads=1, n_state=32)
    with pytest.raises(UserError, match="nothing to search"):
        solve(500_000_000, dim=2048, depth=32, n_heads=64, n_state=32)
    with pytest.raises(UserError, match="no balanced E88 shape"):
        solve(1000)


@settings(max_examples=40)
@given(
    target=st.floats(7, 10.3).map(lambda exponent: round(10**exponent)),
    kind=st.sampled_from(("mamba2", "gdn", "transformer", "e88")),
)
@example(target=11_139_739, kind="gdn")
def test_rivals_match(target: int, kind: str) -> None:
    config = matched(kind, target)
    assert config.mixer.kind == mixer_kind(kind)
    assert abs(total(config) - target) <= 0.01 * target
    # No absurd shapes: within a factor of four of the usual width for its depth.
    assert 47 / 4 <= config.dim / config.depth <= 4 * 85.4


def test_rivals_take_depth_and_vocabulary() -> None:
    config = matched("mamba2", 500_000_000, depth=32, vocab_size=50_000)
    assert (config.depth, config.vocab_size) == (32, 50_000) and isinstance(config.mixer, Mamba2Config)
    with pytest.raises(UserError, match="at depth 1000"):
        matched("mamba2", 500_000_000, depth=1000)
    with pytest.raises(UserError, match="did you mean gdn"):
        matched("gdm", 500_000_000)


@settings(max_examples=20)
@given(target=st.floats(7, 9.5).map(lambda exponent: round(10**exponent)))
@example(target=1_000_000)
@pytest.mark.parametrize(
    "options",
    [
        E88Config(n_heads=3, n_state=48, gate=True, conv=4),
        GatedDeltaNetConfig(n_heads=3, expand_v=1.0, gate=False),
        Mamba2Config(expand=4, conv=3),
        Mamba2Config(d_state=16),
        Mamba2Config(n_groups=4),
        AttentionConfig(n_heads=3, qk_norm=True),
    ],
)
def test_a_matched_shape_keeps_what_is_no_dimension(options: MixerConfig, target: int) -> None:
    config = matched(options.kind, target, 0.03, options=options)
    assert abs(total(config) - target) <= 0.03 * target
    same = {key: getattr(options, key) for key in ("n_heads", "head_dim") if hasattr(options, key)}
    assert replace(config.mixer, **same) == options


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100M", 100_000_000),
        ("1.5B", 1_500_000_000),
        ("530k", 530_000),
        (" 2 g", 2_000_000_000),
        ("1234567", 1_234_567),
        ("503,654,016", 503_654_016),
        ("503_654_016", 503_654_016),
    ],
)
def test_parse_count(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "-5M", "1.2.3M", "10T", "1e9", "0", "five"])
def test_parse_count_refuses(text: str) -> None:
    with pytest.raises(UserError, match="100M"):
        parse_count(text)


@given(st.integers(1, 10**12))
def test_human_count_keeps_the_size(value: int) -> None:
    text = human_count(value)
    assert parse_count(text) == pytest.approx(value, rel=0.05 if value >= 1000 else 0)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
def test_what_rounds_to_a_thousand_is_one_of_the_next_unit(size: float) -> None:
    for value in (size * (1 - 1e-5), size):
        assert human_count(value).startswith("1.0") and human_bytes(value).split()[0] in ("1", "1.0")
    assert human_count(996e6) == "996.0M" and human_bytes(996e6) == "996 MB"
