import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file


def one_line(err):
    lines = [line for line in err.strip().splitlines() if line]
    return len(lines) == 1 and lines[0].startswith("e88: error: ")


def test_train_then_generate(e88, spec, text, tmp_path):
    code, out, _ = e88("train", spec(), "--data", text, "--out", tmp_path / "run", "--device", "cpu", "--json")
    record = json.loads(out)
    assert code == 0 and record["status"] == "done" and record["results"]["steps"] == 4 and record["name"] == "small"
    code, out, _ = e88("generate", tmp_path / "run", "--prompt", "line", "--max-bytes", 20, "--json", "--device", "cpu")
    answer = json.loads(out)
    assert code == 0 and answer["bytes"] == 20 and answer["prompt"] == "line"
    code, again, _ = e88(
        "generate", tmp_path / "run", "--prompt", "line", "--max-bytes", 20, "--json", "--device", "cpu"
    )
    assert json.loads(again) == answer


def test_generation_goes_on_from_a_saved_state(e88, spec, text, tmp_path):
    e88("train", spec(), "--data", text, "--out", tmp_path / "run", "--device", "cpu")
    options = ["--temperature", 0, "--device", "cpu", "--json"]
    _, whole, _ = e88("generate", tmp_path / "run", "--prompt", "line 1", "--max-bytes", 24, *options)
    _, first, _ = e88(
        "generate", tmp_path / "run", "--prompt", "line 1", "--max-bytes", 10, "--save-state", tmp_path / "s", *options
    )
    _, rest, _ = e88("generate", tmp_path / "run", "--load-state", tmp_path / "s", "--max-bytes", 14, *options)
    assert json.loads(first)["text"] + json.loads(rest)["text"] == json.loads(whole)["text"]


def test_the_command_line_overrides_the_file(e88, spec, text, tmp_path):
    arguments = ["--data", text, "--device", "cpu", "--json", "--steps", 2, "--lr", 0.5, "--set", "clip=0.25"]
    _, out, _ = e88("train", spec(), *arguments, "--out", tmp_path / "run")
    training = json.loads(out)["config"]["training"]
    assert training["budget"] == {"steps": 2} and training["lr"] == 0.5 and training["clip"] == 0.25


def test_a_diverging_run_exits_with_3_and_leaves_its_record(e88, spec, text, tmp_path):
    path = spec("wild", lr=10.0, steps=400, extra="clip = 0\nwarmup = 0\nweight_decay = 10.0")
    code, out, err = e88("train", path, "--data", text, "--out", tmp_path / "run", "--device", "cpu")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert code == 3 and record["status"] == "diverged" and "diverged" in out
    assert f"step {record['results']['diverged_step']}" in record["reason"]
    assert "blocks." in record["reason"] or "norm" in record["reason"] or "embedding" in record["reason"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("learning_rate = 1", "unknown TrainingConfig key"),
        ("windw = 3", "did you mean window"),
        ("accumulate = 3", "does not divide"),
        ("optimizer = 'sgd'", "is not one of adamw"),
    ],
)
def test_unknown_and_impossible_keys(e88, spec, text, tmp_path, extra, message):
    code, out, err = e88("train", spec(extra=extra), "--data", text, "--out", tmp_path / "run")
    assert code == 2 and one_line(err) and message in err and out == ""
    assert not (tmp_path / "run").exists()


def test_bad_input_is_one_line_with_code_2(e88, spec, text, tmp_path):
    good = spec()
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("too short")
    (tmp_path / "broken.toml").write_text("[model")
    cases = [
        (["train", "tiny-e89", "--out", tmp_path / "r"], "did you mean"),
        (["train", tmp_path / "missing.toml", "--out", tmp_path / "r"], "cannot read"),
        (["train", tmp_path / "broken.toml", "--out", tmp_path / "r"], "not valid TOML"),
        (["train", good, "--data", tmp_path / "nowhere", "--out", tmp_path / "r"], "nowhere"),
        (["train", good, "--data", tmp_path / "empty", "--out", tmp_path / "r"], "empty"),
        (["train", good, "--data", tmp_path / "short", "--out", tmp_path / "r"], "window"),
        (["train", good, "--data", text, "--out", text], "cannot write"),
        (["train", good, "--data", text, "--out", tmp_path / "r", "--device", "tpu"], "device"),
        (["train", good, "--data", text, "--out", tmp_path / "r", "--backend", "numbe"], "did you mean"),
        (["train", good, "--data", text, "--out", tmp_path / "r", "--set", "lr"], "KEY=VALUE"),
        (["train", good, "--data", text, "--out", tmp_path / "r", "--seconds", -1], "positive"),
        (["train", good, "--data", text, "--out", tmp_path / "r", "--threads", 0], "threads"),
        (["generate", tmp_path / "missing"], "no file"),
        (["generate", text], "not a readable"),
        (["report", tmp_path / "missing"], "missing"),
        (["bench", "tiny-e88", "tiny-gbn", "--out", tmp_path / "b"], "did you mean"),
        (["bench", good, "--data", tmp_path / "nowhere", "--out", tmp_path / "b"], "nowhere"),
        (["bench", good, "--data", text, "--out", text], "cannot write"),
    ]
    for arguments, message in cases:
        code, out, err = e88(*arguments)
        assert code == 2 and one_line(err) and message in err and out == "", (arguments, err)
    assert text.read_text().startswith("line 0")


