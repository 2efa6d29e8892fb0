"""The backward derived by hand equals autograd through the reference, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import assert_close, operands

from e88.ops import checkpointed

SEGMENT = checkpointed.SEGMENT


@given(
    T=st.sampled_from([1, 2, 7, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 3]),
    H=st.integers(1, 3),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    gate=st.booleans(),
    state=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    activation=st.sampled_from(["tanh", "identity"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_equals_reference(T, H, K, V, gate, state, scale, activation, seed) -> None:
    x = operands(2, T, H, K, V, gate=gate, state=state, scale=scale, activation=activation, seed=seed)
    assert_close(x.results("checkpointed"), x.results("reference"), 1e-11)


@given(
    lengths=st.lists(st.integers(0, SEGMENT + 2), min_size=1, max_size=4).filter(sum),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10)
def test_equals_reference_on_packed_sequences(lengths, seed) -> None:
    x = operands(H=2, K=3, V=2, lengths=tuple(lengths), seed=seed)
    assert_close(x.results("checkpointed"), x.results("reference"), 1e-11)


def test_keeps_every_segments_first_state_and_no_other() -> None:
    x = operands(B=1, T=3 * SEGMENT, H=1, K=4, V=4)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        checkpointed.run(x.q.requires_grad_(), x.k, x.v, x.g, x.beta, x.initial_state, None, "tanh")
    inputs = sum(t.numel() for t in (x.q, x.k, x.v, x.g, x.beta))
    assert sum(sizes) == inputs + 3 * 16


@pytest.mark.parametrize("T", [0, 1])
def test_state_passes_through_empty_rows(T: int) -> None:
    x = operands(B=2, T=T)
    results = x.results("checkpointed")
    if T == 0:
        assert torch.equal(results["final_state"], x.initial_state)
        assert torch.equal(results["dinitial_state"], x.d_final)
    assert_close(results, x.results("reference"), 1e-11)
