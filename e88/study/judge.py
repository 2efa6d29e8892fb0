"""From records to the verdicts on claims, and to what would decide those that are undecided. No torch.

A comparison of models is paired by seed, on equal data, with 95 % intervals; where one claim makes several comparisons
each has its share of the 5 % (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from e88.study.claims import LESS_IS_BETTER, SPEEDS, Claim
from e88.study.design import Experiment
from e88.study.statistics import LEVEL, MOST_SEEDS, Estimate, mean_interval, paired, seeds_to_decide
from e88.study.store import Record
from e88.study.verdict import CONFIRMED, REFUTED, UNDECIDED, Verdict, exact_verdict
from e88.training.config import deciding

# By the side of what is asked for on which a comparison lies.
OUTCOMES = {1: CONFIRMED, -1: REFUTED, 0: UNDECIDED}


def judge(experiment: Experiment, records: Mapping[str, Record]) -> list[Verdict]:
    """The verdict on every claim of an experiment. records: by run id, curves not needed."""
    court = _Court(experiment, records)
    simple = {c.name: court.verdict(c) for c in experiment.claims if c.form != "all"}
    return [
        simple[c.name] if c.form != "all" else _joint(c, [simple[part] for part in c.models], experiment.scale.name)
        for c in experiment.claims
    ]


def _joint(claim: Claim, parts: Sequence[Verdict], scale: str) -> Verdict:
    outcomes = [part.outcome for part in parts]
    outcome = next((o for o in (REFUTED, UNDECIDED) if o in outcomes), CONFIRMED)
    reason = ", ".join(f"{part.claim.name} {part.outcome}" for part in parts)
    more = [part.more_seeds for part in parts if part.outcome == UNDECIDED]
    known = [m for m in more if m is not None]
    all_known = len(known) == len(more) and outcome == UNDECIDED
    seeds = min((part.seeds for part in parts if part.scale != "exact"), default=0)
    return Verdict(claim, scale, outcome, reason, seeds=seeds, more_seeds=max(known) if all_known and known else None)


@dataclass(frozen=True)
class _Pair:
    """A paired comparison: how much better the first is than the second, beyond what is asked for."""

    names: tuple[str, str]
    differences: list[float]
    level: float

    @property
    def estimate(self) -> Estimate:
        return mean_interval(self.differences, self.level)

    def side(self, threshold: float) -> int:
        """1 where the interval lies above the threshold, -1 where below, 0 where neither is shown."""
        estimate = self.estimate
        if estimate.low is None or estimate.high is None:
            return 0
        return 1 if estimate.low > threshold else -1 if estimate.high < threshold else 0

    def more_seeds(self, threshold: float) -> int | None:
        needed = seeds_to_decide(self.differences, threshold, self.level)
        return None if needed is None else max(needed - len(self.differences), 1)


def _standing(pair: _Pair) -> tuple[int, float]:
    """By which pairs are ordered: what is shown, then by how much."""
    return pair.side(0.0), pair.estimate.mean


class _Missing(Exception):
    """The records cannot decide yet, or at all; the text says why."""


class _Court:
    def __init__(self, experiment: Experiment, records: Mapping[str, Record]) -> None:
        self.experiment, self.records = experiment, records
        self.scale = experiment.scale.name

    def verdict(self, claim: Claim) -> Verdict:
        if claim.is_exact:
            return exact_verdict(claim, self.experiment.study, self.experiment.scale)
        ((unit, amount),) = self.experiment.study.budgets[claim.budget][self.scale].items()
        at = f"{amount:,.12g} {unit}"
        try:
            return replace(self._decide(claim), at=at)
        except _Missing as reason:
            return Verdict(claim, self.scale, UNDECIDED, str(reason), at=at)

    def _decide(self, claim: Claim) -> Verdict:
        if claim.form in ("trains", "diverges"):
            return self._outcome_of_training(claim)
        runs = {name: self._runs(name, claim) for name in claim.involved}
        self._check_comparable(claim, runs)
        diverged = {name: sum(r["status"] == "diverged" for r in rs.values()) for name, rs in runs.items()}
        if any(diverged.values()):
            return self._with_divergence(claim, runs, diverged)
        values = {name: {seed: self._value(r, claim) for seed, r in rs.items()} for name, rs in runs.items()}
        if claim.form in ("lower", "higher", "close"):
            return self._pair_verdict(claim, values)
        if claim.form == "order":
            return self._order_verdict(claim, values)
        return self._best_verdict(claim, values)

    def _runs(self, model: str, claim: Claim) -> dict[int, Record]:
        """seed -> record of every run that ended with a result."""
        found, reasons = {}, []
        for seed, run in self.experiment.of(model, claim.budget).items():
            record = self.records.get(run.id)
            if record is None:
                reasons.append("has not run")
            elif record["status"] in ("failed", "pruned"):
                reasons.append(f"{record['status']}: {record['reason']}")
            else:
                found[seed] = record
        if not found:
            raise _Missing(f"{model} {reasons[0]}")
        return found

    def _check_comparable(self, claim: Claim, runs: Mapping[str, Mapping[int, Record]]) -> None:
        records = [record for rs in runs.values() for record in rs.values()]
        hardware = {str(record["environment"].get("hardware")) for record in records}
        timed = claim.metric in SPEEDS or any("seconds" in r["config"]["training"]["budget"] for r in records)
        if timed and len(hardware) > 1:
            raise _Missing(f"its runs are from different hardware: {', '.join(sorted(hardware))}")
        if claim.hardware and not all(claim.hardware.lower() in name.lower() for name in hardware):
            raise _Missing(f"it is about the {claim.hardware}; these runs are from {', '.join(sorted(hardware))}")
        training = [deciding(record["config"]["training"]) for record in records]
        if len({record["data"]["hash"] for record in records}) > 1:
            raise _Missing("its runs did not see the same data")
        # Windows of other lengths, and carried states, bring the data in another order.
        if len({t["batch_size"] * t["window"] for t in training}) > 1:
            raise _Missing("its runs did not see equally much data in a step")
        if len({(t["heldout_bytes"], t["heldout_window"]) for t in training}) > 1:
            raise _Missing("its runs were not scored on the same held-out windows; set heldout_window")

    def _value(self, record: Record, claim: Claim) -> float:
        value = record["results"].get(claim.metric)
        if value is None:
            raise _Missing(f"{record['name']} has no {claim.metric}")
        # Of ratios the logarithms are what is averaged.
        return math.log(value) if claim.is_ratio else float(value)

    def _pair(self, values: Mapping[str, Mapping[int, float]], first: str, second: str, comparisons: int = 1) -> _Pair:
        """second - first over the seeds that both have: how far the first lies below the second."""
        differences = paired(values[second], values[first])
        if not differences:
            raise _Missing(f"{first} and {second} share no seed")
        return _Pair((first, second), differences, 1 - (1 - LEVEL) / comparisons)

    def _pair_verdict(self, claim: Claim, values: Mapping[str, Mapping[int, float]]) -> Verdict:
        first, second = claim.models
        pair = self._pair(values, first, second)
        if claim.form == "close":
            return self._close_verdict(claim, pair)
        if claim.form == "higher":
            pair = replace(pair, differences=[-d for d in pair.differences])
        threshold = math.log(claim.factor or 1) if claim.is_ratio else claim.by
        return self._by_pair(claim, OUTCOMES[pair.side(threshold)], pair, threshold)

    def _close_verdict(self, claim: Claim, pair: _Pair) -> Verdict:
        inside = pair.side(-claim.by), pair.side(claim.by)
        outside = inside[0] == -1 or inside[1] == 1
        outcome = CONFIRMED if inside == (1, -1) else REFUTED if outside else UNDECIDED
        # The nearer edge decides.
        edge = claim.by if pair.estimate.mean > 0 else -claim.by
        return self._by_pair(claim, outcome, pair, edge)

    def _order_verdict(self, claim: Claim, values: Mapping[str, Mapping[int, float]]) -> Verdict:
        steps = len(claim.models) - 1
        pairs = [
            self._better(claim, values, a, b, steps) for a, b in zip(claim.models[:-1], claim.models[1:], strict=True)
        ]
        # The step that decides, or that lacks most.
        worst = min(pairs, key=_standing)
        return self._by_pair(claim, OUTCOMES[worst.side(0.0)], worst, 0.0)

    def _best_verdict(self, claim: Claim, values: Mapping[str, Mapping[int, float]]) -> Verdict:
        """One claimed model that is shown to beat every rival confirms; a rival shown to beat it, for each, refutes."""
        others = [name for name in claim.of if name not in claim.models]
        count = len(others) * len(claim.models)
        # Of each claimed model the rival that it is least ahead of.
        closest = [min((self._better(claim, values, a, b, count) for b in others), key=_standing) for a in claim.models]
        champion = max(closest, key=_standing)
        return self._by_pair(claim, OUTCOMES[champion.side(0.0)], champion, 0.0)

    def _better(
        self, claim: Claim, values: Mapping[str, Mapping[int, float]], first: str, second: str, comparisons: int
    ) -> _Pair:
        pair = self._pair(values, first, second, comparisons)
        sign = 1 if LESS_IS_BETTER[claim.metric] else -1
        return replace(pair, differences=[sign * d for d in pair.differences])

    def _by_pair(self, claim: Claim, outcome: str, pair: _Pair, threshold: float) -> Verdict:
        estimate, n = pair.estimate, len(pair.differences)
        more = pair.more_seeds(threshold) if outcome == UNDECIDED else None
        unit = claim.metric
        if claim.is_ratio:
            low, high = (None if end is None else math.exp(end) for end in (estimate.low, estimate.high))
            estimate = replace(estimate, mean=math.exp(estimate.mean), low=low, high=high)
            threshold, unit = math.exp(threshold), f"ratio of {claim.metric}"
        reason = "" if outcome != UNDECIDED else _what_would_decide(n, more)
        if claim.form in ("best", "order"):
            reason = f"{pair.names[0]} against {pair.names[1]}" + (f"; {reason}" if reason else "")
        return Verdict(claim, self.scale, outcome, reason, estimate, threshold, unit, n, more)

    def _with_divergence(
        self, claim: Claim, runs: Mapping[str, Mapping[int, Record]], diverged: Mapping[str, int]
    ) -> Verdict:
        """A diverged run is worse than any other, where quality is compared; elsewhere it has no figure."""
        told = ", ".join(f"{name} diverged in {n} of {len(runs[name])} seeds" for name, n in diverged.items() if n)
        seeds = min(len(rs) for rs in runs.values())
        quality = claim.metric in ("heldout_bpb", "train_loss")
        if quality and claim.form in ("lower", "higher") and seeds >= 2:
            first, second = claim.models if claim.form == "lower" else claim.models[::-1]
            if diverged[second] == len(runs[second]) and not diverged[first]:
                return Verdict(claim, self.scale, CONFIRMED, told, seeds=seeds)
            if diverged[first] == len(runs[first]) and not diverged[second]:
                return Verdict(claim, self.scale, REFUTED, told, seeds=seeds)
        raise _Missing(told)

    def _outcome_of_training(self, claim: Claim) -> Verdict:
        """One run to the contrary refutes, whatever has not run; two seeds of each model confirm."""
        wanted = claim.form == "trains"
        contrary: dict[str, list[str]] = {}
        counts, missing = [], None
        for name in claim.models:
            try:
                runs = self._runs(name, claim)
            except _Missing as reason:
                missing = missing or reason
                continue
            counts.append(len(runs))
            trained = [_trained(record) for record in runs.values()]
            against = sum(outcome != wanted for outcome in trained)
            if against:
                did = "did not train" if wanted else "trained"
                contrary.setdefault(f"{did} in {against} of {len(trained)} seeds", []).append(name)
        if contrary:
            told = "; ".join(f"{', '.join(names)} {what}" for what, names in contrary.items())
            return Verdict(claim, self.scale, REFUTED, told, seeds=min(counts))
        if missing is not None:
            raise missing
        seeds = min(counts)
        if seeds < 2:
            return Verdict(claim, self.scale, UNDECIDED, "one seed of each says little", seeds=seeds, more_seeds=1)
        return Verdict(claim, self.scale, CONFIRMED, f"in all of {seeds} seeds", seeds=seeds)


def _trained(record: Record) -> bool:
    """Whether a run came to its end and predicts better than a uniform guess over its tokens."""
    bpb = record["results"].get("heldout_bpb")
    uniform = math.log2(record["config"]["model"]["vocab_size"]) / record["data"]["bytes_per_token"]
    return record["status"] == "done" and bpb is not None and bpb < uniform


def _what_would_decide(seeds: int, more: int | None) -> str:
    if seeds < 2:
        return "one seed has no interval; 1 more gives one"
    if more is None:
        return f"more than {MOST_SEEDS} seeds would be needed, as it stands"
    return f"about {more} more seed{'s' if more > 1 else ''} would decide it"
