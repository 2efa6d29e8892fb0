"""One token from raw projections: equal to the parallel operator everywhere, and to float64 on the GPU."""

from __future__ import annotations

import sys
from typing import Any

import machine_code
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import assert_close
from projections import Projections, projections

from e88.errors import UserError
from e88.ops import fused_tanh_delta_rule_step, record_backends
from e88.ops.cuda import compile as kernels
from e88.ops.cuda import step as kernel

linux = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is on Linux")


def step(x: Projections, state: torch.Tensor, t: int, backend: str = "auto", **options: Any) -> tuple[Any, Any]:
    """Token t of the projections."""
    H, K, V = x.sizes
    rows = {"qkv": x.qkv[:, t], "a": x.a[:, t]}
    rows |= {"b": None if x.b is None else x.b[:, t], "gate": None if x.gate is None else x.gate[:, t]}
    vectors = {"A_log": x.A_log, "dt_bias": x.dt_bias, "state": state, "activation": x.activation, "backend": backend}
    return fused_tanh_delta_rule_step(**rows, **vectors, n_heads=H, head_k_dim=K, head_v_dim=V, **options)


@settings(max_examples=40)
@given(
    H=st.integers(1, 4), K=st.integers(1, 9), V=st.integers(1, 9), tied=st.booleans(), gate=st.booleans(),
    b=st.booleans(), decay=st.booleans(), activation=st.sampled_from(["tanh", "identity"]), seed=st.integers(0, 99),
    inplace=st.booleans(),
)  # fmt: skip
def test_steps_equal_the_parallel_operator(H, K, V, tied, gate, b, decay, activation, seed, inplace):
    shape = {"B": 2, "T": 5, "H": H, "K": K, "V": K if tied else V}
    x = projections(**shape, tied=tied, gate=gate, b=b, decay=decay, state=True, activation=activation, seed=seed)
    y, final = x.run("reference")
    state, outputs = x.initial_state.clone(), []
    for t in range(5):
        y_t, new_state = step(x, state, t, inplace=inplace)
        assert (new_state is state) == inplace
        state = new_state
        outputs.append(y_t)
    assert_close({"y": torch.stack(outputs, 1), "state": state}, {"y": y, "state": final}, 1e-12)


def test_the_given_state_is_left_as_it_is_and_gradients_reach_it():
    x = projections(2, 1, 3, 4, 5, gate=True, b=True, state=True)
    leaves = [x.qkv, x.a, x.A_log, x.b, x.gate, x.initial_state]
    for leaf in leaves:
        leaf.requires_grad_()
    before = x.initial_state.detach().clone()
    y, state = step(x, x.initial_state, 0)
    assert torch.equal(x.initial_state, before)
    assert all((g != 0).any() for g in torch.autograd.grad(y.sum() + state.square().sum(), leaves))


X = projections(2, 1, 3, 5, 5, gate=True, b=True, state=True, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", X.qkv, r"qkv must be \[B, H\*\(2K\+V\)\], got"),
        ("a", X.a[:1, 0], r"a must be \[B, H\] = \[2, 3\], got \[1, 3\]"),
        ("gate", X.gate[:, 0, :5], r"gate must be \[B, H\*V\]"),
        ("state", X.initial_state[:1], r"state must be \[N, H, K, V\]"),
        ("dt_bias", None, "A_log and dt_bias go together"),
        ("backend", "cuda", "backend 'cuda' cannot serve this call"),
    ],
)
def test_wrong_calls_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        rows = {"qkv": X.qkv[:, 0], "a": X.a[:, 0], "b": X.b[:, 0], "gate": X.gate[:, 0]}
        rest = {"A_log": X.A_log, "dt_bias": X.dt_bias, "state": X.initial_state}
        sizes = {"n_heads": 3, "head_k_dim": 5, "head_v_dim": 5}
        fused_tanh_delta_rule_step(**{**rows, **rest, **sizes, name: value})


