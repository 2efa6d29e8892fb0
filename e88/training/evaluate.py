"""Held-out bits per byte on a fixed slice, the same windows for every model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from e88.data.corpus import Corpus
from e88.models.lm import LanguageModel
from e88.training.distributed import Group


@dataclass(frozen=True)
class HeldOut:
    """bpb: total bits over total bytes. interval: 95 %, normal approximation over windows. windows: how many."""

    bpb: float
    interval: tuple[float, float]
    windows: int


@torch.no_grad()
def evaluate(model: LanguageModel, corpus: Corpus, windows: np.ndarray, batch_size: int, group: Group) -> HeldOut:
    """Score windows [n, T + 1] of tokens, each from the zero state. Each process of the group scores its share."""
    # Shares of one size, as FSDP's processes must take their passes together: the last window fills them up.
    count = -(-len(windows) // group.world)
    share = np.minimum(np.arange(group.rank * count, (group.rank + 1) * count), len(windows) - 1)
    bits, sizes = [], []
    training = model.training
    model.eval()
    for start in range(0, count, batch_size):
        part = windows[share[start : start + batch_size]]
        nll = model.nll(torch.from_numpy(part).to(group.device))
        bits.append(nll.double().sum(1).cpu().numpy() / math.log(2))
        sizes.append(corpus.bytes_of(part[:, 1:]).sum(1))
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
