"""Starting, saving and resuming a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e88.data.corpus import Corpus
from e88.errors import UserError
from e88.models.config import ModelConfig
from e88.models.lm import LanguageModel, LMState
from e88.training.budget import Clock
from e88.training.checkpoint import flatten, load_tensors, restore_model, save_tensors, unflatten
from e88.training.config import TrainingConfig, identity
from e88.training.distributed import Group
from e88.training.optimizer import Optimizer
from e88.training.record import utc_now
from e88.training.run import Run
from e88.training.step import Carry
from e88.training.steplog import StepLog, read_entries

CHECKPOINT = "checkpoint.safetensors"
BAD_STEP = "bad_step.safetensors"
LOG = "log.jsonl"


def start(
    model_config: ModelConfig,
    config: TrainingConfig,
    corpus: Corpus,
    folder: Path,
    *,
    name: str,
    group: Group,
    resume: bool,
    size: dict[str, Any],
) -> Run:
    """A run ready for its next step: fresh, or as the folder's checkpoint left it, in however many processes."""
    path = folder / CHECKPOINT
    opened: list[tuple[dict[str, Tensor], StepLog]] = []

    def open_folder() -> dict[str, Any] | None:
        tensors: dict[str, Tensor] = {}
        saved = None
        if resume and path.exists():
            tensors, saved = _load_checkpoint(path, model_config, config, corpus)
        # An empty log is what a refused option leaves: no run that could be lost.
        if not resume and (path.exists() or any(read_entries(folder / LOG))):
            raise UserError(f"{folder} already holds a run; use --resume to go on with it, or another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            opened.append((tensors, StepLog(folder / LOG, keep_until=saved["step"] if saved else 0)))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
        return saved

    # Only the first process needs to see the folder.
    saved = group.shared(open_folder)
    tensors, log = opened[0] if opened else ({}, StepLog(None))
    torch.manual_seed(config.seed)
    model = LanguageModel(model_config)
    if saved:
        weights = group.spread({name: t for name, t in tensors.items() if name.startswith("model.")})
        restore_model(model, weights, path)
    model.to(group.device).train()
    model.set_backend(config.backend)
    nll, ddp = group.wrap(model)
    run = Run(
        name=name, model_config=model_config, config=config, corpus=corpus, folder=folder, group=group, model=model,
        nll=nll, ddp=ddp, carry=Carry(model) if config.carry > 1 else None, optimizer=Optimizer(model, config),
        clock=Clock(group.device), log=log, started=utc_now(), wall_start=time.perf_counter(), size=size,
    )  # fmt: skip
    if saved:
        rest = {name: t for name, t in tensors.items() if not name.startswith("model.")}
        _restore(run, group.spread(rest, lambda name, t: group.place(t, _owner(run, name))), saved)
    return run


def save(run: Run) -> None:
    """Write the checkpoint in place of the last one, whole or not at all.

    The file is the same however many processes write it: any number of them can go on from it.
    Weights that are not finite (an update that overflowed, whose run ends with the next step) leave the last one there.
    """
    with run.clock.section("checkpoint"):
        run.log.sync()
        tensors: dict[str, Tensor] = {"rng.torch": torch.get_rng_state()}
        optimizer = flatten(run.optimizer.state_dict(), "optimizer", tensors)
        carried = _carried(run, tensors)
        with run.optimizer.averaged(run.model) as trained:
            tensors |= {f"model.{name}": t for name, t in run.model.state_dict().items()}
            tensors |= {f"trained.{name}": t for name, t in trained.items()}
            _gather(run, tensors)
            meta = {
                "kind": "run", **_identity(run), "tokens": run.tokens,
                "seconds": run.clock.seconds, "wall": time.perf_counter() - run.wall_start,
                "started": run.started, "heldout": run.heldout, "due": run.due,
                "optimizer": optimizer, "carried": carried,
            }  # fmt: skip
            weights = [t for name, t in tensors.items() if name.startswith(("model.", "trained."))]
            if run.group.shared(lambda: all(bool(t.isfinite().all()) for t in weights)):
                run.group.shared(lambda: save_tensors(run.folder / CHECKPOINT, tensors, meta))


def save_bad_step(run: Run, batch: np.ndarray, loss: float, grad_norm: float) -> None:
    """Write what `e88.training.replay` needs to repeat the step that could not be taken: the weights before it, its
    batch [B, T + 1] of all processes, and the states that it went on from."""
    with run.clock.section("checkpoint"):
        tensors = {f"model.{name}": t for name, t in run.model.state_dict().items()}
        carried = _carried(run, tensors)
        _gather(run, tensors)
        tensors["batch"] = torch.from_numpy(batch)
        meta = {
            "kind": "bad step", **_identity(run), "seed": run.config.seed, "loss": loss, "grad_norm": grad_norm,
            "parallel": run.group.describe(), "carried": carried,
        }  # fmt: skip
        run.group.shared(lambda: save_tensors(run.folder / BAD_STEP, tensors, meta))


def forget_bad_step(run: Run) -> None:
    """Remove the bad step of an earlier try, which this run got past."""
    run.group.shared(lambda: (run.folder / BAD_STEP).unlink(missing_ok=True))


def forget_checkpoint(run: Run) -> None:
    """Remove the checkpoint of a run that has ended."""
    run.group.shared(lambda: (run.folder / CHECKPOINT).unlink(missing_ok=True))


def _gather(run: Run, tensors: dict[str, Tensor]) -> None:
    """Put tensors that are in shards together in the first process, one at a time; the others are left with none."""
    for key, tensor in tensors.items():
        full = run.group.whole(tensor)
        tensors[key] = full.cpu() if run.group.is_first else torch.empty(0)


def _carried(run: Run, tensors: dict[str, Tensor]) -> Any:
    return flatten(run.carry.before if run.carry else {}, "carried", tensors)


def carried(tensors: dict[str, Tensor], meta: dict[str, Any], device: torch.device) -> dict[int, LMState]:
    """The states from which the next step of a checkpoint goes on, or the bad step itself: see `Carry.before`."""
    own = {name: t.to(device) for name, t in tensors.items() if name.startswith("carried.")}
    states: dict[int, LMState] = unflatten(meta["carried"], own)
    return states


def _identity(run: Run) -> dict[str, Any]:
    """What both files say of the run, and how far it is."""
    return {
        "name": run.name, "model": run.model_config.to_dict(), "training": run.config.to_dict(),
        "data": run.corpus.describe(), "tokenizer": run.corpus.codec.to_dict(), "step": run.step,
    }  # fmt: skip


def _load_checkpoint(
    path: Path, model_config: ModelConfig, config: TrainingConfig, corpus: Corpus
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "run":
        raise UserError(f"{path} is not a training checkpoint; choose another --out")
    found = identity(meta["model"], meta["training"], meta["data"]["hash"])
    wanted = identity(model_config.to_dict(), config.to_dict(), corpus.hash)
    if found != wanted:
        differing = _first_difference(found, wanted)
        raise UserError(
            f"{path} is of another configuration ({differing}); repeat its options, or choose another --out"
        )
    return tensors, meta


def _first_difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return f"{where}: {old} there, {new} asked for"


def _owner(run: Run, name: str) -> Tensor | None:
    """The parameter that a saved tensor belongs to: `trained.NAME` or `optimizer.PART.state.INDEX.KEY`."""
    kind, *rest = name.split(".")
    if kind == "trained":
        return run.model.get_parameter(".".join(rest))
    if kind == "optimizer" and rest[1] == "state":
        return run.optimizer.owner(int(rest[0]), int(rest[2]))
    return None


def _restore(run: Run, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    run.optimizer.load_state_dict(unflatten(meta["optimizer"], tensors))
    trained = {n.removeprefix("trained."): t for n, t in tensors.items() if n.startswith("trained.")}
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name in trained:
                parameter.copy_(trained[name])
    torch.set_rng_state(tensors["rng.torch"])
    run.step, run.tokens, run.heldout = meta["step"], meta["tokens"], meta["heldout"]
    # Older checkpoints do not say.
    run.due = meta.get("due", False)
    run.clock.seconds.update(meta["seconds"])
    if run.carry:
        run.carry.before = carried(tensors, meta, run.device)
    run.started = meta["started"]
    run.wall_start -= meta["wall"]
