"""The eager loop is the definition: its gradients are right, and it does what the formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from operands import operands

from e88.ops import tanh_delta_rule, tanh_delta_rule_step


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_gradients_match_finite_differences(activation: str) -> None:
    x = operands(B=2, T=3, H=2, K=3, V=2, activation=activation)
    inputs = [t.requires_grad_() for t in (x.q, x.k, x.v, x.g, x.beta, x.initial_state)]

    def run(q, k, v, g, beta, state):
        return tanh_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            output_final_state=True,
            activation=activation,
            backend="reference",
        )

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_matches_the_recurrence_written_with_scalars() -> None:
    x = operands(B=1, T=4, H=1, K=2, V=2)
    state = x.initial_state[0, 0].tolist()
    for t in range(4):
        q, k, v = (tensor[0, t, 0].tolist() for tensor in (x.q, x.k, x.v))
        d, b = math.exp(x.g[0, t, 0]), float(x.beta[0, t, 0])
        e = [v[j] - sum(state[i][j] * k[i] for i in range(2)) for j in range(2)]
        state = [[math.tanh(d * state[i][j] + b * k[i] * e[j]) for j in range(2)] for i in range(2)]
        y = [sum(state[i][j] * q[i] for i in range(2)) for j in range(2)]
        expected = torch.tensor(y, dtype=torch.float64)
        actual = tanh_delta_rule(x.q, x.k, x.v, x.g, x.beta, initial_state=x.initial_state, backend="reference")[0]
        torch.testing.assert_close(actual[0, t, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "checkpointed", "numba"])
@pytest.mark.parametrize("gate", [True, False])
def test_steps_equal_the_parallel_pass(backend: str, gate: bool) -> None:
    dtype = torch.float32 if backend == "numba" else torch.float64
    x = operands(B=3, T=7, H=3, K=5, V=18, gate=gate, dtype=dtype)
    y, final_state = tanh_delta_rule(
        x.q,
        x.k,
        x.v,
        x.g,
        x.beta,
        initial_state=x.initial_state,
        output_final_state=True,
        backend=backend,
    )
    state = x.initial_state.clone()
    for t in range(7):
        before = state.clone()
        beta = None if x.beta is None else x.beta[:, t]
        y_t, new_state = tanh_delta_rule_step(
            x.q[:, t], x.k[:, t], x.v[:, t], x.g[:, t], beta, state=state, backend=backend
        )
        assert torch.equal(state, before)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-6, atol=1e-6)
        state = new_state
    torch.testing.assert_close(state, final_state, rtol=1e-6, atol=1e-6)


def test_step_is_differentiable() -> None:
    x = operands(B=2, T=1, H=2, K=3, V=4)
    inputs = [x.q[:, 0], x.k[:, 0], x.v[:, 0], x.g[:, 0], x.beta[:, 0], x.initial_state]
    inputs = [t.detach().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *a: tanh_delta_rule_step(*a[:5], state=a[5]), inputs)
