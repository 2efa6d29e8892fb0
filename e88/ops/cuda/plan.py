"""How a problem is cut into blocks and warps: the compile-time sizes of the kernels (`tile.cuh` explains them)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True)
class Plan:
    """One compilation: `K` rows and `V` columns of the state, and the choices that depend on them.

    `cols` columns a block, 16 * `tiles` a warp, checkpoints every `segment` steps, inputs staged `chunk` steps at a
    time on the way forward, at least `forward_blocks` and `backward_blocks` resident on a multiprocessor.
    """

    K: int
    V: int
    dtype: torch.dtype
    tanh: bool
    beta: bool
    cols: int
    tiles: int
    segment: int
    chunk: int
    forward_tiles: int
    forward_blocks: int
    backward_blocks: int

    @property
    def precise(self) -> bool:
        return self.dtype == torch.float32

    @property
    def splits(self) -> int:
        return -(-self.V // self.cols)

    def threads(self, backward: bool) -> int:
        return 2 * self.cols // (self.tiles if backward else self.forward_tiles)

    @property
    def saved_dtype(self) -> torch.dtype:
        """What checkpoints are kept in: fp16 has tanh's range and three more bits than bf16."""
        if self.precise:
            return torch.float32
        return torch.float16 if self.tanh else torch.bfloat16

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of the backward kernel; it asserts the same sum."""
        pieces = self.K // 8 if self.K in (16, 32, 64, 128) else self.K // 8 | 1
        pitch = 4 * (self.K + 4) if self.precise else 16 * pieces
        tile = -(-self.cols * pitch // 256) * 256
        threads = self.threads(backward=True)
        words = 16 if self.precise else 8
        step = 2 * self.K + 2 * self.cols + 2 + self.cols // 16 * words + (2 if self.beta else 1) * threads
        return 4 * (self.segment * step + threads // 32 * (self.segment + 1) * 2 * self.K) + (self.segment + 1) * tile

    def defines(self, backward: bool) -> dict[str, int]:
        return {
            "K": self.K,
            "V": self.V,
            "COLS": self.cols,
            "TILES": self.tiles if backward else self.forward_tiles,
            "SEGMENT": self.segment,
            "CHUNK": self.chunk,
            "BLOCKS": self.backward_blocks if backward else self.forward_blocks,
            "DTYPE": DTYPES[self.dtype],
            "TANH": int(self.tanh),
            "BETA": int(self.beta),
            "PRECISE": int(self.precise),
            "SHARED": self.shared_bytes,
        }


def make_plan(K: int, V: int, dtype: torch.dtype, tanh: bool, beta: bool) -> Plan:
    """The sizes for one shape of state. They do not depend on B, T or H, so one compilation serves every batch."""
    width = -(-V // 16) * 16
    if dtype == torch.float32:
        return Plan(K, V, dtype, tanh, beta, min(width, 32), 1, 4, 4, 1, 1, 1)
    return Plan(K, V, dtype, tanh, beta, min(width, 64), 1, 8 if K <= 32 else 4, 8 if K > 64 else 16, 1, 1, 1)
