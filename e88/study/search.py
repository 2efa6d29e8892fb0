"""A search over shapes of one parameter count and the learning rate. Optuna chooses; each trial is a run of the store.

Optuna's journal lies beside the store. What is in it and in the store is all that a search knows: it can be killed at
any moment, and the same command goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from e88.errors import UserError
from e88.models.config import E88Config
from e88.sizing.closed_form import count_params
from e88.sizing.fit import fit
from e88.sizing.units import human_count
from e88.study.folder import RunFolder, try_lock
from e88.study.plan import PlannedRun, Planner
from e88.study.scheduler import State
from e88.study.spec import RunSpec
from e88.study.store import Record, Store

if TYPE_CHECKING:
    import optuna

JOURNAL = "optuna.jsonl"
SAMPLERS = ("tpe", "cmaes")
# Trials that are compared before any is pruned.
UNPRUNED = 4
# Points of the space in a row at which no shape has the count.
MOST_MISSES = 200


@dataclass(frozen=True)
class Space:
    """Low and high end of each range. ratio: n_heads * n_state / dim. n_state: every value to try, ascending."""

    depth: tuple[int, int]
    ratio: tuple[float, float]
    n_state: tuple[int, ...]
    lr: tuple[float, float]


class Search:
    """Feeds `run_all` with trials of E88 models of `target` parameters (within `tolerance`, relative), and prunes them.

    base: everything that is not searched for; its `eval_points` are where trials may be pruned. trials: how many in
    all, at most `slots` at once. Raises UserError where Optuna is missing or the store is of another search.
    """

    def __init__(
        self, base: RunSpec, target: int, tolerance: float, space: Space, store: Path, *, trials: int, slots: int = 1,
        exclusive: bool = False, sampler: str = "tpe", prune: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.base, self.target, self.tolerance, self.space = base, target, tolerance, space
        self.store, self.trials, self.slots, self.exclusive = store, trials, slots, exclusive
        self.planner = Planner()
        self.study = _open(store, self._settings(), sampler, prune, seed)
        # Both outlive a search that was cut off: what it had begun is begun again, from its checkpoint.
        for trial in self.study.get_trials(deepcopy=False, states=[_state("RUNNING")]):
            self.study.tell(trial.number, state=_state("FAIL"))
            self.study.enqueue_trial(trial.params)
        self.running: dict[str, list[optuna.Trial]] = {}
        self.misses = 0

    def feed(self, state: State) -> list[PlannedRun]:
        """Tell Optuna what has ended and how far the others are; further trials where there is room."""
        for run_id, trials in list(self.running.items()):
            if run_id in state.ended:
                del self.running[run_id]
                record = RunFolder(self.store, run_id).record()
                assert record is not None
                for trial in trials:
                    self._tell(trial, record)
            else:
                self._report(run_id, trials)
        new: list[PlannedRun] = []
        while len(self.running) < self.slots and len(self.ended()) + sum(map(len, self.running.values())) < self.trials:
            if planned := self._ask():
                new.append(planned)
        return new

    def ended(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that count: those with a run that has ended."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished() and "status" in t.user_attrs]

    def best(self) -> optuna.trial.FrozenTrial | None:
        """The trial of the lowest held-out bits per byte; None where none is done."""
        done = [t for t in self.ended() if t.user_attrs["status"] == "done"]
        return min(done, key=lambda t: t.user_attrs["bpb"], default=None)

    def spec(self, params: dict[str, Any], name: str) -> RunSpec | None:
        """The run at a point of the space; None where no shape there has the count."""
        n_state = self.space.n_state[params["n_state"]]
        model = fit(
            self.target, self.base.model, depth=params["depth"], n_state=n_state, ratio=params["ratio"],
            tolerance=self.tolerance,
        )  # fmt: skip
        if model is None:
            return None
        return replace(self.base, name=name, model=model, training=replace(self.base.training, lr=params["lr"]))

    def _ask(self) -> PlannedRun | None:
        """Begin a trial; its run, unless that is known or has begun already."""
        trial, space = self.study.ask(), self.space
        params = {
            "depth": trial.suggest_int("depth", *space.depth, log=True),
            "ratio": trial.suggest_float("ratio", *space.ratio, log=True),
            # An index, so that near ones are near.
            "n_state": trial.suggest_int("n_state", 0, len(space.n_state) - 1),
            "lr": trial.suggest_float("lr", *space.lr, log=True),
        }
        spec = self.spec(params, f"trial-{trial.number}")
        if spec is None:
            self.study.tell(trial, state=_state("FAIL"))
            self.misses += 1
            if self.misses >= MOST_MISSES:
                raise UserError(
                    f"no shape within {self.tolerance:.1%} of {human_count(self.target)} parameters at {MOST_MISSES} "
                    "points of the space; widen --depth, --n-state or --tolerance"
                )
            return None
        self.misses = 0
        planned = self.planner.plan(spec, self.exclusive)
        mixer = planned.spec.model.mixer
        assert isinstance(mixer, E88Config)
        shape = {
            "run": planned.id, "dim": planned.spec.model.dim, "depth": planned.spec.model.depth,
            "heads": mixer.n_heads, "n_state": mixer.n_state, "params": count_params(planned.spec.model),
            "lr": planned.spec.training.lr,
        }  # fmt: skip
        for key, value in shape.items():
            trial.set_user_attr(key, value)
        if planned.id in self.running:
            self.running[planned.id].append(trial)
        elif record := Store(self.store).get(planned.id):
            self._tell(trial, record)
        else:
            self.running[planned.id] = [trial]
            return planned
        return None

    def _report(self, run_id: str, trials: list[optuna.Trial]) -> None:
        progress = RunFolder(self.store, run_id).progress() or {}
        training = self.base.training
        points = training.eval_points + 1
        for point in progress.get("heldout", ()):
            index, bpb = training.points_passed(point["used"]), point["bpb"]
            for trial in trials:
                if index in self.study.trials[trial.number].intermediate_values:
                    continue
                trial.report(bpb, index)
                if trial.should_prune():
                    reason = f"{bpb:.4f} bits per byte at {index}/{points} of the budget is above the median there"
                    RunFolder(self.store, run_id).prune(reason)

    def _tell(self, trial: optuna.Trial, record: Record) -> None:
        status, bpb = record["status"], record["results"].get("heldout_bpb")
        trial.set_user_attr("status", status)
        trial.set_user_attr("bpb", bpb)
        trial.set_user_attr("reason", record["reason"])
        if status == "done":
            self.study.tell(trial, bpb)
        elif status == "diverged":
            # Worse than any other.
            self.study.tell(trial, math.inf)
        else:
            self.study.tell(trial, state=_state("PRUNED" if status == "pruned" else "FAIL"))

    def _settings(self) -> dict[str, Any]:
        """What must not change between calls."""
        base = {key: value for key, value in self.base.to_dict().items() if key != "name"}
        return {"run": base, "target": self.target, "tolerance": self.tolerance, "space": asdict(self.space)}


def lock_store(store: Path) -> IO[str]:
    """The right to search in this store, held until the file is closed. UserError where another search has it."""
    lock = try_lock(store / ".search")
    if lock is None:
        raise UserError(f"another search works in {store}; wait for it, or choose another --out")
    return lock


def _open(store: Path, settings: dict[str, Any], sampler: str, prune: bool, seed: int) -> optuna.Study:
    """The search in a store that is locked: a new one, or the one that is there if it has the same settings."""
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; known: {', '.join(SAMPLERS)}")
    needed = ("optuna", "cmaes") if sampler == "cmaes" else ("optuna",)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"e88 search needs the {missing[0]} package; pip install 'e88[search]'")
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Held(JournalFileOpenLock):
        """The store's lock is enough; unlike Optuna's own it ends with the process."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = store / JOURNAL
    _close_torn_line(journal)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock_obj=Held(str(journal))))
    study = optuna.create_study(storage=storage, study_name="search", direction="minimize", load_if_exists=True)
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", settings)
    elif known != json.loads(json.dumps(settings)):
        raise UserError(f"{store} holds a search with other options; repeat its options, or choose another --out")
    # A sampler begins anew in each process: with the same seed it would repeat its first trials.
    seed += len(study.get_trials(deepcopy=False))
    study.sampler = (
        optuna.samplers.CmaEsSampler(seed=seed)
        if sampler == "cmaes"
        else optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    )
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED) if prune else optuna.pruners.NopPruner()
    return study


