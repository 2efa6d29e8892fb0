import math

import pytest
import torch

from e88.errors import UserError
from e88.layers.accuracy import TOLERANCE, Verdict, check, layer_errors, relative_error
from e88.layers.mixer import build_mixer
from e88.models.config import AttentionConfig, E88Config, GatedDeltaNetConfig, Mamba2Config, ModelConfig

CPU = torch.device("cpu")
MODELS = {
    "e88": ModelConfig(dim=16, depth=1, mixer=E88Config(n_heads=2, n_state=8, gate=True, conv=4)),
    "gated_deltanet": ModelConfig(dim=16, depth=1, mixer=GatedDeltaNetConfig(n_heads=2, head_dim=8)),
    "mamba2": ModelConfig(dim=16, depth=1, mixer=Mamba2Config(d_state=8, head_dim=8)),
    "attention": ModelConfig(dim=16, depth=1, mixer=AttentionConfig(n_heads=2)),
}
RIVALS = {
    "gated_deltanet": ("e88.baselines.gated_deltanet", "gated_delta_rule"),
    "mamba2": ("e88.baselines.mamba2", "ssd"),
}


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_is_right_here_and_says_what_ran(kind, windows):
    found = check(MODELS[kind], CPU, torch.float32, tune=(1, 4), windows=windows)
    assert found.ok and 0 < found.error < 1e-4
    assert found.backends == (("numba",) if kind == "e88" else ("torch",))


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_stays_far_from_what_float32_allows_and_inside_its_own(kind):
    errors, _ = layer_errors(MODELS[kind], CPU, torch.bfloat16)
    assert TOLERANCE[torch.float32] < max(errors.values()) < TOLERANCE[torch.bfloat16]


def test_every_tensor_of_the_layer_is_compared():
    errors, _ = layer_errors(MODELS["mamba2"], CPU, torch.float32)
    assert list(errors)[:2] == ["y", "dx"]
    assert {"d A_log", "d dt_bias", "d D", "d in_proj.weight", "d conv1d.weight", "d conv1d.bias"} < set(errors)


class _Skewed(torch.autograd.Function):
    """The identity, whose gradient is 5 % off: what a rounding error is not and a wrong kernel is."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.05


@pytest.mark.parametrize("kind", MODELS)
def test_a_state_that_is_lost_between_windows_is_found(kind, monkeypatch):
    mixer = build_mixer(16, MODELS[kind].mixer)
    forward = type(mixer).forward

    def forgetful(self, x, state=None, *, return_state=False):
        exact = next(self.parameters()).dtype == torch.float64
        return forward(self, x, state if exact else None, return_state=return_state)

    monkeypatch.setattr(type(mixer), "forward", forgetful)
    assert check(MODELS[kind], CPU, torch.float32).ok
    assert not check(MODELS[kind], CPU, torch.float32, windows=2).ok


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_found(kind, dtype, monkeypatch):
    module, name = RIVALS[kind]
    right = getattr(__import__(module, fromlist=[name]), name)

    def wrong(first, decay, *rest, **options):
        # Only what is not float64, the reference, is wrong.
        return right(first, decay if decay.dtype == torch.float64 else _Skewed.apply(decay), *rest, **options)

    monkeypatch.setattr(f"{module}.{name}", wrong)
    found = check(MODELS[kind], CPU, dtype)
    assert not found.ok and found.error > 0.03
    assert found.tensor in ("d A_log", "d dt_bias", "d a_proj.weight", "dx", "d in_proj.weight")


def test_not_a_number_is_not_ok():
    assert not Verdict("y", math.nan, 1.0, ()).ok
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))


def test_a_backend_that_cannot_serve_is_an_error():
    with pytest.raises(UserError, match="cannot serve"):
        check(MODELS["mamba2"], CPU, torch.float32, "mamba-ssm")


def test_a_check_leaves_the_random_numbers_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    check(MODELS["attention"], CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
