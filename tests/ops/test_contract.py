"""Checks, the choice of a backend, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from operands import operands

from e88.errors import UserError
from e88.ops import available_backends, backends, contract, record_backends, tanh_delta_rule, tanh_delta_rule_step
from e88.ops.backends import Backend
from e88.ops.contract import Problem

GOOD = operands(B=2, T=4, H=3, K=5, V=6, dtype=torch.float32)


def call(**changes):
    arguments = {"q": GOOD.q, "k": GOOD.k, "v": GOOD.v, "g": GOOD.g, "beta": GOOD.beta} | changes
    return tanh_delta_rule(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": GOOD.v[0]}, r"v must be \[B, T, H, V\], got \[4, 3, 6\]"),
        ({"k": GOOD.k[:, :3]}, "k must be"),
        ({"q": GOOD.q[..., :4]}, "q must have the shape of k"),
        ({"g": GOOD.g[..., None]}, "g must be"),
        ({"beta": GOOD.beta[:1]}, "beta must be"),
        ({"q": GOOD.q.double()}, "q is torch.float64 but v is torch.float32"),
        ({"v": GOOD.v.long()}, "v is torch.int64; cast"),
        ({"g": GOOD.g.long()}, "g is torch.int64; cast"),
        ({"k": GOOD.k.to("meta")}, "k is on meta but v is on cpu"),
        ({"q": GOOD.q[..., :0], "k": GOOD.k[..., :0]}, "K must be 1 to 256, got 0"),
        ({"v": torch.zeros(2, 4, 3, 257)}, "V must be 1 to 256, got 257"),
        ({"initial_state": GOOD.initial_state[:1]}, r"initial_state must be \[N, H, K, V\] = \[2, 3, 5, 6\]"),
        ({"initial_state": GOOD.initial_state.long()}, "initial_state is torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens needs packed rows with B = 1"),
        ({"activation": "tahn"}, "unknown activation 'tahn'; did you mean tanh?"),
        ({"backend": "nunba"}, "unknown backend 'nunba'; did you mean numba?"),
    ],
)
def test_mistakes_are_named_in_one_line(changes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ends", [[0.0, 4.0], [0], [[0, 4]], [1, 4], [0, 3], [0, 3, 2, 4], [0, 5]], ids=lambda ends: str(ends)
)
def test_malformed_boundaries(ends) -> None:
    x = operands(B=1, T=4)
    with pytest.raises(UserError, match="cu_seqlens must"):
        tanh_delta_rule(x.q, x.k, x.v, x.g, cu_seqlens=torch.tensor(ends))


def test_step_checks_its_operands() -> None:
    with pytest.raises(UserError, match="drop the time dimension"):
        tanh_delta_rule_step(GOOD.q, GOOD.k, GOOD.v, GOOD.g, state=GOOD.initial_state)
    with pytest.raises(UserError, match="state must be"):
        x = [t[:, 0] for t in (GOOD.q, GOOD.k, GOOD.v, GOOD.g)]
        tanh_delta_rule_step(*x, state=GOOD.initial_state[:, :1])


def test_final_state_only_on_request() -> None:
    assert call()[1] is None
    assert call(output_final_state=True)[1].shape == (2, 3, 5, 6)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "checkpointed"), (torch.float32, "numba"), (torch.bfloat16, "numba")],
)
def test_automatic_choice_on_the_cpu(dtype, name: str) -> None:
    x = GOOD.to(dtype)
    with record_backends() as outer:
        with record_backends() as used, warnings.catch_warnings():
            warnings.simplefilter("error")
            tanh_delta_rule(x.q, x.k, x.v, x.g)
        call(backend="reference")
    assert used == {name}
    assert outer == {name, "reference"}


def test_a_backend_that_cannot_serve_says_why() -> None:
    x = GOOD.to(torch.float64)
    with pytest.raises(UserError, match="'numba' cannot serve this call: computes in float32"):
        tanh_delta_rule(x.q, x.k, x.v, x.g, backend="numba")


def test_a_slow_fallback_is_announced_once(monkeypatch) -> None:
    rows = (Backend("fast", "nowhere", lambda problem: "no such device"), *backends.BACKENDS[-2:])
    monkeypatch.setattr(backends, "BACKENDS", rows)
    monkeypatch.setattr(backends, "_announced", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    assert [str(w.message) for w in caught] == [
        "no fast backend for this call, using the slow 'checkpointed' (fast: no such device)"
    ]


def test_a_missing_backend_is_reported_and_skipped(monkeypatch) -> None:
    numba = backends.BACKENDS[0]
    monkeypatch.setattr(backends, "BACKENDS", (numba._replace(missing=lambda: "absent"), *backends.BACKENDS[-2:]))
    assert available_backends() == {"numba": "absent", "checkpointed": None, "reference": None}
    problem = Problem(1, 1, torch.float64, "cpu", "tanh")
    assert backends.choose(problem, "auto").__name__ == "e88.ops.checkpointed"
    with pytest.raises(UserError, match="absent"):
        call(backend="numba")


def test_problem_describes_the_call() -> None:
    x = operands(lengths=(3, 0, 2), H=4, K=5, V=6, dtype=torch.float32)
    problem = contract.check(x.q, x.k, x.v, x.g, None, x.initial_state, x.cu_seqlens, "identity")
    assert problem == Problem(5, 6, torch.float32, "cpu", "identity")


def test_import_is_light() -> None:
    code = "import sys, e88.ops; print(*(m for m in ('numba', 'triton', 'transformers') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
