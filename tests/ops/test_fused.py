"""The operator from raw projections: what it computes, what it refuses, and that it compiles as one graph."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from operands import assert_close, operands
from projections import SHAPES, Projections, projections

from e88.errors import UserError
from e88.ops import fused_tanh_delta_rule, record_backends, tanh_delta_rule


def by_the_equations(x: Projections) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, written with none of the package's parts but the recurrence itself."""
    H, K, V = x.sizes
    u = x.qkv * torch.sigmoid(x.qkv)
    q, k = (u[..., n * H * K : (n + 1) * H * K].reshape(*u.shape[:2], H, K) for n in range(2))
    v = k if x.tied else u[..., 2 * H * K :].reshape(*u.shape[:2], H, V)
    q, k = (row / torch.sqrt((row * row).sum(-1, keepdim=True) + 1e-6) for row in (q, k))
    g = x.a if x.A_log is None else -torch.exp(x.A_log) * torch.log1p(torch.exp(x.a + x.dt_bias))
    beta = None if x.b is None else 1 / (1 + torch.exp(-x.b))
    y, state = tanh_delta_rule(
        q, k, v, g, beta, initial_state=x.initial_state, output_final_state=True, cu_seqlens=x.cu_seqlens,
        activation=x.activation, backend="reference",
    )  # fmt: skip
    y = y.flatten(2)
    return (y if x.gate is None else y * x.gate * torch.sigmoid(x.gate)), state


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "checkpointed"])
def test_every_value_and_gradient_is_that_of_the_definition(options: dict, backend: str) -> None:
    x = projections(**options)
    assert_close(x.results(backend), x.results_of(by_the_equations), 1e-11)


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_float32_on_the_cpu_agrees_with_float64(options: dict) -> None:
    x = projections(**options)
    with record_backends() as used:
        actual = x.to(torch.float32).results("auto")
    assert used == {"numba"}
    assert_close(actual, x.to(torch.float32).to(torch.float64).results("reference"), 2e-5)


def test_half_precision_keeps_its_dtype() -> None:
    x = projections(2, 9, 3, 8, 8, gate=True).to(torch.bfloat16)
    y, state = x.run("auto")
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


X = projections(2, 4, 3, 5, 5, gate=True, b=True, state=True, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": X.qkv[0]}, r"qkv must be \[B, T, H\*\(2K\+V\)\], got"),
        ({"qkv": X.qkv[..., :-1]}, "qkv must have 45 channels for H, K, V = 3, 5, 5, or 30 with tied k and v, got 44"),
        ({"head_v_dim": 6}, "qkv must have 48 channels for H, K, V = 3, 5, 6, got 45"),
        ({"n_heads": 0}, "n_heads must be at least 1"),
        ({"head_k_dim": 257}, "K must be 1 to 256, got 257"),
        ({"qkv": X.qkv.long()}, "qkv is torch.int64; cast"),
        ({"dt_bias": None}, "A_log and dt_bias go together"),
        ({"A_log": X.A_log[:2]}, r"A_log must be \[H\] = \[3\], got \[2\]"),
        ({"a": X.a[:, :3]}, r"a must be \[B, T, H\] = \[2, 4, 3\], got \[2, 3, 3\]"),
        ({"a": X.a.long()}, "a is torch.int64; cast"),
        ({"b": X.b[..., None]}, "b must be"),
        ({"gate": X.gate[..., :5]}, r"gate must be \[B, T, H\*V\] = \[2, 4, 15\]"),
        ({"gate": X.gate.double()}, "gate is torch.float64 but qkv is torch.float32"),
        ({"gate": X.gate.to("meta")}, "gate is on meta but qkv is on cpu"),
        ({"initial_state": X.initial_state[:1]}, r"initial_state must be \[N, H, K, V\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens needs packed rows"),
        ({"activation": "relu"}, "unknown activation"),
        ({"backend": "nunba"}, "did you mean numba"),
    ],
)
def test_mistakes_are_named_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fused_tanh_delta_rule(**(X.arguments() | changes))
    assert "\n" not in str(caught.value)


def test_final_state_only_on_request() -> None:
    assert fused_tanh_delta_rule(**(X.arguments() | {"output_final_state": False}))[1] is None


@pytest.mark.parametrize("backend", ["reference", "checkpointed", "auto"])
def test_one_graph_for_every_length_and_size(backend: str) -> None:
    def fused(qkv: torch.Tensor, a: torch.Tensor, gate: torch.Tensor, vector: torch.Tensor, K: int) -> torch.Tensor:
        sizes = {"n_heads": 2, "head_k_dim": K, "head_v_dim": 3}
        y, _ = fused_tanh_delta_rule(qkv, a, vector, vector, b=a, gate=gate, backend=backend, **sizes)
        return y.square().sum()

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return tanh_delta_rule(q, k, v, g, backend=backend)[0].square().sum()

    torch.compiler.reset()
    with record_backends() as used:
        graphs = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (fused, plain)]
        for T, K in ((3, 4), (5, 4), (5, 6)):
            x = projections(2, T, 2, K, 3, gate=True)
            leaves = [z.detach().requires_grad_() for z in (x.qkv, x.a, x.gate, x.A_log)]
            o = operands(2, T, 2, K, 3)
            others = [z.detach().requires_grad_() for z in (o.q, o.k, o.v, o.g)]
            for f, graph, inputs, rest in ((fused, graphs[0], leaves, (K,)), (plain, graphs[1], others, ())):
                expected = torch.autograd.grad(f(*inputs, *rest), inputs)
                for ours, theirs in zip(torch.autograd.grad(graph(*inputs, *rest), inputs), expected, strict=True):
                    assert torch.equal(ours, theirs)
    assert used == {"checkpointed" if backend == "auto" else backend}


def test_what_ran_is_recorded_while_tracing() -> None:
    x = projections(1, 3, 2, 4, 3)
    torch.compiler.reset()
    graph = torch.compile(lambda qkv: F.relu(x.run("reference", qkv=qkv)[0]), fullgraph=True, backend="aot_eager")
    with record_backends() as used, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        graph(x.qkv)
    assert used == {"reference"}
