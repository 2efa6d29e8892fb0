"""Held-out bits per byte, in all and along the window, against plain sums over a token at a time."""

import math

import numpy as np
import pytest
import torch

from e88.data.corpus import open_corpus
from e88.data.loader import heldout_windows
from e88.models.config import E88Config, ModelConfig
from e88.models.lm import LanguageModel
from e88.training.distributed import Group
from e88.training.evaluate import evaluate


@pytest.mark.parametrize(
    ("window", "context", "batch"), [(1, 0, 4), (1, 5, 1), (16, 0, 3), (20, 0, 64), (20, 48, 5), (33, 7, 1)]
)
def test_bits_in_all_and_by_octave_are_those_of_the_tokens(tmp_path, window, context, batch):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 30_000, dtype=np.uint8)))
    corpus = open_corpus(path, cache=tmp_path / "cache")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim=16, depth=1, mixer=E88Config(n_heads=2, n_state=8)))
    with torch.no_grad():
        # Loud enough for tokens to differ.
        model.embedding.weight.mul_(30)
    heldout = heldout_windows(corpus.valid, window, 700, context)
    found = evaluate(model, corpus, heldout, batch, Group(torch.device("cpu")))
    with torch.no_grad():
        nll = model.nll(torch.from_numpy(heldout.rows)).double().numpy() / math.log(2)
    at = {}
    for row, scored in zip(nll, heldout.scored, strict=True):
        for position, bits in enumerate(row[scored], 1):
            at.setdefault(position, []).append(bits)
    ends = [min(2**p, window) for p in range(math.ceil(math.log2(window)) + 1)]
    assert [point["position"] for point in found.by_position] == ends
    for before, point in zip([0, *ends], found.by_position, strict=False):
        bits = [b for position in range(before + 1, point["position"] + 1) for b in at[position]]
        assert point["bpb"] == pytest.approx(np.mean(bits), rel=1e-6)
    assert found.bpb == pytest.approx(np.mean([b for bits in at.values() for b in bits]), rel=1e-6)
    assert found.windows == len(heldout.rows)
    if window > 1:
        assert len({round(point["bpb"], 3) for point in found.by_position}) > 1
