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
    """bpb: total bits over total bytes. interval: 95 %, normal approximation over windows. windows: how many."""

    bpb: float
    interval: tuple[float, float]
    windows: int


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
        nll = nll.double().where(torch.from_numpy(scored).to(group.device), 0.0)
        bits.append(nll.sum(1).cpu().numpy() / math.log(2))
        sizes.append((corpus.bytes_of(part[:, 1:]) * scored).sum(1))
    model.train(training)
    shares = group.gather((np.concatenate(bits), np.concatenate(sizes).astype(np.float64)))
    all_bits, all_sizes = (np.concatenate(parts)[: len(windows)] for parts in zip(*shares, strict=True))
    return summarise(all_bits, all_sizes)


def summarise(bits: np.ndarray, sizes: np.ndarray) -> HeldOut:
    """bits and bytes of each window -> the ratio of totals with its interval (delta method for a ratio)."""
    n = len(bits)
    bpb = float(bits.sum() / sizes.sum())
    if n < 2:
        return HeldOut(bpb, (bpb, bpb), n)
    error = float(np.std(bits - bpb * sizes, ddof=1) / (math.sqrt(n) * sizes.mean()))
    return HeldOut(bpb, (bpb - 1.96 * error, bpb + 1.96 * error), n)
