import dataclasses
import json
import re

import pytest
import torch

from e88.data.loader import WindowSampler
from e88.errors import UserError
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, ModelConfig
from e88.models.lm import LanguageModel
from e88.training import state
from e88.training.checkpoint import load_tensors
from e88.training.config import Budget, TrainingConfig
from e88.training.distributed import Group
from e88.training.forensics import trace
from e88.training.loop import train
from e88.training.replay import replay
from e88.training.step import backward

CPU = torch.device("cpu")


def config(steps=8, **options):
    return TrainingConfig(
        **{"budget": Budget(steps=steps), "batch_size": 4, "window": 16, "lr": 1e-2, "heldout_bytes": 2000, **options}
    )


@pytest.fixture
def traced(corpus):
    """Take a step of a new model apart after something was done to it."""

    def run(model_config, change, **options):
        torch.manual_seed(0)
        model = LanguageModel(model_config)
        change(model)
        c = config(**options)
        windows = torch.from_numpy(WindowSampler(corpus.train, c.window, c.batch_size, 0).batch(0))
        found = trace(model, windows, c, Group(CPU), lambda: backward(model.nll, windows, c))
        assert all(p.grad is None for p in model.parameters())
        return found

    return run


def nan_weight(model):
    model.blocks[1].mixer.o_proj.weight.data[3, 5] = float("nan")


def bad_output(model):
    model.blocks[0].mixer.qkv_proj.register_forward_hook(lambda m, i, y: y * float("inf"))


def bad_gradient(model):
    def after(module, inputs, y):
        if y.requires_grad:
            y.register_hook(lambda grad: grad * float("nan"))

    model.blocks[0].mixer.o_proj.register_forward_hook(after)


def bad_parameter_gradient(model):
    model.blocks[0].mixer.A_log.register_hook(lambda grad: grad / 0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("change", "name", "finite_loss"),
    [
        (nan_weight, "the weight blocks.1.mixer.o_proj.weight, before the step", False),
        (bad_output, "the output of blocks.0.mixer.qkv_proj", False),
        (bad_gradient, "the gradient at the output of blocks.0.mixer.o_proj", True),
        (bad_parameter_gradient, "the gradient of blocks.0.mixer.A_log", True),
    ],
)
def test_the_first_tensor_that_went_wrong_is_named(change, name, finite_loss, parts, traced, tiny):
    found = traced(tiny, change, accumulate=parts)
    assert found.first is not None and found.first.name == name
    assert (found.loss == found.loss) == finite_loss
    assert name in found.explain(7) and "step 7" in found.explain(7)


def test_shares_are_those_of_the_tensor(traced, tiny):
    first = traced(tiny, nan_weight).first
    assert first.nan == pytest.approx(1 / 16**2) and first.inf == 0 and 0 < first.largest < 1


def test_a_healthy_step_has_nothing_to_name(traced, tiny):
    found = traced(tiny, lambda model: None)
    assert found.first is None and "every tensor" in found.explain(0)
    names = list(found.tensors)
    forward = [names.index(f"the output of {n}") for n in ("embedding", "blocks.0.mixer", "blocks.0", "blocks.1")]
    assert forward == sorted(forward)
    back = [names.index(f"the gradient at the output of {n}") for n in ("blocks.1.mixer", "blocks.0.mixer")]
    assert back == sorted(back) and back[0] > forward[-1]


def test_gradients_whose_norm_alone_overflows(traced, tiny):
    def change(model):
        model.embedding.weight.register_hook(lambda grad: grad * 0 + 1e37)

    assert traced(tiny, change).first.name == "the norm of all gradients"


def test_an_overflow_between_a_layers_projections_is_found(traced):
    """Weights, inputs and projections are finite; what the layer puts together from them is not."""

    def change(model):
        # The rows of v: q and k are normalised.
        model.blocks[1].mixer.qkv_proj.weight.data[2 * 16 :] = 1e25
        model.blocks[1].mixer.g_proj.weight.data.fill_(1e25)

    mixer = E88Config(n_heads=2, n_state=8, gate=True, linear_state=True)
    found = traced(ModelConfig(dim=16, depth=2, mixer=mixer), change)
    assert found.first.name == "the input of blocks.1.mixer.o_proj"


@pytest.mark.parametrize("optimizer", ["adamw", "schedulefree"])
@pytest.mark.parametrize(
    "mixer",
    [
        E88Config(n_heads=2, n_state=8, gate=True, conv=4),
        GatedDeltaNetConfig(n_heads=2, head_dim=8),
        AttentionConfig(n_heads=2),
    ],
)
def test_a_step_is_repeated_bit_for_bit(mixer, optimizer, corpus, tmp_path, monkeypatch, runs):
    """Step 5 of a healthy run, saved as if it had been bad."""
    batch = WindowSampler(corpus.train, 16, 4, 0).batch(4)
    real = state.save_bad_step

    class Save:
        def step(self, entry, used, seconds_left):
            if entry["step"] == 4:
                real(runs[0], batch, 0.0, 0.0)

    monkeypatch.setattr(state, "forget_bad_step", lambda run: None)
    model = ModelConfig(dim=16, depth=2, mixer=mixer)
    train(model, config(optimizer=optimizer, accumulate=2), corpus, tmp_path / "run", reporter=Save())
    found = replay(tmp_path / "run", CPU)
    entry = runs[0].log.entries[4]
    assert (found.trace.loss, found.trace.grad_norm) == (entry["loss"], entry["grad_norm"])
    assert found.trace.first is None and not found.repeats
    assert found.meta["seed"] == 0 and found.meta["step"] == 4
    assert torch.equal(load_tensors(tmp_path / "run" / state.BAD_STEP)[0]["batch"], torch.from_numpy(batch))


