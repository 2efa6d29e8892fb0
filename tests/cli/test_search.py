import json

import pytest

pytest.importorskip("optuna")


def test_a_search_ends_with_a_file_to_train(e88, spec, text, tmp_path):
    options = [
        "--data",
        text,
        "--params",
        "12k",
        "--tolerance",
        0.05,
        "--depth",
        "1:2",
        "--n-state",
        "8,16",
        "--steps",
        3,
    ]
    command = ["search", spec(), *options, "--device", "cpu", "--trials", 2, "--out", tmp_path / "out"]
    code, out, err = e88(*command)
    assert code == 0 and "[model.mixer]" in out and "Traceback" not in err
    assert out.count("done") == 2 and "e88 train" in err
    code, out, _ = e88(*command, "--json")
    result = json.loads(out)
    assert code == 0 and len(result["trials"]) == 2
    best = tmp_path / "out" / "best.toml"
    code, out, _ = e88("train", best, "--out", tmp_path / "run", "--device", "cpu", "--json")
    record = json.loads(out)
    assert code == 0 and record["id"] == result["trials"][0]["run"]
    assert record["results"]["heldout_bpb"] == pytest.approx(result["trials"][0]["bpb"])
    assert record["config"]["model"] == result["best"]["model"]


def test_wrong_ranges_are_one_line(e88, spec, text, tmp_path):
    for arguments, message in (
        (["--depth", "4-8"], "LOW:HIGH"),
        (["--depth", "8:4"], "must go up"),
        (["--lr", "0:1"], "within"),
        (["--n-state", "16;32"], "not a list of numbers"),
        (["--n-state", "512"], "within 1 and 256"),
        (["--sampler", "grid"], "unknown sampler"),
        (["--params", "many"], "many"),
    ):
        code, out, err = e88("search", spec(), "--data", text, "--out", tmp_path / "out", *arguments)
        assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1
    code, _, err = e88("search", "tiny-gdn", "--out", tmp_path / "out")
    assert code == 2 and "is for E88 models" in err
