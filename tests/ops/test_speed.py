"""Timing the operator: every shape gets a time or a reason, whatever happens to its neighbours."""

from __future__ import annotations

import pytest
import torch

from e88.ops import speed
from e88.ops.accuracy import Shape

SHAPES = [Shape(1, 5, 2, 8, 8), Shape(1, 5, 1, 16, 16)]
CPU = torch.device("cpu")


def test_every_shape_is_checked_and_timed() -> None:
    told: list[str] = []
    rows = speed.profile(SHAPES, CPU, torch.float32, 0.0, told.append)
    assert len(told) == (1 + speed.TURNS) * len(SHAPES) and str(SHAPES[1]) in told[-1]
    for row in rows:
        assert row["skipped"] is None and row["backend"] == "numba"
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0


def test_a_shape_too_large_for_memory_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = speed.as_a_model_calls_it

    def full(shape: Shape, device: torch.device, dtype: torch.dtype) -> speed.Inputs:
        if shape.K == 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(shape, device, dtype)

    monkeypatch.setattr(speed, "as_a_model_calls_it", full)
    first, second = speed.profile(SHAPES, CPU, torch.float32, 0.0, lambda text: None)
    assert first["skipped"] is None and first["forward_backward_ms"] > 0
    assert second["skipped"].startswith("out of memory") and "forward_ms" not in second


def test_a_check_keeps_what_kernels_are_planned_by() -> None:
    assert speed.shortened(Shape(32, 512, 56, 32, 48)) == Shape(32, 128, 56, 32, 48)
    assert speed.shortened(Shape(2, 7, 3, 8, 8)) == Shape(2, 7, 3, 8, 8)
