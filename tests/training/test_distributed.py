"""One run in two processes (gloo, CPU) is the run of one process, to the rounding of float32."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st

from e88.errors import UserError
from e88.study.spec import make_spec
from e88.training.checkpoint import load_model, load_tensors
from e88.training.distributed import Group, joined
from e88.training.loop import Interrupted, train
from e88.training.replay import replay
from e88.training.steplog import read_entries

CPU = torch.device("cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class StopAt:
    def step(self, entry, used, seconds_left):
        if entry["step"] == ranks.STOP:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def out(text, corpus, tmp_path_factory):
    """Everything that two processes did, and beside it, in `one`, what a single one does."""
    folder = tmp_path_factory.mktemp("ranks")
    for mode in ("ddp", "fsdp"):
        with pytest.raises(Interrupted):
            train(ranks.MODEL, ranks.BASE, corpus, folder / "one" / f"to-{mode}", reporter=StopAt())
    for name in ranks.RUNS:
        train(ranks.MODEL, ranks.config(name), corpus, folder / "one" / name)
    cache = tmp_path_factory.mktemp("cache")
    command = [*TORCHRUN, str(Path(__file__).with_name("ranks.py")), str(text), str(folder), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def entries(folder):
    return list(read_entries(folder / "log.jsonl"))


def agree(one, two):
    """The logs, the held-out results and the checkpoints of two runs are the same but for rounding.

    Adam's first steps divide gradients by their own size, so that rounding grows from step to step: the norm of the
    first gradient is told exactly, later ones and the optimiser's state less so.
    """
    logs = entries(one), entries(two)
    assert len(logs[0]) == len(logs[1]) == 6
    for key, rel in (("loss", 3e-6), ("lr", 0), ("tokens", 0), ("step_tokens", 0), ("grad_norm", 3e-3)):
        first, second = ([entry[key] for entry in log] for log in logs)
        assert second == pytest.approx(first, rel=rel, abs=0), key
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-6)
    a, b = (json.loads((folder / "record.json").read_text()) for folder in (one, two))
    for key in ("train_loss", "heldout_bpb", "heldout_interval", "heldout_windows"):
        assert b["results"][key] == pytest.approx(a["results"][key], rel=3e-6)
    # Over few tokens each, where rounding averages out less.
    for point, other in zip(a["heldout_by_position"], b["heldout_by_position"], strict=True):
        assert other == pytest.approx(point, rel=1e-4)
    assert a["id"] == b["id"]
    tensors, others = (load_tensors(folder)[0] for folder in (one, two))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        error = (others[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
        assert error <= (1e-4 if name.startswith("model.") else 5e-3), (name, error)


@pytest.mark.parametrize("name", [name for name in ranks.RUNS if "half" not in name and "muon" not in name])
def test_two_processes_do_the_run_of_one(out, name):
    agree(out / "one" / name, out / name)


@pytest.mark.parametrize("name", ["ddp-muon", "fsdp-half", "ddp-half"])
def test_two_processes_do_the_run_of_one_in_bf16(out, name):
    # Muon orthogonalises in bf16.
    one, two = ([e["loss"] for e in entries(folder / name)] for folder in (out / "one", out))
    assert two == pytest.approx(one, rel=5e-3) and two[0] == pytest.approx(one[0], rel=1e-5)
    norms = [entries(folder / name)[0]["grad_norm"] for folder in (out / "one", out)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_goes_on_in_two_and_the_other_way_round(out, corpus, mode):
    agree(out / "one" / mode, out / "one" / f"to-{mode}")
    assert len(entries(out / f"from-{mode}")) == ranks.STOP
    load_model(out / f"from-{mode}", CPU)
    train(ranks.MODEL, ranks.BASE, corpus, out / f"from-{mode}", resume=True)
    agree(out / "one" / mode, out / f"from-{mode}")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_number_that_is_not_finite_in_one_process_ends_all_and_is_named(out, mode):
    record = json.loads((out / f"bad-{mode}" / "record.json").read_text())
    assert record["status"] == "diverged" and record["results"]["diverged_step"] == ranks.BAD
    assert "blocks.1.mixer.o_proj" in record["reason"] and len(entries(out / f"bad-{mode}")) == ranks.BAD


def test_a_step_of_several_processes_is_repeated_in_one(out):
    found = replay(out / "bad-fsdp", CPU)
    assert found.trace.first.name == "the weight blocks.1.mixer.o_proj.weight, before the step"
    assert found.meta["parallel"]["world"] == 2 and found.repeats


@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp-parts", "fsdp-parts"])
def test_the_layers_of_several_processes_are_looked_into_together(out, name):
    one, two = (entries(folder / name)[0]["layers"] for folder in (out / "one", out))
    assert one.keys() == two.keys() and "saturated" in two
    for key, values in one.items():
        assert np.array(two[key]) == pytest.approx(np.array(values), rel=2e-5, abs=2e-5)


def test_the_record_says_how_it_was_run(out):
    for mode in ("ddp", "fsdp"):
        environment = json.loads((out / mode / "record.json").read_text())["environment"]
        assert environment["parallel"] == {"world": 2, "mode": mode, "backend": "gloo"}
        assert environment["hardware"].startswith("2 x ")
    assert json.loads((out / "one" / "ddp" / "record.json").read_text())["environment"]["parallel"] is None


def test_an_error_of_one_process_is_one_of_all(out):
    first, second = (json.loads((out / f"errors.{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 5 and all("\n" not in line for line in first)
    for line, part in zip(first, ["--resume", "muon needs whole matrices", "multiple of 2", "multiple of 16",
                                  "did you mean"], strict=True):  # fmt: skip
        assert part in line


def test_no_thread_of_the_group_is_left_to_abort_the_process_at_its_end(out):
    left = [json.loads((out / f"threads.{rank}.json").read_text()) for rank in (0, 1)]
    assert left == [[], []]


@given(world=st.integers(1, 9), count=st.integers(0, 200))
def test_every_row_belongs_to_the_process_that_the_rule_names(world, count):
    for rank in range(world):
        rows = np.arange(count)[Group(CPU, rank, world).rows(count)]
        assert rows.tolist() == [i for i in range(count) if i * world // count == rank]


def test_wrong_uses_are_one_line_errors(monkeypatch):
    for mode, message in (("dp", "is not one of ddp, fsdp"), ("ddp", "torchrun")):
        with pytest.raises(UserError, match=message), joined("cpu", mode):
            pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu", "fsdp") as group:
        assert group == Group(CPU)


def test_a_killed_process_ends_the_run_with_one_line_and_it_goes_on_in_one(text, corpus, tmp_path):
    spec = write_spec(tmp_path, "budget = {steps = 150}\ncheckpoint_every = 1e-6\n")
    run, environment = tmp_path / "run", {**os.environ, "E88_CACHE": str(tmp_path / "cache")}
    options = ["--data", str(text), "--device", "cpu", "--json", "--parallel", "fsdp", "--out", str(run)]
    command = [*TORCHRUN, "-m", "e88", "train", str(spec), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.safetensors").exists() or load_tensors(run)[1]["step"] < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (victim,) = (pid for pid in workers(process.pid) if "\0RANK=1\0" in environment_of(pid))
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines() if line.startswith("e88:")]
    assert process.returncode != 0 and len(said) == 1 and "--resume goes on" in said[0], err
    assert not (run / "record.json").exists() and load_tensors(run)[1]["step"] < 150
    one = make_spec(str(spec), {})
    for folder in (run, tmp_path / "whole"):
        train(one.model, one.training, corpus, folder, resume=True)
    assert [e["loss"] for e in entries(run)] == pytest.approx(
        [e["loss"] for e in entries(tmp_path / "whole")], rel=1e-3
    )


def test_two_nodes_make_one_run_and_the_first_alone_writes(text, corpus, tmp_path):
    """As torchrun starts a process on each of two nodes that share no folder."""
    spec = write_spec(tmp_path, "budget = {steps = 4}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "e88", "train", str(spec), "--data", str(text), "--device", "cpu", "--out", "run"]
    nodes = []
    for rank, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        given = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        given["E88_CACHE"] = str(tmp_path / name / "cache")
        nodes.append(
            subprocess.Popen(
                [*command, "--parallel", "fsdp"], cwd=tmp_path / name, env={**os.environ, **given},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    run = tmp_path / "a" / "run"
    assert json.loads((run / "record.json").read_text())["environment"]["parallel"]["world"] == 2
    assert not (tmp_path / "b" / "run").exists()
    one = make_spec(str(spec), {})
    train(one.model, one.training, corpus, tmp_path / "one")
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in entries(run)] == pytest.approx([e[key] for e in entries(tmp_path / "one")], rel=1e-4)


def write_spec(folder, training):
    spec = folder / "spec.toml"
    spec.write_text(
        "[model]\ndim = 16\ndepth = 2\n[model.mixer]\nkind = 'e88'\nn_heads = 2\nn_state = 8\n"
        f"[training]\nbatch_size = 4\nwindow = 16\nheldout_bytes = 2000\n{training}"
    )
    return spec


def workers(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid):
    return "\0" + Path(f"/proc/{pid}/environ").read_text()
