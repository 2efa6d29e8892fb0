import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e88.errors import UserError
from e88.models.config import (
    AttentionConfig,
    E88Config,
    GatedDeltaNetConfig,
    Mamba2Config,
    ModelConfig,
)
from e88.models.lm import LanguageModel

MIXERS = [
    E88Config(n_heads=3, n_state=4, gate=True, conv=4),
    GatedDeltaNetConfig(n_heads=2, head_dim=8),
    Mamba2Config(d_state=8, head_dim=8, chunk=4),
    AttentionConfig(n_heads=4),
]


def model(mixer, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**{"dim": 16, "depth": 2, "mixer": mixer, "mlp_hidden": 24, **options})).to(dtype)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda c: c.kind)
def test_teacher_forced_stepping_equals_the_parallel_pass(mixer):
    m = model(mixer)
    tokens = torch.randint(256, (2, 11))
    whole = m(tokens)
    state = m.init_state(2)
    logits = []
    for t in range(11):
        out, state = m.step(tokens[:, t], state)
        logits.append(out)
    assert error(torch.stack(logits, 1), whole) < 1e-9
    last, reached = m.prefill(tokens[:, :6])
    assert error(last, whole[:, 5]) < 1e-9
    assert error(m(tokens[:, 6:], reached), whole[:, 6:]) < 1e-9


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda c: c.kind)
def test_a_new_state_is_where_the_model_is(mixer):
    state = model(mixer).to("meta").init_state(2)
    assert {tensor.device.type for part in state for tensor in part.values()} == {"meta"}


def test_a_wide_model_begins_with_an_even_guess_where_a_gain_sees_to_it():
    """With a tied head and a small update of the stream it begins by predicting its own input."""
    mixer = E88Config(n_heads=32, n_state=32, gate=True, conv=4)
    windows = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))

    def first_loss(**gains: float) -> float:
        return model(mixer, torch.float32, dim=1024, mlp_hidden=0, **gains).nll(windows).mean().item()

    assert first_loss() > math.log(256) + 3
    assert first_loss(output_gain=0.0) < math.log(256) + 0.5 and first_loss(branch_gain=8.0) < math.log(256) + 1
    assert model(mixer, dim=256, output_gain=0.0).norm.weight.eq(1).all()


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda c: c.kind)
def test_a_branch_gain_scales_what_branches_add_and_nothing_else(mixer):
    one, four = (dict(model(mixer, branch_gain=gain).named_parameters()) for gain in (1.0, 4.0))
    scaled = {name for name in one if not torch.equal(one[name], four[name])}
    assert all(torch.equal(four[name], one[name] * 4) for name in scaled)
    last = "out_proj" if mixer.kind == "mamba2" else "o_proj"
    assert scaled == {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in (f"mixer.{last}", "mlp.down_proj")}


def test_runs_keep_their_ids_where_an_option_is_off():
    config = ModelConfig(dim=16, depth=1, mixer=MIXERS[0])
    assert "branch_gain" not in config.to_dict()
    plain, normed = (AttentionConfig(n_heads=2, qk_norm=on) for on in (False, True))
    for place in ({"mixer": plain}, {"mixer": MIXERS[0], "hybrid": plain, "hybrid_every": 2}):
        assert not re.search("qk_norm|a_low|a_high", str(ModelConfig(dim=16, depth=2, **place).to_dict()))
    config = ModelConfig(dim=16, depth=2, mixer=MIXERS[0], hybrid=normed, hybrid_every=2)
    other = ModelConfig(dim=16, depth=1, mixer=replace(MIXERS[0], a_low=0.5), branch_gain=2.0)
    assert ModelConfig.from_dict(other.to_dict()) == other and ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda c: c.kind)
