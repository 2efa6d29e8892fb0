import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e88.errors import UserError
from e88.training.checkpoint import load_model, load_tensors
from e88.training.config import Budget, TrainingConfig
from e88.training.loop import Interrupted, train
from e88.training.steplog import curve, last_loss, read_entries


def config(steps=8, **options):
    return TrainingConfig(
        **{"budget": Budget(steps=steps), "batch_size": 4, "window": 16, "lr": 1e-2, "heldout_bytes": 2000, **options}
    )


def losses(folder):
    return [entry["loss"] for entry in read_entries(folder / "log.jsonl")]


class StopAt:
    """A reporter that asks for a stop after some step, as Ctrl-C would."""

    def __init__(self, step):
        self.at = step

    def step(self, entry, used, seconds_left):
        if entry["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stop=st.integers(1, 7), optimizer=st.sampled_from(["adamw", "schedulefree", "muon"]), parts=st.sampled_from([1, 2])
)
def test_a_resumed_run_equals_an_uninterrupted_one(stop, optimizer, parts, corpus, tiny, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("runs")
    c = config(optimizer=optimizer, accumulate=parts)
    whole = train(tiny, c, corpus, tmp / "whole")
    with pytest.raises(Interrupted):
        train(tiny, c, corpus, tmp / "cut", reporter=StopAt(stop))
    assert len(losses(tmp / "cut")) == stop
    resumed = train(tiny, c, corpus, tmp / "cut", resume=True)
    assert losses(tmp / "cut") == losses(tmp / "whole")
    assert resumed["results"]["heldout_bpb"] == whole["results"]["heldout_bpb"]
    assert resumed["id"] == whole["id"]
    one, two = (load_tensors(tmp / name, "model.")[0] for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_no_reported_number(parts, corpus, tiny, tmp_path):
    one = train(tiny, config(), corpus, tmp_path / "one")
    cut = train(tiny, config(accumulate=parts), corpus, tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    for key in ("train_loss", "heldout_bpb"):
        assert cut["results"][key] == pytest.approx(one["results"][key], rel=2e-5)
    assert cut["results"]["tokens"] == one["results"]["tokens"] == 8 * 4 * 16


def test_the_record_says_what_happened(corpus, tiny, tmp_path):
    record = train(tiny, config(120), corpus, tmp_path / "run", name="small")
    results = record["results"]
    every = losses(tmp_path / "run")
    assert record["status"] == "done" and record["reason"] is None and record["name"] == "small"
    assert results["train_loss"] == pytest.approx(sum(every[-100:]) / 100) and results["train_loss_steps"] == 100
    assert results["steps"] == 120 and results["tokens"] == 120 * 64
    low, high = results["heldout_interval"]
    assert low < results["heldout_bpb"] < high
    assert results["heldout_bpb"] < 6 < 8
    assert results["tokens_per_second"] > 0 and results["seconds"] > 0 and results["compile_seconds"] > 0
    model, meta = load_model(tmp_path / "run", torch.device("cpu"))
    assert record["model"]["params"] == sum(p.numel() for p in model.parameters())
    assert meta["step"] == 120
    assert record["environment"]["backends"] == ["numba"]
    assert json.loads((tmp_path / "run" / "record.json").read_text()) == record
    assert record["curve"][-1]["step"] == 120 and record["heldout_curve"][-1]["bpb"] == results["heldout_bpb"]


@pytest.mark.parametrize(
    ("budget", "key", "least"),
    [({"tokens": 200}, "tokens", 200), ({"steps": 3}, "steps", 3), ({"seconds": 0.2}, "seconds", 0.2)],
)
def test_a_budget_is_spent_and_hardly_more(budget, key, least, corpus, tiny, tmp_path):
    record = train(tiny, dataclasses.replace(config(), budget=Budget(**budget)), corpus, tmp_path / "run")
    entries = list(read_entries(tmp_path / "run" / "log.jsonl"))
    assert record["results"][key] >= least
    assert len(entries) == 1 or entries[-2].get(key, entries[-2]["step"]) < least


def test_a_budget_of_flops_counts_the_models_flops(corpus, tiny, tmp_path):
    from e88.sizing.closed_form import describe

    per_step = describe(tiny, window=16)["flops_per_token"] * 64
    c = dataclasses.replace(config(), budget=Budget(flops=2.5 * per_step))
    assert train(tiny, c, corpus, tmp_path / "run")["results"]["steps"] == 3


def test_evaluations_on_the_way_do_not_change_the_run(corpus, tiny, tmp_path):
    train(tiny, config(), corpus, tmp_path / "plain")
    often = train(tiny, config(eval_every=1e-6, checkpoint_every=1e-6), corpus, tmp_path / "often")
    assert losses(tmp_path / "often") == losses(tmp_path / "plain")
    assert len(often["heldout_curve"]) == 8


@pytest.mark.parametrize(
    ("steps", "points", "at"), [(10, 9, range(1, 10)), (10, 4, (2, 4, 6, 8)), (7, 2, (3, 5)), (4, 9, (1, 2, 3))]
)
def test_points_are_at_equal_shares_of_the_budget_resumed_or_not(steps, points, at, corpus, tiny, tmp_path):
    c = config(steps, eval_points=points)
    with pytest.raises(Interrupted):
        train(tiny, c, corpus, tmp_path, reporter=StopAt(steps // 2))
    record = train(tiny, c, corpus, tmp_path, resume=True)
    assert [point["step"] for point in record["heldout_curve"]] == [*at, steps]


@given(steps=st.integers(1, 10**6), points=st.integers(1, 400))
def test_points_are_counted_exactly(steps, points):
    c = config(steps, eval_points=points)
    for step in {step for k in range(1, 6) for step in (steps * k // 6, -(-steps * k // (points + 1))) if step < steps}:
        used = c.budget.used(seconds=0.0, steps=step, tokens=0, flops=0.0)
        assert c.points_passed(used) == step * (points + 1) // steps


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_layer(where, corpus, tiny, tmp_path, runs):
    class Poison:
        def step(self, entry, used, seconds_left):
            if entry["step"] != 3:
                return
            target = runs[0].model
            if where == "forward":
                target.blocks[1].mixer.o_proj.weight.data[0, 0] = float("nan")
            else:
                weight = target.blocks[0].mixer.qkv_proj.weight
                weight.register_hook(lambda grad: grad * float("inf"))

    record = train(tiny, config(), corpus, tmp_path / "run", reporter=Poison())
    assert record["status"] == "diverged" and record["results"]["diverged_step"] == 3
    named = "blocks.1.mixer.o_proj" if where == "forward" else "blocks.0.mixer.qkv_proj"
    assert named in record["reason"] and "step 3" in record["reason"]
    assert len(losses(tmp_path / "run")) == 3


def test_a_checkpoint_is_left_only_where_it_is_to_be_kept(corpus, tiny, tmp_path):
    with pytest.raises(Interrupted):
        train(tiny, config(), corpus, tmp_path, reporter=StopAt(3), keep_checkpoint=False)
    # The run has not ended.
    assert (tmp_path / "checkpoint.safetensors").exists()
    record = train(tiny, config(), corpus, tmp_path, resume=True, keep_checkpoint=False)
    assert record["status"] == "done" and record["results"]["steps"] == 8
    assert not (tmp_path / "checkpoint.safetensors").exists()
    kept = train(tiny, config(), corpus, tmp_path / "kept")
    assert (tmp_path / "kept" / "checkpoint.safetensors").exists()
    assert kept["results"]["heldout_bpb"] == record["results"]["heldout_bpb"]


def test_a_second_run_in_the_same_folder_needs_resume(corpus, tiny, tmp_path):
    train(tiny, config(2), corpus, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        train(tiny, config(2), corpus, tmp_path / "run")
    with pytest.raises(UserError, match="training.lr: 0.01 there, 0.5 asked for"):
        train(tiny, config(2, lr=0.5), corpus, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="model.depth"):
        train(dataclasses.replace(tiny, depth=3), config(2), corpus, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_a_refused_option_does_not_claim_the_folder(corpus, tiny, tmp_path):
    with pytest.raises(UserError, match="did you mean"):
        train(tiny, config(2, backend="numbe"), corpus, tmp_path / "run")
    assert train(tiny, config(2), corpus, tmp_path / "run")["status"] == "done"


def test_only_what_decides_a_run_is_compared_on_resume(corpus, tiny, tmp_path):
    train(tiny, config(2), corpus, tmp_path / "run")
    train(tiny, config(2, checkpoint_every=5.0), corpus, tmp_path / "run", resume=True)
    other = dataclasses.replace(corpus, hash="0" * 64)
    with pytest.raises(UserError, match="data: "):
        train(tiny, config(2, checkpoint_every=7.0), other, tmp_path / "run", resume=True)


def test_an_output_that_cannot_be_written_is_a_one_line_error(corpus, tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        train(tiny, config(2), corpus, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


def test_kill_at_any_moment_leaves_a_good_checkpoint(text, tmp_path):
    """kill -9 while checkpoints are written all the time; the run then resumes to the same end."""
    arguments = [
        sys.executable, "-m", "e88", "train", str(tmp_path / "spec.toml"), "--data", str(text), "--resume",
        "--device", "cpu", "--json",
    ]  # fmt: skip
    (tmp_path / "spec.toml").write_text(
        "[model]\ndim = 16\ndepth = 2\n[model.mixer]\nkind = 'e88'\nn_heads = 2\nn_state = 8\n"
        "[training]\nbatch_size = 4\nwindow = 16\nheldout_bytes = 2000\ncheckpoint_every = 1e-6\n"
        "budget = {steps = 150}\n"
    )
    run = tmp_path / "run"
    environment = {**os.environ, "E88_CACHE": str(tmp_path / "cache")}
    resumed = 0
    for wait in (0.05, 0.3):
        process = subprocess.Popen([*arguments, "--out", str(run)], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (run / "checkpoint.safetensors").exists() or resumed == _step(run):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.wait()
        assert _step(run) > resumed
        resumed = _step(run)
    subprocess.run([*arguments, "--out", str(run)], env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [*arguments, "--out", str(tmp_path / "whole")], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    assert losses(run) == losses(tmp_path / "whole")
    assert [e["step"] for e in read_entries(run / "log.jsonl")] == list(range(1, 151))


def _step(run):
    return load_tensors(run)[1]["step"]


@given(count=st.integers(0, 900))
def test_summaries_of_the_log_are_exact_means(count):
    entries = [{"step": i + 1, "tokens": i, "seconds": i / 7, "loss": float(i % 13), "lr": 0.1} for i in range(count)]
    points = curve(entries)
    assert len(points) <= 400
    mean, n = last_loss(entries)
    assert n == min(count, 100)
    if count:
        assert points[-1]["step"] == count
        assert mean == pytest.approx(sum(e["loss"] for e in entries[-100:]) / n)
    else:
        assert mean is None and points == []
