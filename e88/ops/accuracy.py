"""Is a backend right on this machine? Its output, final state and every gradient against float64, at given shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from e88.ops import tanh_delta_rule

# Largest relative error allowed, per tensor.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
NAMES = ("y", "final_state", "dq", "dk", "dv", "dg", "dbeta")


class Shape(NamedTuple):
    """B batch rows, T steps, H heads, K key rows of the state, V value columns."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in zip(self._fields, self, strict=True))


class Inputs(NamedTuple):
    """q, k, v, g, beta (where there is a write gate), and the cotangents of the output and the final state."""

    operands: tuple[Tensor, ...]
    dy: Tensor
    d_final: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        operands = tuple(x.detach().to(dtype).requires_grad_() for x in self.operands)
        return Inputs(operands, self.dy.to(dtype), self.d_final.to(dtype))


def draw(shape: Shape, device: str | torch.device, dtype: torch.dtype, gate: bool = True) -> Inputs:
    """Random inputs: unit keys and queries, decays from 0.7 to 1, some states saturated."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    B, T, H, K, V = shape
    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    operands = (q, k, normal(B, T, H, V), -0.1 * normal(B, T, H).abs(), normal(B, T, H).sigmoid())
    return Inputs(operands if gate else operands[:4], normal(B, T, H, V), normal(B, H, K, V)).to(dtype)


def results(inputs: Inputs, backend: str) -> list[Tensor]:
    """Output, final state, and the gradients of every operand, in the order of NAMES."""
    y, final_state = tanh_delta_rule(*inputs.operands, output_final_state=True, backend=backend)
    assert final_state is not None
    gradients = torch.autograd.grad((y, final_state), inputs.operands, (inputs.dy, inputs.d_final.to(final_state)))
    return [y, final_state, *gradients]


def relative_errors(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """||actual - expected|| / ||expected|| of each tensor, and ||actual|| where zero is expected (the decay's gradient
    at T = 1, say); not a number where actual is not finite."""
    errors = {}
    for name, a, b in zip(NAMES[: len(expected)], actual, expected, strict=True):
        norm = float(b.detach().double().norm())
        errors[name] = float((a.detach().double() - b.detach().double()).norm()) / (norm or 1.0)
    return errors


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """The tensor with the largest error, and that error; not a number is larger than all, which `max` would pass by."""
    return max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def check(
    shape: Shape, device: str | torch.device, dtype: torch.dtype, backend: str = "auto", *, gate: bool = True
) -> dict[str, float]:
    """The relative errors of a backend at a shape; UserError where it cannot serve it. y is the worse of a call with
    gradients and one without, which may run another kernel."""
    inputs = draw(shape, device, dtype, gate)
    expected = results(inputs.to(torch.float64), "checkpointed")
    errors = relative_errors(results(inputs, backend), expected)
    with torch.no_grad():
        y, _ = tanh_delta_rule(*inputs.operands, backend=backend)
    alone = relative_errors([y], expected[:1])["y"]
    return errors | {"y": worst({"with gradients": errors["y"], "without": alone})[1]}