SIZES = [(8, 8), (16, 16), (24, 40), (32, 32), (40, 24), (56, 104), (64, 64), (72, 8), (32, 128), (128, 16), (128, 128)]


@linux
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("K", "V"), SIZES)
def test_compiles_without_spills(K: int, V: int, arch: str) -> None:
    flags = {"tanh": True, "tied": K == V, "decay": True, "beta": True, "gate": True}
    defines = kernel.defines(K, V, torch.bfloat16, torch.bfloat16, **flags)
    assert machine_code.nvidia(kernels.compile_cubin("step", arch, defines)).spilled_bytes == 0


def check(dtype: torch.dtype, tolerance: float, steps: int = 3, **shape: Any) -> None:
    """Steps on the GPU from inputs rounded to `dtype` against float64 on the same numbers, in place and not."""
    x = projections(T=steps, state=True, **shape).to("cuda")
    given = x.to(dtype)
    exact = given.to(torch.float64)
    y, final = exact.run("reference")
    for inplace in (False, True):
        state, outputs = given.initial_state.float(), []
        with torch.no_grad(), record_backends() as used:
            for t in range(steps):
                y_t, state = step(given, state, t, "cuda", inplace=inplace)
                outputs.append(y_t)
        assert used == {"cuda"}
        assert_close({"y": torch.stack(outputs, 1)}, {"y": y}, tolerance)
        # 16-bit inputs take the hardware's tanh, good to 5e-4, at every step.
        assert_close({"state": state}, {"state": final}, 1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 2e-3), (torch.float32, 2e-6)])
def test_every_size(K: int, V: int, dtype: torch.dtype, tolerance: float) -> None:
    check(dtype, tolerance, B=2, H=3, K=K, V=V, gate=True, b=True, seed=K + V)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 7, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"tied": True, "gate": True}, {"decay": False, "b": True}, {"activation": "identity"}, {"zeros": True}],
    ids=str,
)
def test_every_form(B: int, options: dict) -> None:
    for H in (1, 56):
        check(torch.bfloat16, 3e-3, B=B, H=H, K=32, V=32, **options)


@pytest.mark.gpu
def test_a_state_that_lives_long_stays_exact() -> None:
    check(torch.float32, 1e-5, steps=2000, B=1, H=2, K=32, V=32, gate=True)


def test_compiles_as_one_graph_in_place_or_not(device: str = "cpu", dtype: torch.dtype = torch.float64) -> None:
    x = projections(3, 1, 4, 16, 16, state=True, gate=True).to(device).to(dtype)
    state = x.initial_state if dtype == torch.float64 else x.initial_state.float()

    @torch.no_grad()
    def run(state: torch.Tensor, inplace: bool) -> tuple[Any, Any]:
        return step(x, state, 0, inplace=inplace)

    y, expected = run(state, False)
    torch.compiler.reset()
    for inplace in (False, True):
        given = state.clone()
        got_y, got = torch.compile(run, fullgraph=True, backend="aot_eager")(given, inplace)
        assert torch.equal(got_y, y) and torch.equal(got, expected)
        assert torch.equal(given, expected if inplace else state)


@pytest.mark.gpu
def test_the_kernel_compiles_as_one_graph_in_place_or_not() -> None:
    test_compiles_as_one_graph_in_place_or_not("cuda", torch.bfloat16)


@pytest.mark.gpu
def test_a_state_of_any_layout() -> None:
    x = projections(2, 1, 3, 16, 24, state=True).to("cuda").to(torch.float32)
    y, expected = step(x, x.initial_state, 0, "cuda")
    turned = x.initial_state.mT.contiguous().mT
    shifted = torch.empty(x.initial_state.numel() + 1, device="cuda")[1:].view_as(x.initial_state).copy_(turned)
    for old in (turned, shifted):
        for inplace in (False, True):
            got_y, got = step(x, old, 0, "cuda", inplace=inplace)
            assert torch.equal(got_y, y) and torch.equal(got, expected)
        assert torch.equal(old, expected)