def _close_torn_line(journal: Path) -> None:
    """Cut off what a kill left of a last line."""
    if journal.exists():
        data = journal.read_bytes()
        if not data.endswith(b"\n"):
            journal.write_bytes(data[: data.rfind(b"\n") + 1])


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def rows(search: Search) -> list[dict[str, Any]]:
    """Every trial that has a shape, the best first, then by status: number, status, bpb (held out; the last on the way
    where it was not done), dim, depth, heads, n_state, params, lr, run."""
    found = []
    for trial in search.study.get_trials(deepcopy=False):
        if "run" not in trial.user_attrs:
            continue
        attributes = dict(trial.user_attrs)
        # A trial that was cut off goes on as another.
        status = attributes.pop("status", "running" if trial.state == _state("RUNNING") else None)
        if status is None:
            continue
        bpb = attributes.pop("bpb", None)
        if bpb is None and trial.intermediate_values:
            bpb = trial.intermediate_values[max(trial.intermediate_values)]
        attributes.pop("reason", None)
        found.append({"trial": trial.number, "status": status, "bpb": bpb, **attributes})
    order = ("done", "running", "pruned", "diverged", "failed")
    return sorted(found, key=lambda row: (order.index(row["status"]), row["bpb"] or math.inf, row["trial"]))
