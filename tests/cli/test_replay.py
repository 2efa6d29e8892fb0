import json


def test_a_diverged_run_is_repeated_and_explained(e88, spec, text, tmp_path):
    path = spec("wild", lr=10.0, steps=400, extra="clip = 0\nwarmup = 0\nweight_decay = 10.0")
    code, out, _ = e88("train", path, "--data", text, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 3 and f"e88 replay {tmp_path / 'run'}" in out
    code, out, err = e88("replay", tmp_path / "run", "--device", "cpu")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert code == 0 and err == "" and "repeated exactly" in out
    assert f"step {record['results']['diverged_step']}" in out and "blocks.1" in out
    code, out, _ = e88("replay", tmp_path / "run", "--device", "cpu", "--json")
    found = json.loads(out, parse_constant=lambda name: 1 / 0)
    assert code == 0 and found["now"]["repeats"] and found["first"]["name"] in record["reason"]
    assert [row["layer"] for row in found["layers"]] == ["embedding", "blocks.0", "blocks.1", "norm"]


def test_a_run_that_did_not_diverge_has_nothing_to_replay(e88, spec, text, tmp_path):
    e88("train", spec(steps=1), "--data", text, "--out", tmp_path / "run", "--device", "cpu")
    code, out, err = e88("replay", tmp_path / "run")
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1 and "that diverged" in err
