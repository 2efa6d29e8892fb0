"""Held-out bits per byte on a fixed slice, the same windows for every model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from e88.data.corpus import Corpus
from e88.data.loader import HeldOutWindows
from e88.models.lm import LanguageModel
from e88.training.distributed import Group


@dataclass(frozen=True)
class HeldOut:
    """bpb: total bits over total bytes. interval: 95 %, normal approximation over windows. windows: how many.

    by_position: points of position (the first token of a window has 1) and bpb, of the tokens after the point before up
    to that one, about twice as far: how much a model makes of what it has read.
    """

    bpb: float
    interval: tuple[float, float]
    windows: int
    by_position: list[dict[str, float]]


@torch.no_grad()
def evaluate(
    model: LanguageModel, corpus: Corpus, heldout: HeldOutWindows, batch_size: int, group: Group
) -> HeldOut:
    """Read every row from the zero state and score what is to be scored in it. Each process of the group takes its
    share of the rows, `batch_size` at once."""
    windows = heldout.rows
    # Shares of one size, as FSDP's processes must take their passes together: the last window fills them up.
    count = -(-len(windows) // group.world)
    share = np.minimum(np.arange(group.rank * count, (group.rank + 1) * count), len(windows) - 1)
    bits, sizes = [], []
    training = model.training
    model.eval()
    for start in range(0, count, batch_size):
        chosen = share[start : start + batch_size]
        part, scored = windows[chosen], heldout.scored[chosen]
        nll = model.nll(torch.from_numpy(part).to(group.device))
        bits.append(_by_octave(nll.double().cpu().numpy() / math.log(2), scored))
        sizes.append(_by_octave(corpus.bytes_of(part[:, 1:]), scored))
    model.train(training)
    shares = group.gather((np.concatenate(bits), np.concatenate(sizes)))
    all_bits, all_sizes = (np.concatenate(parts)[: len(windows)] for parts in zip(*shares, strict=True))
    return summarise(all_bits, all_sizes, int(heldout.scored.sum(1).max()))


def _by_octave(values: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """values, scored [B, T] -> float64 [B, P]: column p sums what is scored from position 2^(p-1) + 1 to 2^p."""
    position = np.cumsum(scored, axis=1)
    # Of 1, 2, 3 to 4, 5 to 8: the bits of the position before it.
    octave = np.frexp(position - 1.0)[1]
    width = int(octave[scored].max()) + 1
    place = (np.arange(len(values))[:, None] * width + octave)[scored]
    sums = np.bincount(place, weights=values[scored], minlength=len(values) * width)
    return sums.reshape(len(values), width)


def summarise(bits: np.ndarray, sizes: np.ndarray, window: int) -> HeldOut:
    """bits and bytes of each window by octave of position [n, P] -> ratios of totals; that of all with its interval
    (delta method for a ratio). window: the last position."""
    n = len(bits)
    octaves = zip(bits.sum(0), sizes.sum(0), strict=True)
    by_position = [{"position": min(2**p, window), "bpb": float(b / s)} for p, (b, s) in enumerate(octaves) if s > 0]
    bits, sizes = bits.sum(1), sizes.sum(1)
    bpb = float(bits.sum() / sizes.sum())
    if n < 2:
        return HeldOut(bpb, (bpb, bpb), n, by_position)
    error = float(np.std(bits - bpb * sizes, ddof=1) / (math.sqrt(n) * sizes.mean()))
    return HeldOut(bpb, (bpb - 1.96 * error, bpb + 1.96 * error), n, by_position)
