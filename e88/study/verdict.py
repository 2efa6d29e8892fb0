"""What is said of a claim: confirmed, refuted, or undecided. Claims about counts are decided here, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from e88.sizing.closed_form import describe
from e88.study.claims import Claim
from e88.study.design import Scale, Study
from e88.study.statistics import Estimate

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What the records say of a claim at one scale ("exact" where it is about counts), `at` which budget ("80 steps").

    estimate: of the deciding comparison, in `unit`: a difference, or a ratio where the claim has a factor. threshold:
    what it is held against. seeds: how many decided. more_seeds: how many more of the same mean and spread would
    decide an undecided comparison; None where that cannot be told. reason: in words.
    """

    claim: Claim
    scale: str
    outcome: str
    reason: str
    estimate: Estimate | None = None
    threshold: float | None = None
    unit: str = ""
    seeds: int = 0
    more_seeds: int | None = None
    at: str = ""


def exact_verdict(claim: Claim, study: Study, scale: Scale) -> Verdict:
    """The verdict on a claim about counts, from the full-size models alone, over windows as they are trained on."""
    sizes: dict[str, Any] = {
        name: describe(study.model(name), window=study.span(name, scale))[claim.metric]
        for name in (*claim.models, *claim.of)
    }
    missing = [name for name, value in sizes.items() if value is None]
    if missing:
        return Verdict(claim, "exact", UNDECIDED, f"{missing[0]} has no {claim.metric}")
    ours = [sizes[name] for name in claim.models]
    unit, threshold = claim.metric, claim.by
    if claim.form == "equals":
        assert claim.value is not None
        value, threshold = ours[0], claim.value
        holds = abs(value - threshold) <= claim.within * abs(threshold)
    elif claim.form in ("lower", "higher"):
        small, large = ours if claim.form == "lower" else ours[::-1]
        if claim.factor is not None:
            value, threshold, unit = large / small, claim.factor, f"ratio of {claim.metric}"
        else:
            value = large - small
        holds = value > threshold
    elif claim.form == "close":
        value = abs(ours[0] - ours[1])
        holds = value < threshold
    elif claim.form == "order":
        value = min(b - a for a, b in zip(ours[:-1], ours[1:], strict=True))
        holds = value > 0
    else:
        value = min(sizes[name] for name in claim.of if name not in claim.models) - min(ours)
        holds = value > 0
    estimate = Estimate(value, 0, value, value, "exact")
    return Verdict(claim, "exact", CONFIRMED if holds else REFUTED, "counted", estimate, threshold, unit)
