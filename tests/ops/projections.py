"""Random raw projections for the fused operator, and its outputs and gradients under random cotangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from e88.ops import fused_tanh_delta_rule, reference
from e88.ops.edges import composed

FLOATING = ("qkv", "a", "A_log", "dt_bias", "b", "gate", "initial_state")

# T 1, odd, K != V, tied, gates, packed with an empty sequence, log decay given, saturated, zero rows.
SHAPES: list[dict[str, Any]] = [
    {"T": 1},
    {"T": 37, "K": 8, "V": 8, "gate": True, "b": True, "state": True},
    {"K": 6, "V": 3, "gate": True},
    {"K": 4, "V": 4, "tied": True, "gate": True, "b": True},
    {"K": 5, "V": 5, "tied": True, "T": 1, "state": True},
    {"lengths": (3, 0, 7, 1), "gate": True, "b": True, "state": True},
    {"decay": False, "b": True},
    {"scale": 12.0, "gate": True, "T": 20},
    {"zeros": True, "T": 9, "gate": True},
    {"activation": "identity", "gate": True},
]


@dataclass(frozen=True)
class Projections:
    qkv: Tensor
    a: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    b: Tensor | None
    gate: Tensor | None
    initial_state: Tensor | None
    dy: Tensor
    d_final: Tensor
    cu_seqlens: Tensor | None
    activation: str
    sizes: tuple[int, int, int]
    tied: bool

    def to(self, target: Any) -> Projections:
        """To a dtype, which concerns every floating tensor, or to a device."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        if isinstance(target, torch.dtype):
            names = [name for name in names if name != "cu_seqlens"]
        return replace(self, **{name: getattr(self, name).to(target) for name in names})

    def replace(self, **changes: Any) -> Projections:
        return replace(self, **changes)

    def arguments(self) -> dict[str, Any]:
        H, K, V = self.sizes
        given = {name: getattr(self, name) for name in (*FLOATING, "cu_seqlens", "activation")}
        return {**given, "n_heads": H, "head_k_dim": K, "head_v_dim": V, "output_final_state": True}

    def run(self, backend: str, **changes: Any) -> tuple[Tensor, Tensor]:
        y, state = fused_tanh_delta_rule(**(self.arguments() | {"backend": backend} | changes))
        assert state is not None
        return y, state

    def results(self, backend: str) -> dict[str, Tensor]:
        return self.results_of(lambda x: x.run(backend))

    def results_rounded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """As `results` of the reference, but q, k and v, and the gradient of y before its gate, pass through `dtype`.

        So do they on every path in that dtype; the gradients of the decay in particular lose twice what a kernel's own
        arithmetic costs them.
        """

        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            y, state = reference.run(*(x + (x.to(dtype) - x).detach() for x in (q, k, v)), *rest)
            if y.requires_grad:
                y.register_hook(lambda dy: dy.to(dtype).to(dy.dtype))
            return y, state

        def function(x: Projections) -> tuple[Tensor, Tensor]:
            given = (x.qkv, x.a, x.A_log, x.dt_bias, x.b, x.gate, x.initial_state, x.cu_seqlens)
            return composed(run, *given, x.activation, x.sizes)

        return self.results_of(function)

    def results_of(self, function: Callable[[Projections], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Output, final state and the gradient of every floating tensor."""
        given = {name: getattr(self, name) for name in FLOATING if getattr(self, name) is not None}
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        y, state = function(replace(self, **leaves))
        cotangents = (self.dy.to(y.dtype), self.d_final.to(state.dtype))
        grads = torch.autograd.grad((y, state), list(leaves.values()), cotangents, materialize_grads=True)
        named = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {"y": y.detach(), "final_state": state.detach(), **named}


def projections(
    B: int = 2,
    T: int = 5,
    H: int = 2,
    K: int = 4,
    V: int = 3,
    *,
    lengths: tuple[int, ...] | None = None,
    tied: bool = False,
    gate: bool = False,
    b: bool = False,
    state: bool = False,
    decay: bool = True,
    scale: float = 1.0,
    zeros: bool = False,
    activation: str = "tanh",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Projections:
    """Normal projections of size `scale`. `lengths` packs sequences into one row; without `decay`, a is the log decay;
    `zeros` makes some rows of q, k and v vanish."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cu_seqlens, N = None, B
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        B, T, N = 1, sum(lengths), len(lengths)
    qkv = scale * normal(B, T, 2 * H * K if tied else H * (2 * K + V))
    if zeros:
        qkv[:, ::3] = 0
        qkv[:, 1::3, : 2 * H * K] *= 1e-3
    a = normal(B, T, H)
    drawn = Projections(
        qkv=qkv,
        a=a if decay else -a.abs(),
        A_log=normal(H) if decay else None,
        dt_bias=normal(H) - 2 if decay else None,
        b=normal(B, T, H) if b else None,
        gate=scale * normal(B, T, H * V) if gate else None,
        initial_state=normal(N, H, K, V).tanh() if state else None,
        dy=normal(B, T, H * V),
        d_final=normal(N, H, K, V),
        cu_seqlens=cu_seqlens,
        activation=activation,
        sizes=(H, K, V),
        tied=tied,
    )
    return drawn.to(dtype)