def test_wrong_checkpoints_are_refused_and_left_alone(e88, spec, text, tmp_path):
    run = tmp_path / "run"
    e88("train", spec(), "--data", text, "--out", run, "--device", "cpu")
    checkpoint = run / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    assert stat.S_IMODE(checkpoint.stat().st_mode) == stat.S_IMODE((run / "log.jsonl").stat().st_mode)
    again = ["--data", text, "--out", run, "--device", "cpu"]
    for arguments, message in [
        (["train", spec(), *again], "--resume"),
        (["train", spec(lr=0.2), *again, "--resume"], "another configuration"),
        (["generate", run, "--load-state", checkpoint], "not a state file"),
    ]:
        code, _, err = e88(*arguments)
        assert code == 2 and one_line(err) and message in err
        assert checkpoint.read_bytes() == before
    for content in (before[:-50], b"garbage", b""):
        checkpoint.write_bytes(content)
        code, _, err = e88("train", spec(), *again, "--resume")
        assert code == 2 and one_line(err) and checkpoint.read_bytes() == content
    save_file({"a": torch.ones(2)}, checkpoint)
    code, _, err = e88("train", spec(), *again, "--resume")
    assert code == 2 and one_line(err) and "not written by e88" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(e88, spec, text, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = e88("train", spec(), "--data", text, "--out", tmp_path / "locked" / "run", "--device", "cpu")
    assert code == 2 and one_line(err)


def test_tensorboard_events_are_written_on_request(e88, spec, text, tmp_path):
    pytest.importorskip("tensorboard")
    e88("train", spec(), "--data", text, "--out", tmp_path / "run", "--device", "cpu", "--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_doctor_names_every_backend_and_missing_package(e88):
    code, out, _ = e88("doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["operator backends"]["numba"] == "ready"
    assert facts["packages"]["torch"] == torch.__version__
    assert all(facts["rivals' libraries"][name].startswith(("ready", "no: ")) for name in ("fla", "mamba-ssm", "flash"))
    code, out, _ = e88("doctor", "--kernels", "--device", "cpu", "--json")
    checks, layers = (json.loads(out)[part] for part in ("kernels", "layers"))
    assert code == 0 and len(checks) > 8 and all(row["ok"] and row["backend"] == "numba" for row in checks.values())
    assert {name: row["backend"] for name, row in layers.items()} == {
        "float32 tiny-e88": "numba", "float32 tiny-gdn": "torch", "float32 tiny-mamba2": "torch",
        "float32 tiny-transformer": "torch",
    }  # fmt: skip
    code, out, _ = e88("doctor")
    assert code == 0 and "numba" in out and "operator backends" in out


def test_doctor_tells_a_wrong_kernel(e88, monkeypatch):
    import e88.ops.cpu as cpu

    right = cpu.run

    def wrong(*arguments):
        y, final = right(*arguments)
        return y * 1.001, final

    monkeypatch.setattr(cpu, "run", wrong)
    code, out, _ = e88("doctor", "--kernels", "--device", "cpu")
    assert code == 1 and "WRONG" in out


def test_doctor_tells_a_wrong_rival(e88, monkeypatch):
    from e88.baselines import mamba2

    right = mamba2.ssd

    def wrong(xbc, *arguments, **options):
        y, final = right(xbc, *arguments, **options)
        # Not a multiple, which the norm behind it would take off again.
        return (y if xbc.dtype == torch.float64 else y + 0.01 * y.flip(1)), final

    monkeypatch.setattr(mamba2, "ssd", wrong)
    code, out, _ = e88("doctor", "--kernels", "--device", "cpu", "--json")
    layers = json.loads(out)["layers"]
    assert code == 1 and [name for name, row in layers.items() if not row["ok"]] == ["float32 tiny-mamba2"]
