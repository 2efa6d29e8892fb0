"""Training under a budget: one loop for every model, on one synchronised clock."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from e88.data.corpus import Corpus
from e88.data.loader import WindowSampler, heldout_windows
from e88.errors import UserError
from e88.models.config import ModelConfig
from e88.ops import record_backends
from e88.runtime import peak_memory_bytes
from e88.sizing.closed_form import describe
from e88.training import record, state
from e88.training.config import TrainingConfig
from e88.training.evaluate import HeldOut, evaluate
from e88.training.forensics import explain
from e88.training.run import Run
from e88.training.verify import verify


class Reporter(Protocol):
    """Whoever shows a run as it goes."""

    def step(self, entry: dict[str, Any], used: float, seconds_left: float) -> None:
        """Called after each step with its log entry, the used share of the budget, and the training time left."""


class Interrupted(Exception):
    """A stop was asked for (Ctrl-C, SIGTERM); the checkpoint is written and the run can be resumed."""


def train(
    model_config: ModelConfig,
    config: TrainingConfig,
    corpus: Corpus,
    folder: str | Path,
    *,
    name: str = "model",
    device: torch.device | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train a model until its budget is spent and return the run's record (see docs/records.md).

    folder: receives log.jsonl, checkpoint.safetensors and record.json. resume: go on from the checkpoint there.
    Raises UserError for wrong input, Interrupted when stopped by a signal (after writing a checkpoint). A run whose
    loss or gradients stop being finite ends with status `diverged` and the last good checkpoint in place.
    """
    device, folder = device or torch.device("cpu"), Path(folder)
    if corpus.vocab_size > model_config.vocab_size:
        raise UserError(
            f"{corpus.name} has {corpus.vocab_size} token ids, the model {model_config.vocab_size}; "
            f"set vocab_size = {corpus.vocab_size}"
        )
    sampler = WindowSampler(corpus.train, config.window, config.batch_size, config.seed)
    heldout = heldout_windows(corpus.valid, config.window, config.heldout_bytes)
    size = describe(model_config, window=config.window)
    run = state.start(model_config, config, corpus, folder, name=name, device=device, resume=resume, size=size)
    try:
        with run.clock.section("compile"):
            run.check = verify(model_config, config, device)
        with record_backends() as run.backends, _stop_requested() as stop:
            with run.clock.section("compile"):
                _warm_up(run)
            observers = [reporter] if reporter else []
            if tensorboard:
                observers.append(Scalars(folder))
            reason = _spend(run, sampler, heldout, observers, stop)
            result = None if reason else _evaluate(run, heldout)
            state.save(run)
    except Interrupted:
        state.save(run)
        raise Interrupted(f"stopped at step {run.step}; go on with the same command and --resume") from None
    finally:
        run.log.close()
    return record.finish(run, result, reason, peak_memory_bytes(device))


def _spend(
    run: Run, sampler: WindowSampler, heldout: np.ndarray, observers: list[Reporter], stop: threading.Event
) -> str | None:
    """Take steps until the budget is spent; the reason where the run diverged."""
    while run.used < 1:
        before = run.clock.seconds["train"]
        reason = _train_step(run, sampler)
        if reason:
            return reason
        for observer in observers:
            observer.step(run.log.entries[-1], run.used, _seconds_left(run))
        if stop.is_set():
            raise Interrupted
        now = run.clock.seconds["train"]
        if run.used < 1 and _due(run.config.eval_every, before, now):
            _evaluate(run, heldout)
        if run.used < 1 and _due(run.config.checkpoint_every, before, now):
            state.save(run)
    return None


def _due(every: float, before: float, now: float) -> bool:
    """Whether a multiple of `every` seconds was passed."""
    return every > 0 and now // every > before // every


def _train_step(run: Run, sampler: WindowSampler) -> str | None:
    """One optimiser step; the reason where it could not be taken, and then nothing changed."""
    config = run.config
    lr = run.optimizer.set_used(run.used)
    before = run.clock.seconds["train"]
    with run.clock.section("train"):
        windows = torch.from_numpy(sampler.batch(run.step)).to(run.device)
        loss = _backward(run, windows)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip or math.inf)
        values = torch.stack([loss, norm]).tolist()
        finite = all(math.isfinite(v) for v in values)
        if finite:
            run.optimizer.step()
    if not finite:
        with autocast(run.device, config.precision):
            return explain(run.model, windows, values[0], run.step)
    run.optimizer.zero_grad()
    run.step += 1
    step_tokens = windows.shape[0] * (windows.shape[1] - 1)
    run.tokens += step_tokens
    now = run.clock.seconds["train"]
    run.log.append(
        {"step": run.step, "tokens": run.tokens, "seconds": now, "loss": values[0], "lr": lr, "grad_norm": values[1],
         "step_tokens": step_tokens, "step_seconds": now - before}
    )  # fmt: skip
    return None


def _backward(run: Run, windows: Tensor) -> Tensor:
    """Accumulate the gradient of the mean loss over all of windows, in `accumulate` parts; returns that mean."""
    count = windows.shape[0] * (windows.shape[1] - 1)
    total = torch.zeros((), device=windows.device)
    for part in windows.chunk(run.config.accumulate):
        with autocast(run.device, run.config.precision):
            loss = run.model.nll(part).sum() / count
        loss.backward()
        total += loss.detach()
    return total


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast where asked for, or on a GPU under `auto`; nothing otherwise."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _warm_up(run: Run) -> None:
    """Forward and backward on random tokens, so that compilation and autotuning fall outside the budget."""
    generator = torch.Generator().manual_seed(0)
    shape = (run.config.batch_size, run.config.window + 1)
    windows = torch.randint(run.model_config.vocab_size, shape, generator=generator).to(run.device)
    for _ in range(2):
        _backward(run, windows)
        run.optimizer.zero_grad()


def _evaluate(run: Run, heldout: np.ndarray) -> HeldOut:
    part = max(run.config.batch_size // run.config.accumulate, 1)
    with run.clock.section("evaluate"), run.optimizer.averaged(run.model), autocast(run.device, run.config.precision):
        result = evaluate(run.model, run.corpus, heldout, part)
    seconds = run.clock.seconds["train"]
    # A run killed after its last checkpoint evaluates that step once more.
    run.heldout = [point for point in run.heldout if point["step"] < run.step]
    run.heldout.append({"step": run.step, "tokens": run.tokens, "seconds": seconds, "bpb": result.bpb})
    return result


def _seconds_left(run: Run) -> float:
    return run.clock.seconds["train"] * (1 / run.used - 1) if run.used > 0 else math.inf


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(_number: int, _frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


class Scalars:
    """A reporter that writes TensorBoard events."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError("--tensorboard needs the tensorboard package; pip install 'e88[track]'") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def step(self, entry: dict[str, Any], used: float, seconds_left: float) -> None:
        for key in ("loss", "lr", "grad_norm"):
            self.writer.add_scalar(f"train/{key}", entry[key], entry["step"])
        self.writer.add_scalar("train/tokens_per_second", entry["step_tokens"] / entry["step_seconds"], entry["step"])
