"""Both guides' bands, the anti-patterns' warnings, and the recommendations by hardware."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e88.errors import UserError
from e88.models.config import E88Config, ModelConfig
from e88.sizing.advice import (
    balanced_guide_verdict,
    hardware,
    hardware_names,
    notes,
    sizing_guide_verdict,
    verdicts,
    warnings,
)
from e88.sizing.presets import preset


def model(dim: int, heads: int, n_state: int) -> ModelConfig:
    return ModelConfig(dim=dim, depth=2, mixer=E88Config(n_heads=heads, n_state=n_state))


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        (0.5, "balanced"),
        (1.0, "balanced"),
        (1.99, "balanced"),
        (2.0, "marginal"),
        (4.0, "marginal"),
        (4.01, "bottleneck"),
        (27.0, "bottleneck"),
    ],
)
def test_balanced_guide(ratio: float, word: str) -> None:
    assert balanced_guide_verdict(ratio) == word


def test_balanced_guide_admits_that_it_has_no_band() -> None:
    assert "below the guide's bands" in balanced_guide_verdict(0.1)
    assert "underutilized state" in balanced_guide_verdict(0.49)


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        (2.01, "severe bottleneck"),
        (2.0, "mild bottleneck"),
        (1.21, "mild bottleneck"),
        (1.2, "balanced"),
        (0.8, "balanced"),
        (0.79, "over-provisioned d_inner"),
        (0.5, "over-provisioned d_inner"),
        (0.49, "wasteful d_inner"),
    ],
)
def test_sizing_guide(ratio: float, word: str) -> None:
    assert sizing_guide_verdict(ratio) == word


def test_verdicts_name_their_guide() -> None:
    first, second = verdicts(preset("E88_b56n32"))
    assert (first["guide"], first["quantity"], first["verdict"]) == ("balanced guide", "H*n/dim", "balanced")
    assert (second["guide"], second["quantity"], second["verdict"]) == ("sizing guide", "dim/(H*n)", "mild bottleneck")
    assert verdicts(preset("gdn-500m")) == []


def starts(config: ModelConfig, on: str | None = None) -> set[str]:
    return {text.split(":")[0] for text in warnings(config, hardware(on) if on else None)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("E88_h81n128", {"extreme expansion", "mismatch", "long runs untested"}),
        ("E88_h100n64", {"heavy expansion", "mismatch", "long runs untested"}),
        (
            "E88_h5n128",
            {"underutilized state", "few heads for a large dim", "mismatch", "long runs untested"},
        ),
        ("guide-h20n32", {"underutilized state", "few heads for a large dim", "mismatch"}),
        ("E88_b56n32", {"mismatch", "the guides disagree"}),
        ("guide-marginal", {"mismatch"}),
        ("e88-500m", set()),
        ("mamba2-500m", set()),
    ],
)
def test_warnings_of_the_anti_patterns(name: str, expected: set[str]) -> None:
    assert starts(preset(name)) == expected


def test_large_state_on_a_consumer_gpu() -> None:
    config = model(2304, 24, 96)
    assert "large n_state on a consumer GPU" in starts(config, "rtx4090")
    assert "large n_state on a consumer GPU" not in starts(config, "h100") | starts(config)
    assert starts(preset("e88-500m"), "rtx4090") == set()


@given(heads=st.integers(1, 128), n_state=st.integers(1, 256), dim=st.integers(1, 8192))
def test_no_warning_about_shape_exactly_where_both_guides_are_content(heads: int, n_state: int, dim: int) -> None:
    config = model(dim, heads, n_state)
    content = all(v["verdict"] == "balanced" for v in verdicts(config))
    assert content == (starts(config) <= {"long runs untested"})


def test_a_wrong_document_is_contradicted() -> None:
    assert any("logging error" in text for text in notes(preset("state-h36n48")))
    assert not any("diverge" in text for text in warnings(preset("state-h36n48")))
    assert notes(preset("state-h12n32")) == notes(preset("mamba2-500m")) == []


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("rtx4090", 32, 32), ("NVIDIA GeForce RTX 4090", 32, 32), ("a100", 48, 64), ("H100", 64, 96), ("h200", 64, 96)],
)
def test_hardware(name: str, low: int, high: int) -> None:
    assert (hardware(name).low, hardware(name).high) == (low, high)


def test_unknown_hardware_is_one_line_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean .*h100") as error:
        hardware("h1000")
    assert "\n" not in str(error.value)
    assert "default" not in hardware_names()
    with pytest.raises(UserError):
        hardware("default")
