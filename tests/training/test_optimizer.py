import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e88.errors import UserError
from e88.models.config import E88Config, Mamba2Config, ModelConfig
from e88.models.lm import LanguageModel
from e88.training.config import OPTIMIZERS, Budget, TrainingConfig
from e88.training.optimizer import Optimizer, lr_factor, split_parameters


def config(**options):
    return TrainingConfig(**{"budget": Budget(steps=10), **options})


@pytest.mark.parametrize(
    "mixer", [E88Config(n_heads=2, n_state=8, conv=4, head_norm=True), Mamba2Config(d_state=8, head_dim=8)]
)
def test_weight_decay_leaves_norms_and_decay_parameters_alone(mixer):
    model = LanguageModel(ModelConfig(dim=16, depth=2, mixer=mixer))
    optimizer = Optimizer(model, config(weight_decay=0.5, lr=0.1, warmup=0.0))
    free = {id(p) for group in optimizer.parts[0].param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        special = name.endswith(("A_log", "dt_bias", "norm.weight", ".D", "bias"))
        assert (id(parameter) in free) == (special or "conv" in name), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_used(0.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (id(parameter) not in free), name


def test_every_parameter_is_in_exactly_one_group():
    model = LanguageModel(ModelConfig(dim=16, depth=2, mixer=E88Config(n_heads=2, n_state=8), mlp_hidden=8))
    for kind in OPTIMIZERS:
        parts = Optimizer(model, config(optimizer=kind)).parts
        ids = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
    matrices, decayed, _ = split_parameters(model)
    assert all(p.ndim == 2 for p in matrices) and len(decayed) == 1


@given(used=st.floats(0, 1.2), schedule=st.sampled_from(["cosine", "linear", "constant"]), warmup=st.floats(0, 0.9))
def test_the_schedule_stays_between_zero_and_the_peak(used, schedule, warmup):
    c = config(schedule=schedule, warmup=warmup, final_lr=0.1)
    factor = lr_factor(c, used)
    assert 0 < factor <= 1
    if used >= 1 and schedule != "constant":
        assert factor == pytest.approx(0.1)


def test_warm_up_then_fall():
    c = config(warmup=0.1, final_lr=0.0)
    factors = [lr_factor(c, used / 100) for used in range(101)]
    top = factors.index(max(factors))
    assert top == 10
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_looking_at_averaged_weights_changes_nothing(kind):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim=16, depth=1, mixer=E88Config(n_heads=2, n_state=8)))
    optimizer = Optimizer(model, config(optimizer=kind, warmup=0.0, lr=1e-2))
    for _ in range(3):
        model.nll(torch.randint(256, (2, 9))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.averaged(model) as trained:
        differs = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert differs == (kind == "schedulefree") == bool(trained)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.nll(torch.randint(256, (2, 9))).mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0}, {"accumulate": 3}, {"lr": -1.0}, {"optimizer": "sgd"}, {"schedule": "step"}, {"window": 1.5},
        {"warmup": 2.0}, {"precision": "fp8"}, {"seed": -1},
    ],
)  # fmt: skip
def test_wrong_training_options_are_one_line_errors(options):
    with pytest.raises(UserError) as caught:
        config(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [{}, {"steps": 3, "seconds": 1.0}, {"seconds": 0.0}, {"tokens": -5}])
def test_a_budget_is_exactly_one_positive_number(budget):
    with pytest.raises(UserError):
        Budget(**budget)


def test_training_configurations_round_trip_and_name_unknown_keys():
    c = config(lr=1e-3, accumulate=4)
    assert TrainingConfig.from_dict(c.to_dict()) == c
    with pytest.raises(UserError, match="did you mean accumulate"):
        TrainingConfig.from_dict({"budget": {"steps": 1}, "acumulate": 2})
    with pytest.raises(UserError, match="did you mean seconds"):
        TrainingConfig.from_dict({"budget": {"second": 1}})
