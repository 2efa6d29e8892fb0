"""A state that is carried across windows: what training makes of it, and how a run gets it back."""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e88.data.loader import WindowSampler, heldout_windows
from e88.errors import UserError
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from e88.models.lm import LanguageModel
from e88.training import state
from e88.training.checkpoint import load_model, load_tensors
from e88.training.config import Budget, TrainingConfig
from e88.training.distributed import Group
from e88.training.evaluate import evaluate
from e88.training.loop import Interrupted, train
from e88.training.replay import replay
from e88.training.step import Carry, backward
from e88.training.steplog import read_entries

CPU = torch.device("cpu")
MIXERS = {
    "e88": E88Config(n_heads=2, n_state=8, gate=True, conv=4),
    "gated_deltanet": GatedDeltaNetConfig(n_heads=2, head_dim=8),
    "mamba2": Mamba2Config(d_state=8, head_dim=8),
    "attention": AttentionConfig(n_heads=2),
}
each = pytest.mark.parametrize("kind", MIXERS)


def model(kind):
    return ModelConfig(dim=16, depth=2, mixer=MIXERS[kind])


def config(steps=8, **options):
    return TrainingConfig(
        **{"budget": Budget(steps=steps), "batch_size": 4, "window": 16, "lr": 1e-2, "heldout_bytes": 2000, "carry": 4,
           **options}
    )  # fmt: skip


def logged(folder, *keys):
    return [[entry[key] for key in keys] for entry in read_entries(folder / "log.jsonl")]


