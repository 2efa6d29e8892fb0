"""From runs as they are written down to runs with an id. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from e88.data.corpus import Corpus, open_corpus
from e88.study.spec import RunSpec
from e88.training.config import config_hash


@dataclass(frozen=True)
class PlannedRun:
    """id: the hash of everything that decides the run. exclusive: its speed is measured, so it runs alone. gpus,
    parallel: how many it is spread over (slots of the processor where there are none), `ddp` or `fsdp`."""

    id: str
    spec: RunSpec
    exclusive: bool = False
    gpus: int = 1
    parallel: str = "ddp"

    @property
    def title(self) -> str:
        return f"{self.spec.name}, seed {self.spec.training.seed}"


class Planner:
    """Gives runs their ids, opening each data set once."""

    def __init__(self) -> None:
        self._corpora: dict[tuple[str, str | None], Corpus] = {}

    def plan(self, spec: RunSpec, exclusive: bool = False, gpus: int = 1, parallel: str = "ddp") -> PlannedRun:
        """The run of a spec, with the vocabulary of its data. Raises UserError where those cannot be opened."""
        key = spec.data, spec.tokenizer
        if key not in self._corpora:
            self._corpora[key] = open_corpus(spec.data, tokenizer=spec.tokenizer)
        corpus = self._corpora[key]
        spec = spec.with_vocabulary(corpus.vocab_size)
        run_id = config_hash(spec.model.to_dict(), spec.training.to_dict(), corpus.hash)
        return PlannedRun(run_id, spec, exclusive, gpus, parallel)


def distinct(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """The runs without repetitions, in the order of their first mention; exclusive where any mention is."""
    found: dict[str, PlannedRun] = {}
    for run in runs:
        if run.id not in found or (run.exclusive and not found[run.id].exclusive):
            found[run.id] = run
    return list(found.values())
