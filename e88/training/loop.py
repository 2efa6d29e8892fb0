"""Training under a budget: one loop for every model, on one synchronised clock."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from e88.data.corpus import Corpus
from e88.data.loader import HeldOutWindows, WindowSampler, heldout_windows
from e88.errors import UserError
from e88.models.config import ModelConfig
from e88.ops import record_backends
from e88.runtime import peak_memory_bytes
from e88.sizing.closed_form import describe
from e88.training import record, state
from e88.training.config import TrainingConfig
from e88.training.distributed import Group
from e88.training.evaluate import HeldOut, evaluate
from e88.training.forensics import trace
from e88.training.layers import LayerStats
from e88.training.room import refuse_hopeless, told_of_lack
from e88.training.run import Run
from e88.training.step import Carry, autocast, backward
from e88.training.tensorboard import Scalars
from e88.training.verify import verify

# Takes a point of the held-out curve and the used share of the budget.
OnEvaluation = Callable[[dict[str, Any], float], None]


class Reporter(Protocol):
    """Whoever shows a run as it goes."""

    def step(self, entry: dict[str, Any], used: float, seconds_left: float) -> None:
        """Called after each step with its log entry, the used share of the budget, and the training time left.

        May raise Pruned.
        """


class Pruned(Exception):
    """Raised by the reporter of a run in one process to end it early; says why in one line."""


class Interrupted(Exception):
    """A stop was asked for (Ctrl-C, SIGTERM); the checkpoint is written and the run can be resumed."""


def train(
    model_config: ModelConfig,
    config: TrainingConfig,
    corpus: Corpus,
    folder: str | Path,
    *,
    name: str = "model",
    group: Group | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    tensorboard: bool = False,
    on_evaluation: OnEvaluation | None = None,
    keep_checkpoint: bool = True,
) -> dict[str, Any]:
    """Train a model until its budget is spent and return the run's record (see docs/records.md).

    folder: receives log.jsonl, checkpoint.safetensors and record.json. group: the processes and their device, one on
    the CPU where None; all of them call this, and the first alone writes. resume: go on from the checkpoint there.
    on_evaluation: called in the first process after a held-out evaluation on the way. keep_checkpoint: leave the last
    one there when the budget is spent; otherwise it is not even written.
    Raises UserError for wrong input and for want of memory, Interrupted when stopped by a signal (after writing a
    checkpoint), RanksLost where another process died. A run whose loss or gradients stop being finite, or whose last
    weights or held-out score are not, ends with status `diverged`, the last good checkpoint in place, and beside it
    bad_step.safetensors, from which `e88.training.replay` repeats that step, or the one that would have come.
    """
    group, folder = group or Group(torch.device("cpu")), Path(folder)
    with group.watched(), told_of_lack(model_config, config, group):
        return _train(
            model_config, config, corpus, folder, name, group, resume, reporter, tensorboard, on_evaluation,
            keep_checkpoint,
        )  # fmt: skip


def _train(
    model_config: ModelConfig, config: TrainingConfig, corpus: Corpus, folder: Path, name: str, group: Group,
    resume: bool, reporter: Reporter | None, tensorboard: bool, on_evaluation: OnEvaluation | None,
    keep_checkpoint: bool,
) -> dict[str, Any]:  # fmt: skip
    group.check(config)
    refuse_hopeless(model_config, config, group)
    if corpus.vocab_size > model_config.vocab_size:
        raise UserError(
            f"{corpus.name} has {corpus.vocab_size} token ids, the model {model_config.vocab_size}; "
            f"set vocab_size = {corpus.vocab_size}"
        )
    sampler = WindowSampler(
        corpus.train, config.window, config.batch_size, config.seed, config.carry, config.sampling
    )
    scored = config.heldout_window or config.window
    heldout = heldout_windows(corpus.valid, scored, config.heldout_bytes, config.heldout_context)
    size = describe(model_config, window=config.span)
    run = state.start(model_config, config, corpus, folder, name=name, group=group, resume=resume, size=size)
    try:
        with run.clock.section("compile"):
            run.check = group.agreed(lambda: verify(model_config, config, group.device, run.rows))
        with record_backends() as run.backends, _stop_requested(group) as stop:
            with run.clock.section("compile"):
                _warm_up(run)
            observers = [reporter] if reporter and group.is_first else []
            if tensorboard and group.is_first:
                observers.append(Scalars(folder))
            result = None
            try:
                reason = _spend(run, sampler, heldout, observers, stop, on_evaluation)
                if reason is None:
                    result, reason = _score(run, sampler, heldout)
                status = "diverged" if reason else "done"
            except Pruned as pruned:
                reason, status = str(pruned), "pruned"
            keep_checkpoint |= status == "diverged"
            if keep_checkpoint:
                state.save(run)
            if status != "diverged":
                state.forget_bad_step(run)
    except Interrupted:
        state.save(run)
        raise Interrupted(f"stopped at step {run.step}; go on with the same command and --resume") from None
    finally:
        run.log.close()
    peak_memory = max(group.gather(peak_memory_bytes(group.device)))
    finished = group.shared(lambda: record.finish(run, status, result, reason, peak_memory))
    if not keep_checkpoint:
        state.forget_checkpoint(run)
    return finished


def _spend(
    run: Run, sampler: WindowSampler, heldout: HeldOutWindows, observers: list[Reporter], stop: threading.Event,
    on_evaluation: OnEvaluation | None,
) -> str | None:  # fmt: skip
    """Take steps until the budget is spent; the reason where the run diverged."""
    saves = False
    while run.used < 1:
        if run.due:
            finite = math.isfinite(_evaluate(run, heldout).bpb)
            run.due = False
            if finite and on_evaluation and run.group.is_first:
                on_evaluation(run.heldout[-1], run.used)
        if saves:
            state.save(run)
        before, used = run.clock.seconds["train"], run.used
        reason = _train_step(run, sampler)
        if reason:
            return reason
        for observer in observers:
            observer.step(run.log.entries[-1], run.used, _seconds_left(run))
        # One clock is the run's, and a signal to any process is one to all.
        run.clock.seconds["train"], stops = _agree(run, stop)
        now = run.clock.seconds["train"]
        point = run.config.points_passed(run.used) > run.config.points_passed(used)
        run.due = point or _due(run.config.eval_every, before, now)
        if stops:
            raise Interrupted
        saves = _due(run.config.checkpoint_every, before, now)
    return None


def _score(run: Run, sampler: WindowSampler, heldout: HeldOutWindows) -> tuple[HeldOut | None, str | None]:
    """The held-out score at the end; or why there is none: the last update left weights or a score not finite."""
    # Of weights in shards, the ones that are here.
    own = [p.to_local() if hasattr(p, "to_local") else p for p in run.model.parameters()]
    (bad,) = run.group.sum([float(not all(bool(p.isfinite().all()) for p in own))])
    result = None if bad else _evaluate(run, heldout)
    if result and math.isfinite(result.bpb):
        return result, None
    what = "the weights are" if bad else "the held-out score is"
    return None, f"after the last step {what} not finite: {_train_step(run, sampler, update=False)}"


def _agree(run: Run, stop: threading.Event) -> tuple[float, bool]:
    """The training seconds on the first process's clock, and whether a stop was asked of any process."""
    own = run.clock.seconds["train"] if run.group.is_first else 0.0
    seconds, stops = run.group.sum([own, float(stop.is_set())])
    return seconds, stops > 0