class StopAt:
    def __init__(self, step):
        self.at = step

    def step(self, entry, used, seconds_left):
        if entry["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@each
@pytest.mark.parametrize("parts", [1, 2])
def test_the_losses_of_a_block_are_those_of_one_long_window(kind, parts, corpus, tmp_path):
    """Weights that stay as they are: then the windows of a block are one text, read in pieces."""
    record = train(model(kind), config(lr=0.0, accumulate=parts, optimizer="adamw"), corpus, tmp_path)
    m, _ = load_model(tmp_path, CPU)
    with torch.no_grad():
        for block in (0, 1):
            text = torch.from_numpy(WindowSampler(corpus.train, 4 * 16, 4, 0).batch(block))
            expected = m.nll(text).view(4, 4, 16).mean((0, 2)).tolist()
            found = [loss for (loss,) in logged(tmp_path, "loss")[4 * block : 4 * block + 4]]
            assert found == pytest.approx(expected, rel=1e-5)
    assert record["results"]["tokens"] == 8 * 4 * 16


@each
def test_a_step_differs_from_one_from_nothing_after_the_first_of_a_block(kind, corpus, tmp_path):
    train(model(kind), config(lr=0.0), corpus, tmp_path)
    m, _ = load_model(tmp_path, CPU)
    sampler = WindowSampler(corpus.train, 16, 4, 0, 4)
    with torch.no_grad():
        alone = [m.nll(torch.from_numpy(sampler.batch(step))).mean().item() for step in range(8)]
    differing = [abs(a - loss) > 1e-6 for a, (loss,) in zip(alone, logged(tmp_path, "loss"), strict=True)]
    assert differing == [step % 4 > 0 for step in range(8)]


@pytest.mark.parametrize("kind", MIXERS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(1, 7), parts=st.sampled_from([1, 2]), precision=st.sampled_from(["fp32", "bf16"]))
def test_a_run_resumed_within_a_block_equals_an_uninterrupted_one(
    kind, stop, parts, precision, corpus, tmp_path_factory
):
    tmp = tmp_path_factory.mktemp("runs")
    c = config(accumulate=parts, precision=precision)
    whole = train(model(kind), c, corpus, tmp / "whole")
    with pytest.raises(Interrupted):
        train(model(kind), c, corpus, tmp / "cut", reporter=StopAt(stop))
    saved = [name for name in load_tensors(tmp / "cut")[0] if name.startswith("carried.")]
    assert bool(saved) == (stop % 4 > 0)
    resumed = train(model(kind), c, corpus, tmp / "cut", resume=True)
    keys = ("loss", "grad_norm")
    assert logged(tmp / "cut", *keys) == logged(tmp / "whole", *keys)
    assert resumed["results"]["heldout_bpb"] == whole["results"]["heldout_bpb"]
    one, two = (load_tensors(tmp / name, "model.")[0] for name in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_looking_at_a_run_does_not_disturb_what_it_carries(corpus, tmp_path):
    options = {"optimizer": "schedulefree", "accumulate": 2}
    train(model("e88"), config(layers_every=0, **options), corpus, tmp_path / "plain")
    often = config(layers_every=1, eval_every=1e-6, checkpoint_every=1e-6, **options)
    record = train(model("e88"), often, corpus, tmp_path / "often")
    assert logged(tmp_path / "often", "loss") == logged(tmp_path / "plain", "loss")
    assert len(record["heldout_curve"]) == 8 and record["layers"]["samples"] == 8


@each
def test_a_step_within_a_block_is_repeated_bit_for_bit(kind, corpus, tmp_path, monkeypatch, runs):
    batch = WindowSampler(corpus.train, 16, 4, 0, 4).batch(6)
    real = state.save_bad_step

    class Save:
        def step(self, entry, used, seconds_left):
            if entry["step"] == 6:
                real(runs[0], batch, 0.0, 0.0)

    monkeypatch.setattr(state, "forget_bad_step", lambda run: None)
    train(model(kind), config(accumulate=2), corpus, tmp_path, reporter=Save())
    found = replay(tmp_path, CPU).trace
    assert [found.loss, found.grad_norm] == logged(tmp_path, "loss", "grad_norm")[6]


def test_a_run_that_diverges_within_a_block_can_be_replayed(corpus, tmp_path, runs):
    class Poison:
        def step(self, entry, used, seconds_left):
            if entry["step"] == 6:
                runs[0].model.blocks[1].mixer.o_proj.weight.data[0, 0] = float("inf")

    record = train(model("e88"), config(), corpus, tmp_path, reporter=Poison())
    assert record["status"] == "diverged" and record["results"]["diverged_step"] == 6
    found = replay(tmp_path, CPU)
    assert found.repeats and str(found.trace.first) in record["reason"]


@pytest.mark.parametrize("options", [{}, {"write_gate": True, "decay": "sigmoid"}, {"linear_state": True, "conv": 4}])
def test_every_backend_has_the_gradients_from_a_carried_state(options, corpus):
    torch.manual_seed(0)
    m = LanguageModel(ModelConfig(dim=16, depth=2, mixer=E88Config(n_heads=2, n_state=8, gate=True, **options)))
    sampler, c, found = WindowSampler(corpus.train, 16, 4, 0, 2), config(carry=2, accumulate=2), {}
    for backend in ("numba", "checkpointed", "reference"):
        m.set_backend(backend)
        carry = Carry(m)
        for step in (0, 1):
            m.zero_grad(set_to_none=True)
            backward(m.nll, torch.from_numpy(sampler.batch(step)), c, carry=carry)
            carry.advance(jumps=step == 1)
        assert not carry.before
        found[backend] = [p.grad.clone() for p in m.parameters()]
    for name in ("numba", "checkpointed"):
        for a, b in zip(found[name], found["reference"], strict=True):
            assert ((a - b).norm() / b.norm()).item() < 1e-5


def test_context_is_read_and_not_scored(corpus):
    torch.manual_seed(0)
    m = LanguageModel(model("e88"))
    with torch.no_grad():
        m.embedding.weight.mul_(20)
    plain, behind = (heldout_windows(corpus.valid, 16, 2000, context) for context in (0, 48))
    with torch.no_grad():
        whole = m.nll(torch.from_numpy(behind.rows))
        _, before = m.nll_from(torch.from_numpy(behind.rows[-1:, :49]), None)
        last, _ = m.nll_from(torch.from_numpy(plain.rows[-1:]), before)
    torch.testing.assert_close(whole[-1:, 48:], last, rtol=1e-5, atol=1e-5)
    found = {n: evaluate(m, corpus, windows, n, Group(CPU)) for n, windows in ((3, plain), (5, behind), (1, behind))}
    bits = whole.double()[torch.from_numpy(behind.scored)].sum().item() / torch.log(torch.tensor(2.0)).item()
    assert found[5].bpb == pytest.approx(bits / plain.rows[:, 1:].size, rel=1e-6)
    assert found[5].bpb == pytest.approx(found[1].bpb, rel=1e-6) and found[5].windows == found[3].windows
    assert abs(found[5].bpb - found[3].bpb) > 1e-4


def test_runs_of_other_windows_are_scored_on_one_slice(corpus, tiny, tmp_path):
    plain = train(tiny, config(lr=0.0, carry=1), corpus, tmp_path / "plain")["results"]
    for window, batch in ((8, 8), (64, 1)):
        c = config(lr=0.0, carry=1, window=window, batch_size=batch, heldout_window=16)
        other = train(tiny, c, corpus, tmp_path / str(window))["results"]
        assert other["heldout_windows"] == plain["heldout_windows"]
        assert other["heldout_bpb"] == pytest.approx(plain["heldout_bpb"], rel=1e-6)
    context = train(tiny, config(lr=0.0, carry=1, heldout_context=48), corpus, tmp_path / "context")["results"]
    assert context["heldout_windows"] == plain["heldout_windows"]
    assert context["heldout_bpb"] != pytest.approx(plain["heldout_bpb"], rel=1e-6)


def test_several_processes_are_refused_in_one_line():
    with pytest.raises(UserError, match="carry 4 works in one process, not in 2"):
        Group(CPU, 0, 2, "ddp", "gloo").check(config())
