"""The portable GPU backend, in Triton: NVIDIA and AMD devices, and the CPU under Triton's interpreter."""

from __future__ import annotations

from e88.ops.triton.recurrence import run

__all__ = ["run"]