def _due(every: float, before: float, now: float) -> bool:
    """Whether a multiple of `every` was passed."""
    return every > 0 and now // every > before // every


def _train_step(run: Run, sampler: WindowSampler, *, update: bool = True) -> str | None:
    """One optimiser step; the reason where it could not be taken, and then nothing changed.

    Without `update` it is not taken whatever its numbers are.
    """
    config = run.config
    lr = run.optimizer.set_used(run.used)
    before = run.clock.seconds["train"]
    with run.clock.section("train"):
        batch = sampler.batch(run.step)
        windows = torch.from_numpy(batch[run.group.rows(len(batch))]).to(run.device)
        sampled = config.layers_every > 0 and run.step % config.layers_every == 0
        stats = LayerStats(run.model, run.group) if sampled else None
        with stats.watching() if stats else nullcontext():
            loss = backward(run.nll, windows, config, run.ddp, run.carry)
        layers = {"layers": stats.read()} if stats else {}
        norm = run.optimizer.clip(config.clip or math.inf, run.group)
        values = run.group.mean(torch.stack([loss, norm])).tolist()
        taken = update and all(math.isfinite(v) for v in values)
        if taken:
            run.optimizer.step()
    if not taken:
        state.save_bad_step(run, batch, *values)
        repeat = partial(backward, run.nll, windows, config, run.ddp, run.carry)
        found = trace(run.model, windows, config, run.group, repeat, run.carry)
        # The process whose own loss is not finite knows most.
        return min(run.group.gather((math.isfinite(loss), found.explain(run.step))))[1]
    run.optimizer.zero_grad()
    run.step += 1
    if run.carry:
        run.carry.advance(jumps=run.step % config.carry == 0)
    step_tokens = batch.shape[0] * (batch.shape[1] - 1)
    run.tokens += step_tokens
    now = run.clock.seconds["train"]
    run.log.append(
        {"step": run.step, "tokens": run.tokens, "seconds": now, "loss": values[0], "lr": lr, "grad_norm": values[1],
         "step_tokens": step_tokens, "step_seconds": now - before, **layers}
    )  # fmt: skip
    return None


def _warm_up(run: Run) -> None:
    """Forward and backward on random tokens, so that compilation and autotuning fall outside the budget."""
    generator = torch.Generator().manual_seed(0)
    shape = (run.config.batch_size // run.group.world, run.config.window + 1)
    windows = torch.randint(run.model_config.vocab_size, shape, generator=generator).to(run.device)
    carry = Carry(run.model) if run.carry else None
    for _ in range(2):
        backward(run.nll, windows, run.config, run.ddp, carry)
        run.optimizer.zero_grad()
        if carry:
            carry.advance(jumps=False)


def _evaluate(run: Run, heldout: HeldOutWindows) -> HeldOut:
    # As many tokens at once as in training.
    rows = max(1, run.rows * run.config.window // heldout.scored.shape[1])
    with run.clock.section("evaluate"), run.optimizer.averaged(run.model), autocast(run.device, run.config.precision):
        result = evaluate(run.model, run.corpus, heldout, rows, run.group)
    seconds = run.clock.seconds["train"]
    # A run killed after its last checkpoint evaluates that step once more.
    run.heldout = [point for point in run.heldout if point["step"] < run.step]
    # What is not finite is no point of a curve, and no JSON; the run ends as diverged with the next step.
    if math.isfinite(result.bpb):
        run.heldout.append({"step": run.step, "tokens": run.tokens, "seconds": seconds, "bpb": result.bpb})
    return result


def _seconds_left(run: Run) -> float:
    return run.clock.seconds["train"] * (1 / run.used - 1) if run.used > 0 else math.inf


@contextmanager
def _stop_requested(group: Group) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one interrupts at once.

    Of several processes none does so: torchrun passes on a Ctrl-C that each has had itself, and ends those that hang.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(_number: int, _frame: object) -> None:
        if event.is_set() and group.world == 1:
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
