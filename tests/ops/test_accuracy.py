"""The check that guards every speed: it sees what is wrong, wherever it is."""

from __future__ import annotations

import math

import pytest
import torch

from e88.ops import cpu
from e88.ops.accuracy import Shape, check, worst

SHAPE = Shape(1, 9, 2, 8, 8)


@pytest.mark.parametrize("gate", [True, False])
def test_a_right_backend_passes(gate: bool) -> None:
    errors = check(SHAPE, "cpu", torch.float32, "numba", gate=gate)
    assert worst(errors)[1] <= 1e-5
    assert ("dbeta" in errors) == gate and all(value > 0 for value in errors.values())


@pytest.mark.parametrize("errors", [(0.1, math.nan, 0.2), (math.nan, 0.1), (0.1, math.nan)])
def test_not_a_number_is_the_worst(errors: tuple[float, ...]) -> None:
    name, value = worst({f"t{i}": error for i, error in enumerate(errors)})
    assert math.isnan(value) and name == f"t{[math.isnan(e) for e in errors].index(True)}"


@pytest.mark.parametrize("with_gradients", [True, False])
def test_sees_a_kernel_that_is_wrong_only_with_or_without_gradients(
    with_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpu.run

    def run(*arguments):
        y, state = right(*arguments)
        return (y * float("nan") if torch.is_grad_enabled() == with_gradients else y), state

    monkeypatch.setattr(cpu, "run", run)
    assert math.isnan(check(SHAPE, "cpu", torch.float32, "numba")["y"])
