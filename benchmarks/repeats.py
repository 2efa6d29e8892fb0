"""How much of a run's text it had read before, and how much better it predicts what it reads again.

    python benchmarks/repeats.py results/benchmark_500m 732c856e3ad1 --data corpus.tar.xz

Each batch comes from the seed and the step alone, so that the text of every step is known from the record. The effect
is that of the repeated share of a batch on its loss, by least squares over a part of the steps, beside a parabola in
time. Losses are those of the steps: STORE/losses-ID.json, or the log of the run's folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from e88.data.corpus import open_corpus
from e88.data.loader import WindowSampler
from e88.study.store import load_records
from e88.training.config import deciding

PARTS = ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))


def repeated_shares(sampler: WindowSampler, length: int, window: int, steps: int) -> np.ndarray:
    """float64 [steps]: the share of a step's predicted tokens that earlier steps had predicted. length: the split's."""
    seen = np.zeros(length, dtype=bool)
    shares = np.zeros(steps)
    for step in range(steps):
        places = sampler.starts(step)[:, None] + np.arange(1, window + 1)
        shares[step] = seen[places].mean()
        seen[places] = True
    return shares


def effect(losses: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """(nats by which the loss changes from no repeated text to nothing else, half its 95 % interval)."""
    time = np.linspace(-1, 1, len(losses))
    terms = np.stack([np.ones_like(time), time, time**2, shares], 1)
    coefficients = np.linalg.lstsq(terms, losses, rcond=None)[0]
    spread = np.sum((losses - terms @ coefficients) ** 2) / (len(losses) - terms.shape[1])
    return float(coefficients[3]), float(1.96 * np.sqrt(spread * np.linalg.inv(terms.T @ terms)[3, 3]))


def losses_of(store: Path, run: str) -> np.ndarray:
    """The loss of every step of a run."""
    published, log = store / f"losses-{run}.json", store / "runs" / run / "log.jsonl"
    if published.exists():
        return np.array(json.loads(published.read_text()))
    if not log.exists():
        raise SystemExit(f"neither {published} nor {log} is there")
    return np.array([json.loads(line)["loss"] for line in log.read_text().splitlines()])


def report(store: Path, run: str, data: str) -> dict[str, Any]:
    """What is printed, of one run."""
    record = next((r for r in load_records([store], [run])), None)
    if record is None:
        raise SystemExit(f"{store} has no run {run}")
    corpus, training = open_corpus(data), deciding(record["config"]["training"])
    if corpus.hash != record["data"]["hash"]:
        raise SystemExit(f"{data} is not the data of run {run}")
    window, *others = (training[key] for key in ("window", "batch_size", "seed", "carry", "sampling"))
    sampler = WindowSampler(corpus.train, window, *others)
    losses = losses_of(store, run)
    shares = repeated_shares(sampler, len(corpus.train), window, len(losses))
    parts = []
    for low, high in PARTS:
        part = slice(int(low * len(losses)), int(high * len(losses)))
        slope, half = effect(losses[part], shares[part])
        parts.append({"from": low, "to": high, "loss": float(losses[part].mean()), "share": float(shares[part].mean()),
                      "effect": slope, "half_interval": half})  # fmt: skip
    return {"run": run, "name": record["name"], "steps": len(losses), "share": float(shares.mean()),
            "share_of_last_100": float(shares[-100:].mean()), "parts": parts}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    for run in options.runs:
        found = report(options.store, run, options.data)
        last = f"of those of the last 100 steps {found['share_of_last_100']:.1%}"
        print(f"{found['name']} ({run}): {found['share']:.1%} of its tokens had been read before, {last}")
        for part in found["parts"]:
            change = f"repeated text changes it by {part['effect']:+.3f} ± {part['half_interval']:.3f}"
            steps = f"steps {part['from']:.0%} to {part['to']:.0%}"
            print(f"  {steps}: loss {part['loss']:.4f} nats, {part['share']:.1%} read before; {change}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
