"""`e88 size` and `e88 presets` as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from e88.cli import main
from e88.sizing.presets import PRESETS

DESCRIBE_KEYS = {
    "params", "params_by_group", "state_per_layer", "state_total", "state_bytes", "projection_ratio",
    "dim_over_inner", "flops_per_token", "verdicts", "warnings",
}  # fmt: skip


class Command:
    """Runs the `e88` command in this process: (exit code, standard output, standard error)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["e88", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = self.capsys.readouterr()
        return code, output.out, output.err

    def json(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self(*arguments, "--json")
        assert (code, err) == (0, "") and out.count("\n") == 1
        result: dict[str, Any] = json.loads(out)
        return result


@pytest.fixture
def e88(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_a_shape_as_json(e88: Command) -> None:
    size = e88.json("size", "--dim", "2176", "--depth", "32", "--n-heads", "56", "--n-state", "32")
    assert DESCRIBE_KEYS <= set(size)
    assert size["params"] == 503_654_016 and size["state_per_layer"] == 57_344
    assert size["memory"]["total"] > 16 * size["params"]
    assert {"name", "config", "window", "batch", "notes"} <= set(size)


def test_a_preset_equals_its_shape(e88: Command) -> None:
    by_name = e88.json("size", "e88_B56N32")
    by_shape = e88.json("size", "--dim", "2176", "--depth", "32", "--n-heads", "56")
    assert by_name.pop("name") == "E88_b56n32" and by_shape.pop("name") is None
    assert by_name == by_shape


def test_a_hybrid_names_both_mixers(e88: Command) -> None:
    first = e88("size", "e88-500m-memory")[1].splitlines()[0]
    assert "72 heads of 32, one block in 6 with 18 heads of 128" in first
    size = e88.json("size", "e88-500m-memory")
    assert size["state_total"] == 16 * 72 * 32 * 32 + 3 * 18 * 128 * 128
    # What both have alike changes in both.
    ungated = e88.json("size", "e88-500m-memory", "--no-gate", "--n-heads", "64")["config"]
    assert (ungated["mixer"]["gate"], ungated["hybrid"]["gate"]) == (False, False)
    assert (ungated["mixer"]["n_heads"], ungated["hybrid"]["n_heads"]) == (64, 18)


def test_options_reach_the_layer(e88: Command) -> None:
    options = ("--gate", "--conv", "4", "--head-norm", "--write-gate", "--linear-state", "--decay", "sigmoid")
    options += ("--mlp-hidden", "64", "--vocab-size", "512", "--expand-v", "2")
    size = e88.json("size", "--dim", "64", "--depth", "2", "--n-heads", "4", "--n-state", "16", *options)
    mixer = size["config"]["mixer"]
    assert mixer == {
        "kind": "e88", "n_heads": 4, "n_state": 16, "expand_v": 2.0, "decay": "sigmoid", "gate": True, "conv": 4,
        "head_norm": True, "write_gate": True, "tie_kv": False, "linear_state": True,
    }  # fmt: skip
    assert (size["config"]["vocab_size"], size["config"]["mlp_hidden"]) == (512, 64)
    tied = e88.json("size", "tiny-e88", "--no-gate", "--tie-kv", "--conv", "0")["config"]["mixer"]
    assert (tied["gate"], tied["tie_kv"], tied["conv"]) == (False, True, 0)


def test_human_output_names_form_and_guides(e88: Command) -> None:
    code, out, err = e88("size", "E88_b56n32", "--hardware", "h200")
    assert (code, err) == (0, "")
    for text in ("ungated", "503,654,016", "57,344", "balanced guide", "sizing guide", "mild bottleneck"):
        assert text in out
    assert "logging error" in out
    assert "64-96" in out and "H200" in out
    code, out, _ = e88("size", "E88_b56n32", "--gate")
    assert "E88 gated" in out and "ungated" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("size", "--tables"),
        ("size", "--params", "500M", "--against", "mamba2,gdn,transformer"),
        ("size", "transformer-500m"),
        ("presets",),
    ],
)
def test_output_without_a_terminal_is_never_cut(e88: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = e88(*arguments)
    assert (code, err) == (0, "") and "…" not in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_search(e88: Command) -> None:
    found = e88.json("size", "--params", "500M", "--gate", "--hardware", "h200", "--against", "mamba2, gdn,transformer")
    assert found["target"] == 500_000_000 and len(found["candidates"]) == 5
    for candidate in found["candidates"]:
        assert DESCRIBE_KEYS <= set(candidate)
        assert abs(candidate["params"] / 500e6 - 1) <= 0.01
        assert candidate["config"]["mixer"]["gate"] is True
        assert candidate["score"] == pytest.approx(sum(candidate["penalties"].values()))
    assert 64 <= found["candidates"][0]["config"]["mixer"]["n_state"] <= 96
    assert [rival["config"]["mixer"]["kind"] for rival in found["against"]] == ["mamba2", "gated_deltanet", "attention"]
    assert all(abs(rival["params"] / 500e6 - 1) <= 0.01 for rival in found["against"])
    deep = e88.json("size", "--params", "100M", "--depth", "20", "--n-state", "32", "--top", "2")
    assert {c["config"]["depth"] for c in deep["candidates"]} == {20} and len(deep["candidates"]) <= 2


def test_rivals_of_a_preset_match_its_count(e88: Command) -> None:
    size = e88.json("size", "e88-500m", "--against", "gdn")
    assert abs(size["against"][0]["params"] / size["params"] - 1) <= 0.01


def test_tables(e88: Command) -> None:
    assert [t["name"] for t in e88.json("size", "--tables")["tables"]] == [
        "balanced", "sizing", "benchmark", "plan", "state",
    ]  # fmt: skip
    _, out, _ = e88("size", "--table", "balanced")
    assert "541.7M" in out and "~530M" in out and "27.000" in out
    _, out, _ = e88("size", "--table", "state")
    assert "logging error" in out


def test_presets(e88: Command) -> None:
    rows = e88.json("presets")["presets"]
    assert [row["name"] for row in rows] == list(PRESETS)
    assert set(rows[0]) == {"name", "params", "state_per_layer", "config", "description", "source"}
    _, out, _ = e88("presets")
    assert all(name in out for name in PRESETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("size",), "needs --dim, --depth, --n-heads"),
        (("size", "--dim", "2048"), "needs --depth, --n-heads"),
        (("size", "E88_b56n31"), "did you mean E88_b56n32"),
        (("size", "--dim", "64", "--depth", "2", "--n-heads", "0"), "n_heads"),
        (("size", "--dim", "64", "--depth", "2", "--n-heads", "2", "--n-state", "512"), "above 256"),
        (("size", "e88-500m", "--decay", "fast"), "decay 'fast'"),
        (("size", "e88-500m", "--tie-kv", "--expand-v", "2"), "tie_kv"),
        (("size", "mamba2-500m", "--gate"), "has no gate"),
        (("size", "mamba2-500m", "--dim", "1601"), "multiple of head_dim"),
        (("size", "e88-500m", "--params", "500M"), "not both"),
        (("size", "e88-500m", "--hardware", "h20"), "did you mean h200"),
        (("size", "--params", "lots"), "write it like 100M"),
        (("size", "--params", "10M", "--dim", "4096"), "nearest is"),
        (("size", "--params", "500M", "--against", "mamba3"), "did you mean mamba2"),
        (("size", "--table", "bench"), "did you mean benchmark"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(e88: Command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = e88(*arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1 and err.startswith("e88: error: ")


@pytest.mark.parametrize(
    "arguments", [["size", "--tables"], ["size", "--params", "500M", "--against", "gdn"], ["presets"]]
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom e88.cli import main\n"
        f"sys.argv = ['e88', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'numba', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
