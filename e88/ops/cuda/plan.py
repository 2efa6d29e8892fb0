"""How a problem is cut into blocks and warps: the compile-time sizes of the kernels (`tile.cuh` explains them)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Edges(NamedTuple):
    """What the kernels do around the recurrence: all of it if `fused`; with an output gate; with 16-bit a and b."""

    fused: bool = False
    gate: bool = False
    narrow: bool = False


NO_EDGES = Edges()


@dataclass(frozen=True)
class Plan:
    """One compilation: `K` rows and `V` columns of the state, and the choices that depend on them.

    `cols` columns a block, 16 * `tiles` a warp, checkpoints every `segment` steps, inputs staged `chunk` steps at a
    time on the way forward, at least `forward_blocks` and `backward_blocks` resident on a multiprocessor. The
    backward loops over steps are unrolled `replay` and `walk` times.
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
    replay: int = 1
    walk: int = 1
    edges: Edges = NO_EDGES

    @property
    def precise(self) -> bool:
        """Whether the float32 kernels serve: for float32 inputs, and without tanh, where states know no bound."""
        return self.dtype == torch.float32 or not self.tanh

    @property
    def splits(self) -> int:
        return -(-self.V // self.cols)

    @property
    def row_lanes(self) -> int:
        """Lanes that share a row of K elements in the kernels' staging, eight elements each."""
        lanes = 1
        while 8 * lanes < self.K:
            lanes *= 2
        return lanes

    def threads(self, backward: bool) -> int:
        return 2 * self.cols // (self.tiles if backward else self.forward_tiles)

    @property
    def saved_dtype(self) -> torch.dtype:
        """What checkpoints are kept in: fp16 has tanh's range and three more bits than bf16."""
        return torch.float32 if self.precise else torch.float16

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of the backward kernel; it asserts the same sum."""
        threads = self.threads(backward=True)
        dots = (2 if self.beta else 1) * threads
        partial = threads // 32 * 2 * self.K
        if self.precise:
            tile = -(-self.cols * 4 * (self.K + 4) // 256) * 256
            step = 2 * self.K + 2 * self.cols + 2 + self.cols + dots
            words = self.segment * step + 2 * self.K + self.cols + (self.segment + 1) * partial
            return 4 * words + (self.segment + 1) * tile
        warps = threads // 32
        tile = 32 * warps * self.K + 16
        step = self.K // 2 + 16 * -(-self.K // 16) + 20 * warps + (8 if self.edges.fused else 4)
        return (self.segment + 1) * 4 * step + (self.segment + 1) * tile

    def defines(self, backward: bool, save: bool = True) -> dict[str, int]:
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
            "SHARED": self.shared_bytes,
            "SAVE": int(save),
            "REPLAY": self.replay,
            "WALK": self.walk,
            "FUSED": int(self.edges.fused),
            "GATE": int(self.edges.gate),
            "NARROW": int(self.edges.narrow),
        }


FEW_HEADS = 512
HOPPER_SHARED_BYTES = 232448


def make_plan(
    K: int,
    V: int,
    dtype: torch.dtype,
    tanh: bool,
    beta: bool,
    heads: int = FEW_HEADS + 1,
    limit: int = HOPPER_SHARED_BYTES,
    edges: Edges = NO_EDGES,
) -> Plan:
    """The sizes for one shape of state, where a block may use `limit` bytes of shared memory.

    `heads` counts heads times sequences. Many heads share a multiprocessor, so that small segments pay; few heads leave
    room for long ones. Measured on an H200; nothing else about B, T or H matters, so few compilations serve all.
    """
    cols = min(-(-V // 16) * 16, 64)
    while True:
        if dtype == torch.float32 or not tanh:
            plan = Plan(K, V, dtype, tanh, beta, min(cols, 32), 1, 4, 4, 1, 1, 1)
        elif K <= 16:
            plan = Plan(K, V, dtype, tanh, beta, cols, 1, 8, 16, 1, 1, 16 * 16 // cols, 7, 8)
        elif K <= 32:
            segment, chunk, blocks = (16, 32, 4) if heads <= FEW_HEADS else (8, 16, 8)
            blocks = blocks * 32 // max(cols, 32)
            plan = Plan(K, V, dtype, tanh, beta, cols, 1, segment, chunk, 1, 1, blocks, 7 if segment == 8 else 5, 4)
        elif K <= 64:
            plan = Plan(K, V, dtype, tanh, beta, cols, 1, 7, 14, 1, 1, 3 * 64 // cols, 6)
        else:
            segment = 5 if cols == 64 else 4
            plan = Plan(K, V, dtype, tanh, beta, cols, 1, segment, 2 * segment, 1, 1, 2)
        plan = replace(plan, edges=edges)
        if plan.shared_bytes <= limit or plan.cols == 16:
            return plan
        cols = plan.cols // 2
