"""Synthetic records, close to those of real small runs, for every test of the report."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e88.sizing.closed_form import describe
from e88.study.design import load_study
from e88.study.store import Store

SHAPES: dict[str, dict[str, Any]] = {
    "tiny-e88": {"kind": "e88", "state": 4096, "params": 1_203_456, "speed": 21_000, "floor": 1.31, "ratio": 1.0},
    "tiny-gdn": {"kind": "gated_deltanet", "state": 16384, "params": 1_190_112, "speed": 26_500, "floor": 1.29},
    "tiny-mamba2": {"kind": "mamba2", "state": 32768, "params": 1_215_000, "speed": 30_200, "floor": 1.42},
    "tiny-transformer": {"kind": "attention", "state": 81_920, "params": 1_220_608, "speed": 34_800, "floor": 1.47},
}


def make_record(name: str = "tiny-e88", seed: int = 0, status: str = "done", **options: Any) -> dict[str, Any]:
    """A record. Options: seconds (of budget), evals (points on the way), points (of the curve), noise, keys of SHAPES,
    training and environment (updates of those parts).
    """
    shape = {**SHAPES.get(name, SHAPES["tiny-e88"]), **options}
    seconds, noise = float(shape.get("seconds", 60.0)), shape.get("noise", 0.006)
    rng = np.random.default_rng([seed, *name.encode()])
    speed = shape["speed"] * math.exp(0.02 * rng.standard_normal())
    batch, window = 16, 256
    steps = max(1, int(speed * seconds / (batch * window)))
    floor = shape["floor"] + noise * rng.standard_normal()

    def loss(tokens: float) -> float:
        return floor + 4.2 * (1 + tokens / 9000) ** -0.5

    share = 0.4 if status == "diverged" else 1.0
    at = np.unique(np.linspace(1, max(1, steps * share), shape.get("points", 300)).astype(int))
    curve = [
        {"step": int(s), "tokens": int(s) * batch * window, "seconds": s / steps * seconds,
         "loss": loss(s * batch * window) + 0.03 * rng.standard_normal(), "lr": 3e-3}
        for s in at
    ]  # fmt: skip
    marks = np.linspace(0, 1, shape.get("evals", 12) + 1)[1:]
    heldout = [
        {"step": int(m * steps), "tokens": int(m * steps) * batch * window, "seconds": m * seconds,
         "bpb": (loss(m * steps * batch * window) + 0.04) / math.log(2)}
        for m in marks
    ]  # fmt: skip
    bpb = (loss(steps * batch * window) + 0.04) / math.log(2)
    config = {
        "model": {"dim": 128, "depth": 4, "mixer": {"kind": shape["kind"], "n_heads": 8}, "vocab_size": 256,
                  "mlp_hidden": 0},
        "training": {"budget": {"seconds": seconds}, "batch_size": batch, "window": window, "lr": 3e-3, "seed": seed,
                     "optimizer": "adamw", "schedule": "cosine", **shape.get("training", {})},
        "data": {"name": "corpus"},
    }  # fmt: skip
    record: dict[str, Any] = {
        "schema": 1,
        "id": hashlib.sha256(json.dumps([name, config], sort_keys=True).encode()).hexdigest()[:12],
        "status": status,
        "reason": None,
        "name": name,
        "seed": seed,
        "started": "2026-11-22T07:00:00Z",
        "config": config,
        "data": {"name": "corpus", "hash": "9c1f22aa01" * 6, "train_bytes": 41_203_112, "heldout_bytes": 262_144,
                 "window": window, "bytes_per_token": 1.0},
        "model": {"params": shape["params"], "params_by_group": {"embedding": 32768, "mixer": 1_100_000},
                  "state_per_layer": shape["state"], "state_total": 4 * shape["state"],
                  "state_bytes": 16 * shape["state"], "projection_ratio": shape.get("ratio"),
                  "dim_over_inner": shape.get("ratio"), "flops_per_token": 7.2e6},
        "results": {"train_loss": loss(steps * batch * window), "train_loss_steps": min(100, steps), "heldout_bpb": bpb,
                    "heldout_interval": [bpb - 0.021, bpb + 0.021], "heldout_windows": 1024, "steps": steps,
                    "tokens": steps * batch * window, "bytes": steps * batch * window, "seconds": seconds,
                    "tokens_per_second": speed, "tokens_per_second_spread": [speed * 0.93, speed * 1.03],
                    "compile_seconds": 3.1, "eval_seconds": 1.9, "checkpoint_seconds": 0.2, "wall_seconds": seconds + 6,
                    "peak_memory_bytes": 812_000_000, "mfu": 0.21, "diverged_step": None},
        "curve": curve,
        "heldout_curve": heldout,
        "heldout_by_position": [{"position": 2**p, "bpb": bpb + 2.0**-p} for p in range(9)],
        "environment": {"hardware": "AMD EPYC 7763, 2 threads", "versions": {"python": "3.11.7", "torch": "2.13.0",
                        "numba": "0.62.1", "e88": "0.1.0"}, "commit": "0f92853aa01b", "backends": ["numba"],
                        "platform": "Linux-6.1-x86_64", **shape.get("environment", {})},
    }  # fmt: skip
    if status == "diverged":
        record["reason"] = f"the loss was not finite at step {curve[-1]['step']}"
        for index, point in enumerate(curve[-20:]):
            point["loss"] += math.exp(0.4 * index)
        curve[-1]["loss"] = None
        record["heldout_curve"] = [point for point in heldout if point["seconds"] < curve[-1]["seconds"]]
        record["heldout_by_position"] = []
        record["results"] |= {"heldout_bpb": None, "heldout_interval": None, "train_loss": float("nan"),
                              "steps": curve[-1]["step"], "diverged_step": curve[-1]["step"]}  # fmt: skip
    if status == "failed":
        record["reason"] = "out of memory: 1.2 GiB asked for, 0.8 GiB free"
        for key in ("results", "curve", "heldout_curve", "heldout_by_position", "data", "environment"):
            del record[key]
    return record


def make_study() -> list[dict[str, Any]]:
    """Four models over three seeds, one that diverged and one that failed."""
    records = [make_record(name, seed) for name in SHAPES for seed in range(3)]
    records += [make_record("tiny-e88-wide", seed, "diverged", state=65536, ratio=4.0) for seed in range(1)]
    return [*records, make_record("tiny-e88-huge", 0, "failed", ratio=8.0)]


SPEC = """
title = "A study of widths"
source = "the test of <this> & that"
data = "{data}"
[training]
batch_size = 4
window = 16
heldout_bytes = 2000
[scales.smoke]
seeds = 3
shrink = {{ width = 1, depth = 2 }}
[budgets.run]
exclusive = true
smoke = {{ steps = 40 }}
[budgets.again]
smoke = {{ steps = 40 }}
[budgets.short]
smoke = {{ steps = 20 }}
[models."w{{dim}}"]
kind = "e88"
depth = 2
n_heads = 2
n_state = 8
vary = {{ dim = [16, 24, 32, 48] }}
[models.gdn]
kind = "gated_deltanet"
dim = 16
depth = 2
n_heads = 2
head_dim = 8
[claims.wider]
says = "Wider is better"
source = "a test"
order = ["w48", "w32", "w24", "w16"]
[claims.rival]
says = "The rival is behind w48"
source = "a test"
lower = ["w48", "gdn"]
budget = "again"
[claims.quick]
says = "Twenty steps are enough"
source = "a test"
lower = ["w32", "w16"]
budget = "short"
[claims.both]
says = "All of it"
source = "a test"
all = ["wider", "rival"]
[claims.counted]
says = "w48 has more parameters"
source = "a test"
higher = ["w48", "w16"]
metric = "params"
"""


@pytest.fixture
def study_store(text: Path, tmp_path: Path) -> Any:
    """Make (experiment, store) of a study of 24 runs. status: of a run; None leaves it out. edit: of its spec."""

    def make(
        status: Callable[[str, str, int], str | None] = lambda model, budget, seed: "done",
        edit: Callable[[str], str] = lambda spec: spec,
    ) -> Any:
        path = tmp_path / "widths.toml"
        path.write_text(edit(SPEC).format(data=text))
        experiment = load_study(path).at("smoke")
        store = Store(tmp_path / "store")
        written = set()
        for (model, budget, seed), run in experiment.planned.items():
            became = status(model, budget, seed)
            if became is None or run.id in written:
                continue
            written.add(run.id)
            name = "tiny-gdn" if model == "gdn" else "tiny-e88"
            width = run.spec.model.dim
            record = make_record(name, seed, became, points=60, floor=1.6 - 0.004 * width)
            config = {"model": run.spec.model.to_dict(), "training": run.spec.training.to_dict()}
            record |= {"id": run.id, "name": model, "config": config, "model": describe(run.spec.model, window=16)}
            record.setdefault("results", {})
            record.setdefault("environment", {})
            store.append(record)
        return experiment, store.folder

    return make


@pytest.fixture(name="make_record")
def _make_record() -> Any:
    return make_record


@pytest.fixture
def study() -> list[dict[str, Any]]:
    return make_study()