def test_nll_is_the_cross_entropy_of_the_next_token(mixer):
    m = model(mixer)
    windows = torch.randint(256, (3, 8))
    log_p = m(windows[:, :-1]).log_softmax(-1)
    want = -log_p.gather(-1, windows[:, 1:, None]).squeeze(-1)
    assert error(m.nll(windows).double(), want) < 1e-6


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda c: c.kind)
def test_windows_that_go_on_from_a_state_are_the_long_one_in_pieces(mixer):
    m = model(mixer)
    windows = torch.randint(256, (2, 25))
    whole, state, pieces = m.nll(windows), None, []
    for start in (0, 8, 16):
        nll, state = m.nll_from(windows[:, start : start + 9], state)
        pieces.append(nll)
    assert error(torch.cat(pieces, 1).double(), whole.double()) < 1e-6
    # Where the state is no constant, so is the gradient.
    parameters = list(m.parameters())
    for a, b in zip(*(torch.autograd.grad(x.sum(), parameters) for x in (torch.cat(pieces, 1), whole)), strict=True):
        assert error(a, b) < 1e-5


def test_the_residual_stream_stays_float32_under_bf16_autocast():
    m = model(MIXERS[0], dtype=torch.float32)
    seen = []
    m.norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = m.nll(torch.randint(256, (2, 9))).mean()
    loss.backward()
    assert seen == [torch.float32]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in m.parameters())


def test_every_parameter_gets_a_gradient():
    for mixer in MIXERS:
        m = model(mixer)
        m.nll(torch.randint(256, (2, 9))).mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters()), mixer.kind


@settings(max_examples=30)
@given(
    n_heads=st.integers(1, 200),
    n_state=st.integers(1, 256),
    gate=st.booleans(),
    conv=st.sampled_from([0, 2, 4, 8]),
    dim=st.integers(1, 9000),
    depth=st.integers(1, 100),
)
def test_configurations_survive_a_round_trip(n_heads, n_state, gate, conv, dim, depth):
    mixer = E88Config(n_heads=n_heads, n_state=n_state, gate=gate, conv=conv)
    config = ModelConfig(dim=dim, depth=depth, mixer=mixer)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimm": 4}, "did you mean dim"),
        ({"dim": 0}, "dim must be a positive integer"),
        ({"dim": "16"}, "must be of type int"),
        ({"depth": True}, "must be of type int"),
        ({"mixer": {"n_heads": 2}}, "needs a kind"),
        ({"mixer": {"kind": "e89", "n_heads": 2}}, "did you mean e88"),
        ({"mixer": {"kind": "e88"}}, "missing n_heads"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "n_sate": 4}}, "did you mean n_state"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "n_state": 257}}, "above 256"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "decay": "slow"}}, "is not one of mamba"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "n_state": 3, "expand_v": 1.5}}, "whole number"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "tie_kv": True, "expand_v": 2.0}}, "tie_kv"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "a_low": 2, "a_high": 1.5}}, "0 < low <= high"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "a_low": 0}}, "0 < low <= high"),
        ({"mixer": {"kind": "e88", "n_heads": 2, "a_high": 4, "decay": "none"}}, "has no A"),
        ({"mixer": {"kind": "attention", "n_heads": 3}}, "change n_heads"),
        ({"mixer": {"kind": "mamba2", "head_dim": 24}}, "not a multiple of head_dim"),
    ],
)
def test_impossible_configurations_are_one_line_errors(change, message):
    base = {"dim": 16, "depth": 2, "mixer": {"kind": "e88", "n_heads": 2}}
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict({**base, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_model_compiles_without_a_graph_break(device):
    mixer = E88Config(n_heads=2, n_state=16, gate=True)
    m = model(mixer, dtype=torch.float32, dim=32).to(device)
    if device == "cpu":
        m.set_backend("checkpointed")
    windows = torch.randint(256, (2, 20), device=device)

    def gradients(nll):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = nll(windows).mean()
        return [loss, *torch.autograd.grad(loss, list(m.parameters()))]

    got = gradients(torch.compile(m.nll, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, gradients(m.nll), strict=True):
        assert error(a, b) < (1e-5 if device == "cpu" else 2e-2)
