"""Is a layer right on this machine? Its output and every gradient against itself in float64.

What a training step runs is checked whole: projections, convolution, recurrence, gates and norm, through whichever
backend or library serves.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from e88.layers.mixer import Mixer, build_mixer
from e88.models.config import ModelConfig
from e88.ops.backends import record_backends

# Largest relative error allowed, per tensor. In bf16 each product of the layer rounds its inputs and result, which
# weighs most where a gradient is a sum of terms that nearly cancel: for the decay of a single head, 0.02.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# More than the longest chunk of any backend, and a multiple of none.
LENGTH = 300


class Verdict(NamedTuple):
    """The tensor that is farthest from float64, by how much relative to its norm, how much is allowed, and the backends
    that ran."""

    tensor: str
    error: float
    tolerance: float
    backends: tuple[str, ...]

    @property
    def ok(self) -> bool:
        # Also false where the error is not a number.
        return self.error <= self.tolerance


def check(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, backend: str = "auto", *,
    tune: tuple[int, int] | None = None, windows: int = 1,
) -> Verdict:  # fmt: skip
    """The verdict on the model's layer, full size, through this backend.

    dtype: float32, or bfloat16 for float32 parameters under autocast. tune: batch and length of a pass before the
    check, since some libraries keep the kernels that were fastest at the first shape they met; the check is at that
    batch, since some compile for one. windows: that the sequence is cut into, each from the state that the one before
    left, as a constant. UserError where the backend cannot serve the layer.
    """
    errors, used = layer_errors(config, device, dtype, backend, tune=tune, windows=windows)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return Verdict(worst, errors[worst], TOLERANCE[dtype], tuple(sorted(used)))


def layer_errors(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, backend: str = "auto", *,
    tune: tuple[int, int] | None = None, windows: int = 1,
) -> tuple[dict[str, float], set[str]]:  # fmt: skip
    """The relative errors of the output `y`, of `dx` and of each parameter's gradient, and the backends that ran."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build_mixer(config.dim, config.mixer).to(device)
    with torch.no_grad():
        # Numbers that bf16 holds, so that only the arithmetic differs.
        for parameter in mixer.parameters():
            parameter.copy_(parameter.bfloat16())
    exact = copy.deepcopy(mixer).double()
    mixer.backend = backend

    def operands(batch: int, length: int) -> tuple[Tensor, Tensor]:
        x, upstream = (torch.randn(batch, length, config.dim, generator=generator).bfloat16() for _ in range(2))
        return x.to(device), upstream.to(device)

    with record_backends() as used:
        if tune is not None:
            _results(mixer, *operands(*tune), dtype, windows)
        x, upstream = operands(tune[0] if tune else 2, LENGTH)
        actual = _results(mixer, x, upstream, dtype, windows)
    # In eight parts, so that float64 needs no more memory than the training step to come.
    pairs = zip(x.split(-(-len(x) // 8)), upstream.split(-(-len(x) // 8)), strict=True)
    parts = [_results(exact, *pair, torch.float64, windows) for pair in pairs]
    tensors = list(zip(*parts, strict=True))
    expected = [torch.cat(rows) for rows in tensors[:2]] + [torch.stack(sums).sum(0) for sums in tensors[2:]]
    names = ["y", "dx", *(f"d {name}" for name, _ in mixer.named_parameters())]
    return {n: relative_error(a, b) for n, a, b in zip(names, actual, expected, strict=True)}, used


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, or ||actual|| where zero is expected."""
    norm = float(expected.double().norm())
    return float((actual.double() - expected.double()).norm()) / (norm or 1.0)


def _results(mixer: Mixer, x: Tensor, upstream: Tensor, dtype: torch.dtype, windows: int) -> list[Tensor]:
    half = dtype in (torch.bfloat16, torch.float16)
    x = x.to(torch.float32 if half else dtype).requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype if half else torch.bfloat16, enabled=half):
        state, outputs = None, []
        for window in x.chunk(windows, dim=1):
            y, state = mixer(window, state, return_state=windows > 1)
            state = state and {name: tensor.detach() for name, tensor in state.items()}
            outputs.append(y)
        y = torch.cat(outputs, dim=1) if windows > 1 else outputs[0]
    gradients = torch.autograd.grad(y, [x, *mixer.parameters()], upstream.to(y.dtype))
    return [y.detach(), *gradients]
