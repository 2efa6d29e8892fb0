"""What a comparison shows, in sentences computed from its records.

A lead is claimed only where the paired 95 % interval over seeds excludes zero.
"""

from __future__ import annotations

from collections import Counter

from e88.report.compare import Comparison, Group, count, difference, duration
from e88.study.statistics import Estimate

LISTED = 5


def headline(comparison: Comparison) -> str:
    """Who is best, by how much, and whether that is decided."""
    where = _where(comparison.budget)
    ranked = comparison.ranked
    if not ranked:
        statuses = Counter(str(run.get("status")) for run in comparison.runs)
        told = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
        return f"{where}, no model has a held-out figure (runs: {told})."
    best = ranked[0]
    if len(ranked) == 1:
        return f"{where}, {best.label} reaches {_score(best)}. No other model finished, so there is nothing to compare."
    sentences = [
        f"{where}, {best.label} has the lowest held-out bits per byte: {_score(best)}.",
        _verdict(ranked[1], best, "The next"),
    ]
    # The question of this project: E88 against the best that is not E88.
    other_side = next((group for group in ranked if (group.kind == "e88") != (best.kind == "e88")), None)
    if other_side is not None and other_side is not ranked[1]:
        sentences.append(_verdict(other_side, best, "The best rival" if best.kind == "e88" else "The best E88"))
    near = [group.label for group in ranked[2:] if group is not other_side and _undecided(group, best)]
    if near:
        more = f" and {len(near) - LISTED} more" if len(near) > LISTED else ""
        sentences.append(f"Not separated from the best either: {', '.join(near[:LISTED])}{more}.")
    gap = difference(ranked[1], best)
    if gap is not None and gap.n == 1:
        sentences.append("With one seed in common, whether this holds for other seeds is undecided.")
    return " ".join(sentences)


def _where(budget: dict[str, float]) -> str:
    for key, value in budget.items():
        if key == "seconds":
            return f"At equal training time ({duration(value)})"
        if key == "flops":
            return f"At equal compute ({count(value)} FLOPs)"
        return f"At equal {key} ({count(value)})"
    return "In these runs"


def _score(group: Group) -> str:
    estimate = group.bpb
    assert estimate is not None
    if estimate.low is None:
        return f"{estimate.mean:.4f} ({_seeds(estimate)}, no interval)"
    over = "" if estimate.over == "seeds" else " over its held-out windows"
    which = "mean of " + _seeds(estimate) if estimate.n > 1 else _seeds(estimate)
    return f"{estimate.mean:.4f} ({which}, 95 % interval {estimate.low:.4f} to {estimate.high:.4f}{over})"


def _seeds(estimate: Estimate) -> str:
    return "one seed" if estimate.n == 1 else f"{estimate.n} seeds"


def _undecided(group: Group, best: Group) -> bool:
    """Whether there is an interval over seeds, and it includes zero."""
    gap = difference(group, best)
    return gap is not None and gap.over == "seeds" and not gap.excludes_zero


def _verdict(group: Group, best: Group, who: str) -> str:
    gap = difference(group, best)
    subject = f"{who}, {group.label},"
    if gap is None:
        return f"{subject} shares no seed with it, so that lead is undecided."
    # Where the models ran different seeds, the order over those they share may not be that of their means.
    behind = f"{subject} is {abs(gap.mean):.4f} {'behind' if gap.mean >= 0 else 'ahead'}"
    if not group.done_seeds == best.done_seeds:
        behind += f" on the {_seeds(gap)} they share"
    if gap.low is None or gap.high is None:
        return f"{behind}{_overlap(group, best)}."
    interval = f"{gap.low:.4f} to {gap.high:.4f}, paired over {gap.n} seeds"
    if gap.excludes_zero:
        return f"{behind} (95 % interval {interval})."
    return f"{behind}, but that is undecided: the 95 % interval ({interval}) includes zero."


def _overlap(group: Group, best: Group) -> str:
    ours, theirs = group.bpb, best.bpb
    assert ours is not None and theirs is not None
    if ours.low is None or theirs.high is None or not ours.over == theirs.over == "windows":
        return ""
    verb = "overlap" if ours.low <= theirs.high else "do not overlap"
    return f" (their intervals over held-out windows {verb})"
