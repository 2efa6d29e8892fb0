"""What every mixer promises, on all three rivals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e88.layers.mixer import build_mixer
from e88.models.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config

DIM = 12
CONFIGS = {
    "gdn": GatedDeltaNetConfig(n_heads=2, head_dim=4, expand_v=2.0),
    "gdn-bare": GatedDeltaNetConfig(n_heads=3, head_dim=5, conv=0, gate=False),
    "mamba2": Mamba2Config(d_state=5, head_dim=4, conv=3, chunk=8),
    "mamba2-groups": Mamba2Config(d_state=4, head_dim=6, n_groups=2),
    "attention": AttentionConfig(n_heads=3),
    "attention-norm": AttentionConfig(n_heads=2, qk_norm=True),
}
RECURRENT = [name for name in CONFIGS if not name.startswith("attention")]
each = pytest.mark.parametrize("name", CONFIGS)


def mixer(name, dtype=torch.float64):
    torch.manual_seed(0)
    return build_mixer(DIM, CONFIGS[name]).to(dtype)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@each
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 24), min_size=2, max_size=4), batch=st.integers(1, 3))
def test_pieces_with_carried_state_equal_the_whole(name, lengths, batch):
    net = mixer(name)
    x = torch.randn(batch, sum(lengths), DIM, dtype=torch.float64, requires_grad=True)
    whole, last = net(x, return_state=True)
    state, pieces = None, []
    for piece in x.split(lengths, dim=1):
        y, state = net(piece, state, return_state=True)
        pieces.append(y)
    close(torch.cat(pieces, 1), whole)
    assert state.keys() == last.keys() == net.init_state(batch).keys()
    for key, value in state.items():
        close(value, last[key])
    upstream = torch.randn_like(whole)
    (a,), (b,) = (torch.autograd.grad(y, x, upstream) for y in (torch.cat(pieces, 1), whole))
    close(a, b)


@each
@torch.no_grad()
def test_steps_equal_the_parallel_pass(name):
    net = mixer(name)
    x = torch.randn(2, 37, DIM, dtype=torch.float64)
    whole, last = net(x, return_state=True)
    state = net.init_state(2)
    for t in range(x.shape[1]):
        y, state = net.step(x[:, t], state)
        close(y, whole[:, t])
    for key, value in state.items():
        close(value, last[key])


@each
def test_steps_can_follow_a_prompt_and_a_prompt_can_follow_steps(name):
    net = mixer(name)
    x = torch.randn(2, 20, DIM, dtype=torch.float64)
    whole, _ = net(x)
    _, state = net(x[:, :11], return_state=True)
    y, state = net.step(x[:, 11], state)
    close(y, whole[:, 11])
    close(net(x[:, 12:], state)[0], whole[:, 12:])


@each
@settings(max_examples=10)
@given(t=st.integers(0, 39))
def test_the_future_leaves_the_past_alone(name, t):
    net = mixer(name)
    x = torch.randn(1, 40, DIM, dtype=torch.float64)
    before, _ = net(x)
    x[:, t] += 1
    after, _ = net(x)
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-13)
    assert (after[:, t] - before[:, t]).abs().max() > 1e-6


@each
def test_state_comes_only_when_asked_for(name):
    net = mixer(name)
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    y, state = net(x)
    assert state is None and y.shape == x.shape


@each
def test_every_parameter_has_a_gradient(name):
    net = mixer(name, torch.float32)
    net(torch.randn(2, 9, DIM))[0].square().sum().backward()
    for parameter, value in net.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, parameter


@each
def test_weight_decay_leaves_decays_norms_and_biases_alone(name):
    spared = {n for n, p in mixer(name).named_parameters() if getattr(p, "_no_weight_decay", False)}
    expected = {n for n, p in mixer(name).named_parameters() if p.ndim == 1}
    assert spared == expected


@pytest.mark.parametrize("name", RECURRENT)
def test_under_autocast_the_recurrence_stays_in_float32(name):
    net = mixer(name, torch.float32)
    x = torch.randn(2, 30, DIM, requires_grad=True)
    exact, _ = net(x)
    (want,) = torch.autograd.grad(exact.square().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = net(x, return_state=True)
        step, stepped = net.step(x[:, 0], net.init_state(2))
        (got,) = torch.autograd.grad(y.float().square().sum(), x)
    assert y.dtype == step.dtype == torch.bfloat16
    assert state["S"].dtype == stepped["S"].dtype == torch.float32
    # Only the layer's projections round to bf16, whose relative step is 2^-8.
    for a, b in ((y, exact), (step, exact[:, 0]), (got, want)):
        assert ((a.float() - b).norm() / b.norm()).item() < 2**-5


def test_autocast_does_not_reach_the_operators():
    from e88.baselines.gated_delta_rule import gated_delta_rule
    from e88.baselines.ssd import ssd

    torch.manual_seed(0)
    rule = [torch.randn(1, 40, 2 * 12), -torch.rand(1, 40, 2), torch.randn(1, 40, 2), torch.randn(1, 2, 4, 4)]
    scan = [torch.randn(1, 40, 2 * 4 + 10), torch.rand(1, 40, 2), -torch.rand(1, 40, 2), torch.ones(2)]
    scan.append(torch.randn(1, 2, 4, 5))
    for inputs, op in ((rule, lambda *i: gated_delta_rule(*i, k_dim=4)), (scan, lambda *i: ssd(*i))):
        grads = []
        for inside in (False, True):
            leaves = [x.clone().requires_grad_() for x in inputs]
            y, _ = op(*leaves)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                grads.append(torch.autograd.grad(y.sum(), leaves))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
