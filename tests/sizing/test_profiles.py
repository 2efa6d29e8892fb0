"""Hardware profiles: stored and read whole, and the n_state that follows from measured times."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e88.errors import UserError
from e88.models.config import E88Config, ModelConfig
from e88.sizing import profiles
from e88.sizing.advice import Hardware, warnings

STATES = (8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128)
D_INNER = 1792


def make(times: dict[int, float], *, date: str = "2026-11-22T10:00:00Z", device: str = "NVIDIA H200") -> dict[str, Any]:
    """A profile whose layers take these nanoseconds per token, as many whole heads as fit in d_inner."""
    rows = [
        {
            "n_state": n, "heads": D_INNER // n, "d_inner": D_INNER // n * n, "backend": "cuda", "error": 1e-3,
            "skipped": None, "forward_ns": time / 3, "forward_backward_ns": time,
            "ns_per_element": time / (D_INNER // n * n * n),
        }
        for n, time in times.items()
    ]  # fmt: skip
    return {
        "schema": 1, "date": date, "device": device, "dtype": "bfloat16", "batch_size": 32, "window": 512,
        "d_inner": D_INNER, "seconds": 0.5, "environment": {"commit": "abc"}, "rows": rows,
    }  # fmt: skip


def recommended(profile: dict[str, Any], folder: Path) -> Hardware:
    return profiles.recommend(profiles.store(profile, folder / "profile.json"))


def whole(n: int) -> float:
    """d_inner that whole heads fill, of the one asked for."""
    return D_INNER // n * n / D_INNER


def test_state_is_taken_as_long_as_it_is_nearly_free(tmp_path: Path) -> None:
    # Up to 48 a layer takes as long whatever its state, beyond that in proportion.
    found = recommended(make({n: whole(n) * 80 * max(n / 48, 1) for n in STATES}), tmp_path)
    assert (found.low, found.high) == (40, 48)
    assert (found.label, found.kind) == ("measured on NVIDIA H200, 2026-11-22", "measured")
    assert "best 48, 80 ns" in found.reason and "bfloat16, 32 x 512 tokens" in found.source


@given(st.lists(st.floats(1, 1e6), min_size=len(STATES), max_size=len(STATES)), st.floats(0.1, 100))
def test_the_best_is_recommended_whatever_the_unit(tmp_path_factory: Any, times: list[float], unit: float) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    by_state = dict(zip(STATES, times, strict=True))
    found = recommended(make({n: whole(n) * time for n, time in by_state.items()}), folder)
    price = {n: time / math.sqrt(n) for n, time in by_state.items()}
    inside = [n for n in STATES if found.low <= n <= found.high]
    assert min(price[n] for n in inside) == min(price.values())
    assert all(price[n] <= 1.1001 * min(price.values()) for n in inside)
    again = recommended(make({n: unit * whole(n) * time for n, time in by_state.items()}), folder)
    # A neighbour just at the edge may fall either way.
    assert again.low <= inside[-1] and again.high >= inside[0]


def test_heads_that_do_not_fill_d_inner_gain_nothing(tmp_path: Path) -> None:
    profile = make({96: 100.0, 128: 100.0})
    first, second = dict(recommended(profile, tmp_path).times).values()
    assert first / second == pytest.approx(1792 / 1728)
    found = recommended(profile, tmp_path)
    assert found.nanoseconds(18, 96) == pytest.approx(100) == found.nanoseconds(14, 128)
    assert found.nanoseconds(28, 128) == pytest.approx(200) and found.nanoseconds(56, 32) is None


def test_what_could_not_be_timed_is_left_out(tmp_path: Path) -> None:
    profile = make({32: 50.0, 64: 1.0})
    profile["rows"][1] = {key: profile["rows"][1][key] for key in ("n_state", "heads", "d_inner")} | {
        "skipped": "wrong"
    }
    found = recommended(profile, tmp_path)
    assert found.low == found.high == 32
    profile["rows"] = profile["rows"][1:]
    with pytest.raises(UserError, match="no n_state that could be timed; measure again"):
        recommended(profile, tmp_path)


def test_auto_is_the_profile_measured_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E88_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no hardware profile in .*; run e88 profile"):
        profiles.choose("auto")
    old, new = make({64: 1.0}, date="2026-11-20T23:00:00Z"), make({16: 1.0}, device="AMD EPYC, 2 threads")
    # Stored in the other order: the date of measurement decides.
    for profile in (new, old):
        profiles.store(profile, profiles.default_path(profile))
    assert sorted(path.name for path in profiles.folder().iterdir()) == [
        "amd-epyc-2-threads-bfloat16.json", "nvidia-h200-bfloat16.json",
    ]  # fmt: skip
    assert profiles.choose("auto").label == "measured on AMD EPYC, 2 threads, 2026-11-22"
    assert profiles.choose(str(profiles.default_path(old))).low == 64
    assert profiles.read(profiles.default_path(old)) == old
    assert profiles.choose("h200").kind == "datacenter" and profiles.choose(None).name == "default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "is not a hardware profile"),
        ('{"schema": 2}', "schema 2, not 1"),
        (json.dumps(make({32: 1.0}) | {"rows": [{"n_state": 32}]}), "is not a hardware profile"),
        (json.dumps({key: value for key, value in make({32: 1.0}).items() if key != "date"}), "'date'"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_none_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        profiles.choose(str(path))
    assert "measure again with e88 profile" in str(error.value) and "\n" not in str(error.value)


def test_verdicts_come_from_the_measured_times(tmp_path: Path) -> None:
    on = recommended(make({16: 72.0, 32: 80.0, 64: 200.0}), tmp_path)
    assert (on.low, on.high) == (32, 32)

    def told(n_state: int) -> str:
        config = ModelConfig(dim=1792, depth=2, mixer=E88Config(n_heads=1792 // n_state, n_state=n_state))
        return " ".join(text for text in warnings(config, on) if "this hardware" in text)

    assert "slow n_state" in told(64) and "64 takes 2.50 times the time of 32 for 2.00 times its state" in told(64)
    assert "small n_state" in told(16) and "0.90 times the time of 32 for 0.50 times" in told(16)
    # Not measured: nothing is said.
    assert told(32) == "" == told(128)
