import json
import os
import signal
import subprocess
import sys
import time

import pytest

from e88.errors import UserError
from e88.study.runner import run_all
from e88.study.spec import RunSpec, make_spec, parse_assignments
from e88.study.store import Store


class Quiet:
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def spec(text, name="small", steps=4, dim=16, **training):
    return RunSpec.from_dict(
        {
            "name": name,
            "model": {"dim": dim, "depth": 2, "mixer": {"kind": "e88", "n_heads": 2, "n_state": 8}},
            "training": {
                "budget": {"steps": steps}, "batch_size": 4, "window": 16, "lr": 1e-2, "heldout_bytes": 2000,
                **training,
            },
            "data": str(text),
        }
    )  # fmt: skip


def test_a_bench_survives_failure_and_divergence_and_repeats_only_what_failed(text, tmp_path):
    specs = [
        spec(text, "good"),
        spec(text, "wild", steps=400, lr=10.0, clip=0.0, warmup=0.0, weight_decay=10.0),
        spec(text, "refused", backend="no-such-backend"),
        spec(text, "last", seed=1),
    ]
    quiet = Quiet()
    records = run_all(specs, tmp_path / "out", device="cpu", announcer=quiet)
    assert [r["status"] for r in records] == ["done", "diverged", "failed", "done"]
    assert "no-such-backend" in records[2]["reason"] and "\n" not in records[2]["reason"]
    assert {r["id"] for r in Store(tmp_path / "out").records()} == {r["id"] for r in records}
    again = run_all(specs, tmp_path / "out", device="cpu", announcer=quiet)
    assert [r["started"] for r in again[:2]] == [r["started"] for r in records[:2]]
    assert again[0] == records[0] and again[3] == records[3]
    assert sum("kept" in line for line in quiet.lines) == 3


@pytest.fixture
def popen():
    """Start processes that do not outlive the test."""
    started = []

    def start(command, **options):
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_killed_worker_is_recorded_and_a_killed_runner_leaves_no_orphan(text, tmp_path, popen):
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); import test_runner as t; from pathlib import Path; "
        "s = t.spec(sys.argv[1], steps=100000, checkpoint_every=0.2); "
        "t.run_all([s], Path(sys.argv[2]), device='cpu', announcer=t.Quiet())"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, str(text), str(out), os.path.dirname(__file__)]

    def start():
        process, began = popen(command), time.time()
        deadline = time.monotonic() + 60
        while not (found := [f for f in out.glob("runs/*/checkpoint.safetensors") if f.stat().st_mtime > began]):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        return process, found[0]

    runner, checkpoint = start()
    with pytest.raises(UserError, match="another e88 process"):
        run_all([spec(text)], out, device="cpu", announcer=Quiet())
    (worker,) = _children(runner.pid)
    os.kill(worker, signal.SIGKILL)
    assert runner.wait(30) == 0
    (record,) = Store(out).records()
    assert record["status"] == "failed" and "SIGKILL" in record["reason"]

    runner, checkpoint = start()
    (worker,) = _children(runner.pid)
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + 30
    while _alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    from e88.training.checkpoint import load_tensors

    step = load_tensors(checkpoint)[1]["step"]
    assert step > 0
    lines = (checkpoint.parent / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[step - 1])["step"] == step


def _children(pid):
    return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def _alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupting_stops_with_a_checkpoint_and_the_same_command_goes_on(text, tmp_path, popen):
    command = [
        sys.executable, "-m", "e88", "bench", str(tmp_path / "long.toml"), "--data", str(text), "--device", "cpu",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    body = "[model]\ndim=16\ndepth=2\n[model.mixer]\nkind='e88'\nn_heads=2\nn_state=8\n[training]\nbatch_size=4\n"
    (tmp_path / "long.toml").write_text(body + "window=16\nheldout_bytes=2000\nbudget={steps=600}\n")
    process = popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(f.stat().st_size for f in (tmp_path / "out").glob("runs/*/log.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in err and "Traceback" not in err
    assert not Store(tmp_path / "out").records()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "done" and record["results"]["steps"] == 600
    assert (tmp_path / "out" / "report.html").exists()


def test_specs_from_presets_and_assignments():
    options = parse_assignments(["lr=1e-3", "optimizer=muon", "clip=0.5"])
    assert options == {"lr": 1e-3, "optimizer": "muon", "clip": 0.5}
    s = make_spec("tiny-e88", {**options, "budget": {"steps": 3}})
    assert s.training.lr == 1e-3 and s.training.optimizer == "muon" and s.name == "tiny-e88" and s.data == "stdlib"
    assert RunSpec.from_dict(s.to_dict()) == s
    for bad in ("lr", "=3"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            parse_assignments([bad])
    with pytest.raises(UserError, match="did you mean"):
        make_spec("tiny-e88", {"budget": {"steps": 3}, "batchsize": 2})
    with pytest.raises(UserError, match="did you mean"):
        RunSpec.from_dict({"name": "x", "modell": {}})
