"""Random operands for the operator, and its outputs and gradients under random cotangents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from e88.ops import tanh_delta_rule

NAMES = ("y", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")


@dataclass(frozen=True)
class Operands:
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    initial_state: Tensor | None
    dy: Tensor
    d_final: Tensor
    cu_seqlens: Tensor | None = None
    activation: str = "tanh"

    def to(self, dtype: torch.dtype) -> Operands:
        changed = {name: x.to(dtype) for name, x in vars(self).items() if _floating(x)}
        return replace(self, **changed)

    def results(self, backend: str) -> dict[str, Tensor]:
        """Output, final state and the gradient of every operand."""
        operands = (self.q, self.k, self.v, self.g, self.beta, self.initial_state)
        leaves = [None if x is None else x.detach().requires_grad_() for x in operands]
        y, final_state = tanh_delta_rule(
            *leaves[:5],
            initial_state=leaves[5],
            output_final_state=True,
            cu_seqlens=self.cu_seqlens,
            activation=self.activation,
            backend=backend,
        )
        given = [x for x in leaves if x is not None]
        cotangents = (self.dy.to(y.dtype), self.d_final)
        grads = iter(torch.autograd.grad((y, final_state), given, cotangents, materialize_grads=True))
        values = [y, final_state, *(None if x is None else next(grads) for x in leaves)]
        return {name: x.detach() for name, x in zip(NAMES, values, strict=True) if x is not None}


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def operands(
    B: int = 2,
    T: int = 5,
    H: int = 2,
    K: int = 4,
    V: int = 3,
    *,
    lengths: tuple[int, ...] | None = None,
    gate: bool = True,
    state: bool = True,
    scale: float = 1.0,
    log_decay: tuple[float, float] = (-2.0, 0.0),
    activation: str = "tanh",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Operands:
    """Unit keys, values of size `scale`, log decay uniform in a range. `lengths` packs sequences into one row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cu_seqlens, N = None, B
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        B, T, N = 1, sum(lengths), len(lengths)
    low, high = log_decay
    drawn = Operands(
        q=torch.nn.functional.normalize(normal(B, T, H, K), dim=-1),
        k=torch.nn.functional.normalize(normal(B, T, H, K), dim=-1),
        v=scale * normal(B, T, H, V),
        g=low + (high - low) * torch.rand(B, T, H, generator=generator, dtype=torch.float64),
        beta=normal(B, T, H).sigmoid() if gate else None,
        initial_state=normal(N, H, K, V).tanh() if state else None,
        dy=normal(B, T, H, V),
        d_final=normal(N, H, K, V),
        cu_seqlens=cu_seqlens,
        activation=activation,
    )
    return drawn.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, or the norm of `actual` where nothing is expected."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    size = torch.linalg.vector_norm(expected.double())
    return float(difference / size) if size > 0 else float(difference)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape
        error = relative_error(value, expected[name])
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"