def test_a_run_that_diverges_can_be_replayed(corpus, tmp_path):
    mixer = E88Config(n_heads=2, n_state=16, linear_state=True)
    c = config(300, window=64, lr=10.0, clip=0.0, warmup=0.0, weight_decay=10.0)
    record = train(ModelConfig(dim=32, depth=2, mixer=mixer), c, corpus, tmp_path / "run")
    assert record["status"] == "diverged"
    found = replay(tmp_path / "run", CPU)
    assert found.repeats and found.meta["step"] == record["results"]["diverged_step"]
    assert found.trace.first is not None and str(found.trace.first) in record["reason"]
    rows = found.rows()
    assert [row["layer"] for row in rows] == ["embedding", "blocks.0", "blocks.1", "norm"]
    assert not rows[-1]["output"].finite or not all(row.get("grad_norm", 0) < 1e30 for row in rows)


def test_weights_that_overflowed_do_not_replace_a_good_checkpoint(corpus, tiny, tmp_path, runs):
    good = []

    class Poison:
        def step(self, entry, used, seconds_left):
            if entry["step"] == 3:
                good.append((tmp_path / "run" / state.CHECKPOINT).read_bytes())
                nan_weight(runs[0].model)

    c = config(checkpoint_every=1e-6)
    assert train(tiny, c, corpus, tmp_path / "run", reporter=Poison())["status"] == "diverged"
    assert (tmp_path / "run" / state.CHECKPOINT).read_bytes() == good[0]
    found = replay(tmp_path / "run", CPU)
    assert found.trace.first.name.startswith("the weight blocks.1.mixer.o_proj.weight")
    # Going on from the last good checkpoint gets past the step, and leaves no bad one behind.
    record = train(tiny, dataclasses.replace(c, checkpoint_every=0.0), corpus, tmp_path / "run", resume=True)
    assert record["status"] == "done" and not (tmp_path / "run" / state.BAD_STEP).exists()


def decay_without_bound(model):
    """Weights that are not finite, of which nothing shows in a score."""
    model.blocks[1].mixer.dt_bias.data[0] = -float("inf")


def loud_score(model):
    """A score that is not finite, of weights that are."""
    nll = model.nll
    model.nll = lambda windows: nll(windows) if model.training else nll(windows) * float("nan")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (nan_weight, "weights are not finite: .* the weight blocks.1.mixer.o_proj.weight"),
        (decay_without_bound, "weights are not finite: .* the weight blocks.1.mixer.dt_bias"),
        (loud_score, "held-out score is not finite: .* every tensor of the step is finite"),
    ],
)
def test_a_run_whose_last_update_overflows_diverges(change, named, corpus, tiny, tmp_path, runs):
    class Poison:
        def step(self, entry, used, seconds_left):
            if entry["step"] == 8:
                change(runs[0].model)

    record = train(tiny, config(), corpus, tmp_path / "run", reporter=Poison())
    assert record["status"] == "diverged" and re.search(named, record["reason"])
    assert record["results"]["diverged_step"] == 8 and record["results"]["heldout_bpb"] is None
    found = replay(tmp_path / "run", CPU)
    assert found.repeats and found.meta["step"] == 8


def test_a_record_holds_no_number_that_json_has_not(corpus, tiny, tmp_path, runs):
    class Poison:
        def step(self, entry, used, seconds_left):
            if entry["step"] == 3:
                nan_weight(runs[0].model)

    def refuse(name):
        raise AssertionError(name)

    seen = []
    train(
        tiny, config(eval_points=7), corpus, tmp_path, reporter=Poison(), on_evaluation=lambda p, _: seen.append(p)
    )  # fmt: skip
    record = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert record["status"] == "diverged" and record["heldout_curve"] == seen
    assert [point["step"] for point in seen] == [1, 2]


def test_what_cannot_be_replayed_is_one_line(corpus, tiny, tmp_path):
    train(tiny, config(1), corpus, tmp_path / "run")
    for path, message in (
        (tmp_path / "run", "holds no bad_step"),
        (tmp_path / "nowhere", "no file"),
        (tmp_path / "run" / state.CHECKPOINT, "not a bad step"),
        (tmp_path / "run" / state.LOG, "not a readable"),
    ):
        with pytest.raises(UserError, match=message):
            replay(path, CPU)
