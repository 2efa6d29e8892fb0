"""The operator of E88, the tanh delta rule: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from e88.ops.backends import available_backends, choose, record_backends
from e88.ops.contract import check, check_fused, check_fused_step, check_step
from e88.ops.edges import composed

__all__ = [
    "available_backends",
    "fused_tanh_delta_rule",
    "fused_tanh_delta_rule_step",
    "record_backends",
    "tanh_delta_rule",
    "tanh_delta_rule_step",
]


def tanh_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    activation: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence over whole sequences. Differentiable in every floating tensor.

    For each row and head, with the state S [K, V] and d_t = exp(g_t):

        e_t = v_t - S_{t-1}^T k_t
        S_t = tanh(d_t * S_{t-1} + beta_t * k_t e_t^T)
        y_t = S_t^T q_t

    Args:
        q, k: [B, T, H, K], already normalised; q is not scaled. float16, bfloat16, float32 or float64.
        v: [B, T, H, V], same dtype. K and V are 1 to 256.
        g: [B, T, H], the log of the decay, at most 0. Not checked, since that would stall a GPU.
        beta: [B, T, H], the write gate; 1 if None.
        initial_state: [N, H, K, V]; zero if None. N is B, or the number of packed sequences.
        output_final_state: also return the state after the last step.
        cu_seqlens: [N + 1] int32 or int64, sequence n being steps cu_seqlens[n] to cu_seqlens[n + 1] of the
            single row (B = 1). Sequences may be empty. Values are checked on the CPU only.
        activation: "tanh", or "identity" for the linear recurrence.
        backend: "auto" or a name from `available_backends()`.

    Returns:
        y [B, T, H, V] in v's dtype, and the final state [N, H, K, V] or None. State and sums are float32
        (float64 for float64 inputs).

    Raises:
        UserError: wrong shapes, dtypes, devices or names, or a backend that cannot serve the call.
    """
    problem = check(q, k, v, g, beta, initial_state, cu_seqlens, activation)
    module = choose(problem, backend)
    y, final_state = module.run(q, k, v, g, beta, initial_state, cu_seqlens, activation)
    return y, final_state if output_final_state else None


def fused_tanh_delta_rule(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    n_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    b: Tensor | None = None,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    activation: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`tanh_delta_rule` from a layer's projections to its output projection. Differentiable in every floating tensor.

    With x = silu(qkv), split over heads into x_q, x_k and x_v:

        q = x_q / sqrt(sum(x_q^2) + 1e-6), k likewise, v = x_v (x_k where k and v are tied)
        g = -exp(A_log) * softplus(a + dt_bias), beta = sigmoid(b), both in float32
        y = tanh_delta_rule(q, k, v, g, beta) * silu(gate)

    Args:
        qkv: [B, T, H*(2K+V)], all heads of q, then of k, then of v; or [B, T, 2*H*K], k and v being tied and K = V.
        a: [B, T, H] with A_log and dt_bias [H]; without those two, the log decay g itself.
        n_heads, head_k_dim, head_v_dim: H, K, V.
        b: [B, T, H], the write gate before its sigmoid; beta is 1 if None.
        gate: [B, T, H*V] in qkv's dtype, the output gate before its SiLU; none if None.
        The others are those of `tanh_delta_rule`.

    The cuda backend has kernels of its own for this in float16 and bfloat16 under tanh; what else there is takes the
    steps above one by one.

    Returns:
        y [B, T, H*V] in qkv's dtype, and the final state [N, H, K, V] or None.

    Raises:
        UserError: as `tanh_delta_rule`.
    """
    sizes = (n_heads, head_k_dim, head_v_dim)
    inputs = (qkv, a, A_log, dt_bias, b, gate, initial_state, cu_seqlens, activation, sizes)
    module = choose(check_fused(*inputs), backend)
    own = getattr(module, "run_fused", None)
    y, final_state = composed(module.run, *inputs) if own is None else own(*inputs)
    return y, final_state if output_final_state else None


def tanh_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    state: Tensor,
    activation: str = "tanh",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `tanh_delta_rule`; equal to the parallel call with T = 1.

    Args:
        q, k: [B, H, K]. v: [B, H, V]. g, beta: [B, H].
        state: [B, H, K, V], left as it is.

    Returns:
        y [B, H, V] in v's dtype and the new state [B, H, K, V].

    Raises:
        UserError: as `tanh_delta_rule`.
    """
    problem = check_step(q, k, v, g, beta, state, activation)
    module = choose(problem, backend)
    if hasattr(module, "step"):
        return module.step(q, k, v, g, beta, state, activation)
    gate = None if beta is None else beta.unsqueeze(1)
    rows = (x.unsqueeze(1) for x in (q, k, v, g))
    y, new_state = module.run(*rows, gate, state, None, activation)
    return y.squeeze(1), new_state


def fused_tanh_delta_rule_step(
    qkv: Tensor,
    a: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    n_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    state: Tensor,
    b: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "tanh",
    backend: str = "auto",
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `fused_tanh_delta_rule`; equal to the parallel call with T = 1.

    Args:
        qkv: [B, H*(2K+V)], or [B, 2*H*K] tied. a, b: [B, H]. gate: [B, H*V].
        state: [B, H, K, V], left as it is unless `inplace`, which writes the new state over it and returns it.

    Returns:
        y [B, H*V] in qkv's dtype and the new state [B, H, K, V].

    Raises:
        UserError: as `tanh_delta_rule`.
    """
    sizes = (n_heads, head_k_dim, head_v_dim)
    inputs = (qkv, a, A_log, dt_bias, b, gate, state)
    module = choose(check_fused_step(*inputs, activation, sizes), backend)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if hasattr(module, "fused_step") and not needs_grad:
        return module.fused_step(*inputs, activation, sizes, inplace)
    beta, opening = (None if x is None else x.unsqueeze(1) for x in (b, gate))
    rows = (qkv.unsqueeze(1), a.unsqueeze(1), A_log, dt_bias, beta, opening)
    y, new_state = composed(module.run, *rows, state, None, activation, sizes)
    return y.squeeze(1), state.copy_(new_state) if inplace else new_state
