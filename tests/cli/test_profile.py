"""`e88 profile`, and `e88 size` on what it stored."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

SMALL = ("profile", "--device", "cpu", "--n-state", "8", "--n-state", "16", "--d-inner", "40", "--batch-size", "1",
         "--window", "9", "--seconds", "0")  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("E88_CACHE", str(tmp_path / "cache"))


def test_measures_stores_and_sizes_by_it(e88, tmp_path):
    code, out, err = e88(*SMALL)
    assert code == 0
    (path,) = (tmp_path / "cache" / "profiles").glob("*.json")
    profile = json.loads(path.read_text())
    assert profile["dtype"] == "float32" and profile["environment"]["versions"]["torch"]
    assert [(row["n_state"], row["heads"], row["d_inner"]) for row in profile["rows"]] == [(8, 5, 40), (16, 2, 32)]
    for row in profile["rows"]:
        assert row["skipped"] is None and row["backend"] == "numba" and 0 < row["error"] <= 1e-5
        assert row["forward_backward_ns"] > 0 and row["forward_ns"] > 0
        elements = row["heads"] * row["n_state"] ** 2
        assert row["ns_per_element"] == pytest.approx(row["forward_backward_ns"] / elements)
        assert f"{row['forward_backward_ns']:.2f}" in out
    assert ET.parse(path.with_suffix(".svg")).getroot().tag.endswith("svg")

    code, out, err = e88("size", "--params", "10M", "--hardware", "auto", "--json")
    result = json.loads(out)
    assert code == 0 and result["hardware"]["kind"] == "measured"
    best = result["candidates"][0]
    mixer = best["config"]["mixer"]
    row = {row["n_state"]: row for row in profile["rows"]}[mixer["n_state"]]
    share = mixer["n_heads"] * mixer["n_state"] / row["d_inner"]
    assert best["recurrence_ns"] == pytest.approx(row["forward_backward_ns"] * share * best["config"]["depth"])
    code, out, err = e88("size", "tiny-e88", "--n-state", "64", "--hardware", path)
    assert code == 0 and f"measured on {profile['device']}, {profile['date'][:10]}" in out and str(path) in out


def test_a_hybrids_time_is_that_of_both_mixers(e88):
    path = Path(__file__).resolve().parent.parent.parent / "results" / "h200" / "profile.json"
    rows = json.loads(path.read_text())["rows"]
    per_column = {row["n_state"]: row["forward_backward_ns"] / row["d_inner"] for row in rows}
    ask = ("size", "e88-500m-memory", "--hardware", path, "--json")
    expected = 2304 * (16 * per_column[32] + 3 * per_column[128])
    assert json.loads(e88(*ask)[1])["recurrence_ns"] == pytest.approx(expected)
    assert json.loads(e88(*ask, "--n-state", "30")[1])["recurrence_ns"] is None


def test_json_and_output(e88, tmp_path):
    path = tmp_path / "new" / "mine.json"
    code, out, err = e88(*SMALL, "--output", path, "--json")
    result = json.loads(out)
    assert code == 0 and result["path"] == str(path) and path.with_suffix(".svg").exists()
    assert not (tmp_path / "cache" / "profiles").exists()
    stored = json.loads(path.read_text())
    assert {key: result[key] for key in stored} == stored


def test_a_wrong_kernel_gets_no_speed(e88, tmp_path, monkeypatch):
    import e88.ops.cpu as cpu

    right = cpu.run

    def wrong_at_16(*arguments):
        y, state = right(*arguments)
        return (y * 1.001 if arguments[1].shape[-1] == 16 else y), state

    monkeypatch.setattr(cpu, "run", wrong_at_16)
    code, out, err = e88(*SMALL)
    assert code == 1 and "wrong: error 1.0e-03 above 1e-05" in out
    (path,) = (tmp_path / "cache" / "profiles").glob("*.json")
    good, bad = json.loads(path.read_text())["rows"]
    assert "forward_ns" in good and bad["skipped"] and not {"forward_ns", "forward_backward_ns"} & set(bad)

    monkeypatch.setattr(cpu, "run", lambda *a: (right(*a)[0] * float("nan"), right(*a)[1]))
    before = path.read_bytes()
    code, out, err = e88(*SMALL)
    assert code == 2 and err.startswith("e88: error: no n_state could be timed (wrong: error nan")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n-state", "0"), "n_state must be 1 to 256"),
        (("--d-inner", "100", "--n-state", "128"), "holds no head of 128"),
        (("--dtype", "float23"), "did you mean float32"),
        (("--output", "profile.svg"), "must end in .json"),
        (("--window", "0"), "at least 1"),
        (("--device", "cuda:"), "unknown device"),
    ],
)
def test_mistakes_are_one_line(e88, arguments, message):
    code, out, err = e88("profile", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_size_by_a_profile_loads_nothing_heavy(e88):
    assert e88(*SMALL)[0] == 0
    script = (
        "import sys\nfrom e88.cli import main\nsys.argv = ['e88', 'size', '--params', '10M', '--hardware', 'auto']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'numba', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
