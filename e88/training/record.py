"""The record of a run: what ran, on what, how well (its fields are described in docs/records.md)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from e88.data.corpus import Corpus
from e88.files import write_text
from e88.models.config import ModelConfig
from e88.runtime import environment, peak_flops
from e88.training import layers, steplog
from e88.training.config import TrainingConfig, config_hash
from e88.training.evaluate import HeldOut
from e88.training.run import Run

SCHEMA = 1


def utc_now() -> str:
    """The time as in records: UTC, to the microsecond, so that two attempts at one run never begin at the same."""
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%fZ}"


def header(
    name: str, model: ModelConfig, config: TrainingConfig, corpus: Corpus, size: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of a record that is known before the run."""
    data = {
        **corpus.describe(),
        "heldout_bytes": config.heldout_bytes,
        "window": config.window,
    }
    keys = ("params", "params_by_group", "state_per_layer", "state_total", "state_bytes", "projection_ratio",
            "dim_over_inner", "flops_per_token")  # fmt: skip
    return {
        "schema": SCHEMA,
        "id": config_hash(model.to_dict(), config.to_dict(), corpus.hash),
        "name": name,
        "seed": config.seed,
        "config": {"model": model.to_dict(), "training": config.to_dict()},
        "data": data,
        "model": {key: size[key] for key in keys},
    }


def finish(run: Run, status: str, heldout: HeldOut | None, reason: str | None, peak_memory: int) -> dict[str, Any]:
    """The whole record; also written to record.json in the run's folder. `reason`: why it is not done, or None."""
    entries, seconds = run.log.entries, run.clock.seconds
    loss, loss_steps = steplog.last_loss(entries)
    rate, spread = steplog.throughput(entries)
    peak = peak_flops(run.device)
    world = run.group.world
    results = {
        "train_loss": loss,
        "train_loss_steps": loss_steps,
        "heldout_bpb": heldout.bpb if heldout else None,
        "heldout_interval": list(heldout.interval) if heldout else None,
        "heldout_windows": heldout.windows if heldout else None,
        "steps": run.step,
        "tokens": run.tokens,
        "bytes": round(run.tokens * run.corpus.bytes_per_token),
        "seconds": seconds["train"],
        "tokens_per_second": rate,
        "tokens_per_second_spread": spread,
        "compile_seconds": seconds["compile"],
        "eval_seconds": seconds["evaluate"],
        "checkpoint_seconds": seconds["checkpoint"],
        "wall_seconds": time.perf_counter() - run.wall_start,
        "peak_memory_bytes": peak_memory,
        "mfu": rate * run.size["flops_per_token"] / (peak * world) if rate and peak else None,
        "diverged_step": run.step if status == "diverged" else None,
    }
    record = {
        **header(run.name, run.model_config, run.config, run.corpus, run.size),
        "status": status,
        "reason": reason,
        "started": run.started,
        "results": results,
        "curve": steplog.curve(entries),
        "heldout_curve": run.heldout,
        "heldout_by_position": heldout.by_position if heldout else [],
        "layers": layers.summarise(entries),
        "environment": {
            **environment(run.device, sorted(run.backends) or ["torch"], world),
            "layer_check": run.check,
            "parallel": run.group.describe(),
        },
    }
    write_json(run.folder / "record.json", record)
    return record


def failed(
    name: str,
    model: ModelConfig,
    config: TrainingConfig,
    corpus: Corpus,
    size: Mapping[str, Any],
    device: torch.device,
    reason: str,
) -> dict[str, Any]:
    """The record of a run that ended without a result, with the reason in one line."""
    return {
        **header(name, model, config, corpus, size),
        "status": "failed",
        "reason": reason,
        "started": utc_now(),
        "results": {},
        "curve": [],
        "heldout_curve": [],
        "environment": environment(device, []),
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")
