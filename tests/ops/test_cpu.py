"""The numba kernels against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operands import assert_close, operands, relative_error

from e88.ops import cpu, tanh_delta_rule
from e88.ops.cpu_blocks import SEGMENT
from e88.ops.cpu_simd import LANES

TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that a number nobody wrote cannot pass; small problems use all threads."""
    cpu.warmup()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "VECTORS_PER_WORKER", 1)
        yield
    torch.use_deterministic_algorithms(deterministic)


def check(x, sums_beside_dk: bool = False) -> dict[str, torch.Tensor]:
    """sums_beside_dk: a number of dg or dbeta is a sum of K V terms that may cancel, and of few numbers all may; their
    error is then held against the size of dk, which sums the same terms otherwise."""
    actual = x.to(torch.float32)
    results = actual.results("numba")
    expected = actual.to(torch.float64).results("checkpointed")
    sums = results.keys() & {"dg", "dbeta"} if sums_beside_dk else set()
    for name in sums:
        error = (results[name].double() - expected[name]).norm()
        assert error <= TOLERANCE * max(expected[name].norm(), expected["dk"].norm()), f"{name}: off by {error:.1e}"
    others = results.keys() - sums
    assert_close({name: results[name] for name in others}, {name: expected[name] for name in others}, TOLERANCE)
    return results


SIZES = st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 32, 33, 40, 48, 64, 65]))


