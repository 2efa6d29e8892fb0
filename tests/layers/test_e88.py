import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from e88.layers.e88 import E88Layer
from e88.models.config import DECAY_MODES, E88Config
from e88.ops.edges import log_decay


def layer(dim=12, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return E88Layer(dim, E88Config(**{"n_heads": 3, "n_state": 4, **options})).to(dtype)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def by_the_equations(m, x):
    """The layer as the document defines it, one token and one head at a time."""
    c, (B, T, _) = m.config, x.shape
    H, K, V = c.n_heads, c.head_k_dim, c.head_v_dim
    qkv = x @ m.qkv_proj.weight.T
    if c.conv:
        padded = F.pad(qkv, (0, 0, c.conv - 1, 0))
        w = m.qkv_conv.weight[:, 0]
        qkv = sum(padded[:, i : i + T] * w[:, i] for i in range(c.conv))
    qkv = qkv * torch.sigmoid(qkv)
    out = torch.zeros(B, T, H * V, dtype=x.dtype)
    for b, h in itertools.product(range(B), range(H)):
        S = torch.zeros(K, V, dtype=x.dtype)
        for t in range(T):
            row = qkv[b, t]
            q, k = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            v = k if c.tie_kv else row[2 * H * K + h * V : 2 * H * K + (h + 1) * V]
            q, k = (z / torch.sqrt(z @ z + 1e-6) for z in (q, k))
            if c.decay == "mamba":
                a = x[b, t] @ m.a_proj.weight[h] + m.dt_bias[h]
                d = torch.exp(-torch.exp(m.A_log[h]) * torch.log1p(torch.exp(a)))
            elif c.decay == "sigmoid":
                d = torch.sigmoid(x[b, t] @ m.a_proj.weight[h] + m.dt_bias[h])
            else:
                d = torch.sigmoid(m.decay_logit[h]) if c.decay == "constant" else torch.ones((), dtype=x.dtype)
            beta = torch.sigmoid(x[b, t] @ m.b_proj.weight[h]) if c.write_gate else 1.0
            S = d * S + beta * torch.outer(k, v - S.T @ k)
            S = S if c.linear_state else torch.tanh(S)
            y = S.T @ q
            if c.head_norm:
                y = y / torch.sqrt((y * y).mean() + m.o_norm.eps) * m.o_norm.weight
            out[b, t, h * V : (h + 1) * V] = y
    if c.gate:
        out = out * F.silu(x @ m.g_proj.weight.T)
    return out @ m.o_proj.weight.T


OPTIONS = [
    {},
    *({"decay": mode} for mode in DECAY_MODES),
    {"gate": True},
    {"conv": 4},
    {"head_norm": True},
    {"write_gate": True},
    {"tie_kv": True},
    {"linear_state": True},
    {"expand_v": 1.5},
    {"gate": True, "conv": 3, "head_norm": True, "write_gate": True, "expand_v": 2.0, "decay": "sigmoid"},
    {"tie_kv": True, "conv": 2, "gate": True, "decay": "constant"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_is_what_the_document_says(options):
    m = layer(**options)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert error(m(x)[0], by_the_equations(m, x)) < 1e-10


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_stepping_and_splitting_equal_the_parallel_pass(options):
    m = layer(**options)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    whole, final = m(x, return_state=True)
    state = m.init_state(2)
    steps = []
    for t in range(9):
        y, state = m.step(x[:, t], state)
        steps.append(y)
    assert error(torch.stack(steps, 1), whole) < 1e-10
    first, state2 = m(x[:, :4], return_state=True)
    second, state2 = m(x[:, 4:], state2, return_state=True)
    assert error(torch.cat([first, second], 1), whole) < 1e-10
    for name in final:
        assert error(state[name], final[name]) < 1e-10
        assert error(state2[name], final[name]) < 1e-10


@settings(max_examples=20)
@given(
    heads=st.integers(1, 5),
    n_state=st.integers(1, 9),
    dim=st.integers(1, 20),
    length=st.integers(1, 12),
    decay=st.sampled_from(DECAY_MODES),
)
def test_the_decay_is_never_above_one_and_the_output_is_causal(heads, n_state, dim, length, decay):
    m = layer(dim, n_heads=heads, n_state=n_state, decay=decay, gate=True, conv=4)
    x = torch.randn(1, length, dim, dtype=torch.float64)
    assert log_decay(*m.decay(x, m.a_proj and m.a_proj(x))).shape == (1, length, heads)
    assert (log_decay(*m.decay(x, m.a_proj and m.a_proj(x))) <= 0).all()
    cut = length // 2
    changed = x.clone()
    changed[:, cut:] += 1
    assert torch.equal(m(x)[0][:, :cut], m(changed)[0][:, :cut])


@pytest.mark.parametrize(("low", "high"), [(1, 16), (0.1, 1.6)])
def test_initial_decays_span_the_documented_range(low, high):
    m = layer(n_heads=4096, n_state=1, a_low=low, a_high=high)
    x = torch.zeros(1, 1, 12, dtype=torch.float64)
    dt = -log_decay(*m.decay(x, m.a_proj and m.a_proj(x))).flatten() / m.A_log.exp()
    assert 1e-3 * 0.999 <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.1 * 1.001
    a = m.A_log.exp() / low
    assert 0.999 <= a.min() < 1.1 and 15.9 < a.max() <= 16.001


def test_parameters_that_must_not_decay_are_marked():
    m = layer(head_norm=True)
    for parameter in (m.A_log, m.dt_bias, m.o_norm.weight):
        assert parameter._no_weight_decay
    assert not hasattr(m.qkv_proj.weight, "_no_weight_decay")


def test_float32_layer_runs_on_the_numba_backend_and_agrees_with_float64():
    from e88.ops import record_backends

    m = layer(gate=True, conv=4)
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    want = m(x)[0]
    with record_backends() as used:
        got = m.float()(x.float())[0]
    assert used == {"numba"}
    assert error(got.double(), want) < 1e-5