@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 7, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 3]),
    H=st.integers(1, 4),
    K=SIZES,
    V=SIZES,
    gate=st.booleans(),
    state=st.booleans(),
    activation=st.sampled_from(["tanh", "identity"]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@example(B=1, T=2, H=1, K=16, V=16, gate=True, state=False, activation="tanh", threads=1, seed=128)  # dg of 0.004
@settings(max_examples=60)
def test_random_shapes(B, T, H, K, V, gate, state, activation, threads, seed) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = operands(B, T, H, K, V, gate=gate, state=state, activation=activation, seed=seed)
        check(x, sums_beside_dk=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape", [(1, 3000, 1, 4, 8), (2, 35, 1, 128, 128), (1, 20, 100, 8, 8), (1, 3, 1, 256, 256), (2, 20, 3, 8, 96)]
)
def test_long_wide_and_many_heads(shape) -> None:
    check(operands(*shape))


def test_rounding_does_not_drift_where_nothing_is_forgotten() -> None:
    check(operands(1, 3000, 1, 8, 16, scale=1e-3, log_decay=(0.0, 0.0), state=False))


@given(
    lengths=st.lists(st.integers(0, 2 * SEGMENT + 1), min_size=1, max_size=5).filter(sum),
    H=st.integers(1, 3),
    V=st.sampled_from([5, 16, 32, 40]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_packed_sequences_equal_separate_ones(lengths, H, V, seed) -> None:
    x = operands(H=H, K=6, V=V, lengths=tuple(lengths), seed=seed)
    packed = check(x, sums_beside_dk=True)
    x = x.to(torch.float32)
    ends = x.cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        y, final_state = tanh_delta_rule(
            *(tensor[:, start:end] for tensor in (x.q, x.k, x.v, x.g, x.beta)),
            initial_state=x.initial_state[n : n + 1],
            output_final_state=True,
            backend="numba",
        )
        assert torch.equal(packed["y"][:, start:end], y)
        assert torch.equal(packed["final_state"][n : n + 1], final_state)
        if start == end:
            assert torch.equal(final_state, x.initial_state[n : n + 1])


@pytest.mark.parametrize("log_decay", [(-30.0, -30.0), (-1e-4, 0.0), (0.0, 0.0)])
def test_decay_at_its_ends(log_decay) -> None:
    check(operands(2, 2 * SEGMENT, 2, 8, 16, log_decay=log_decay))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 5.0, 100.0])
def test_from_tiny_values_to_saturation(scale: float) -> None:
    x = operands(2, 40, 2, 8, 16, scale=scale, state=scale > 0)
    results = check(x)
    if scale == 100.0:
        assert (results["final_state"].abs() > 0.999).float().mean() > 0.5


def test_zero_keys_and_large_gates() -> None:
    x = operands(2, 20, 2, 8, 16)
    x.k[:, ::3] = 0
    x.beta.mul_(20)
    check(x)


@pytest.mark.parametrize("scale", [1e4, 1e18, 1e30])
def test_huge_values_give_no_nan(scale: float) -> None:
    for name, value in operands(1, 20, 2, 8, 16, scale=scale, dtype=torch.float32).results("numba").items():
        assert value.isfinite().all(), name


def test_nan_is_passed_on() -> None:
    x = operands(1, 20, 2, 8, 16, dtype=torch.float32)
    x.v[0, 3, 1, 2] = float("nan")
    y = x.results("numba")["y"]
    assert y[0, 3:, 1, 2].isnan().all()
    assert y[0, :, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    x = operands(2, 20, 3, 8, 24).to(dtype)
    expected = x.to(torch.float64).results("checkpointed")
    results = x.results("numba")
    assert results["final_state"].dtype == torch.float32
    # The one rounding is that of the result.
    for name, value in results.items():
        assert name == "final_state" or value.dtype == dtype
        assert relative_error(value, expected[name]) <= torch.finfo(dtype).eps


def test_strided_inputs() -> None:
    x = operands(2, 20, 3, 8, 24, dtype=torch.float32)
    fused = torch.cat([x.q, x.k, x.v], dim=-1)
    q, k, v = fused.split([8, 8, 24], dim=-1)
    turned = x.g.transpose(1, 2).contiguous().transpose(1, 2)
    y = tanh_delta_rule(q, k, v, turned, x.beta, backend="numba")[0]
    assert torch.equal(y, tanh_delta_rule(x.q, x.k, x.v, x.g, x.beta, backend="numba")[0])


def test_gradient_of_one_output_alone() -> None:
    x = operands(1, 20, 2, 8, 16, dtype=torch.float32)
    gradients = []
    for backend in ("numba", "reference"):
        v = x.v.clone().requires_grad_()
        _, final_state = tanh_delta_rule(x.q, x.k, v, x.g, output_final_state=True, backend=backend)
        gradients.append(torch.autograd.grad(final_state.sum(), v)[0])
    assert relative_error(*gradients) <= TOLERANCE


def test_checkpoints_grow_by_segments_and_only_for_gradients() -> None:
    x = operands(2, 8 * SEGMENT, 4, 8, 32, dtype=torch.float32)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tanh_delta_rule(x.q, x.k, x.v, x.g, backend="numba")
        assert not sizes
        tanh_delta_rule(x.q, x.k, x.v.requires_grad_(), x.g, backend="numba")
    assert 8 * (2 * 4 * 8 * 32) in sizes


def test_plan_covers_every_column_once() -> None:
    for lengths, H, V in [((3, 3), 3, 16), ((3, 1), 3, 16), ((5,), 1, 40), ((2, 0, 40), 2, 32), ((1,) * 7, 1, 8)]:
        covered = cpu.plan(lengths, H, V).groups
        assert sorted(covered[covered >= 0]) == list(range(len(lengths) * H))


def test_vectorised_tanh_is_accurate_everywhere() -> None:
    # One step from S = 0 with k = q = 1 and v = x gives y = tanh(x); the gradient of v is its derivative.
    magnitudes = np.concatenate([np.logspace(-30, 2, 20000), np.linspace(0, 12, 20000)])
    x = torch.from_numpy(np.concatenate([magnitudes, -magnitudes])).float()
    x = torch.nn.functional.pad(x, (0, -len(x) % LANES)).view(-1, 1, 1, LANES).requires_grad_()
    one = torch.ones(x.shape[0], 1, 1, 1)
    y = tanh_delta_rule(one, one, x, one[..., 0] * 0, backend="numba")[0]
    slope = torch.autograd.grad(y.sum(), x)[0].double()
    exact = x.detach().double()
    expected = torch.tanh(exact)
    error = (y.detach().double() - expected).abs() / expected.abs().clamp_min(1e-300)
    assert error.max() <= 3e-7
    normal = exact.abs() < 40
    expected_slope = torch.cosh(exact[normal]) ** -2
    # A float32 x is itself uncertain by |x| ulp, and the slope's relative error is twice that.
    error = ((slope[normal] - expected_slope) / expected_slope).abs()
    assert (error / (1 + exact[normal].abs())).max() <= 3e-7
    assert (slope[~normal] <= 1e-30).all()
