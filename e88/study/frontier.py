"""The efficient frontier: which models nobody beats in quality at their cost or less. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from e88.study.statistics import paired_difference


@dataclass(frozen=True)
class Point:
    """A model. cost: what less of is better. loss: by seed, less is better."""

    name: str
    cost: float
    loss: Mapping[int, float]

    @property
    def mean(self) -> float:
        return sum(self.loss.values()) / len(self.loss)


@dataclass(frozen=True)
class Place:
    """Where a model stands. by: the best of those that cost no more and have a lower mean loss, "" on the frontier.

    decided: whether that one's lead over seeds excludes zero; where it does not, the model may belong to the frontier.
    """

    name: str
    cost: float
    loss: float
    by: str = ""
    decided: bool = True

    @property
    def on_frontier(self) -> bool:
        return not self.by


def frontier(points: Sequence[Point]) -> list[Place]:
    """The place of each point, by cost. Of two that cost the same the one with the lower mean loss leads."""
    places = []
    leader: tuple[float, Point] | None = None
    for mean, point in sorted(((p.mean, p) for p in points), key=lambda pair: (pair[1].cost, pair[0])):
        if leader is None or mean <= leader[0]:
            leader = mean, point
            places.append(Place(point.name, point.cost, mean))
            continue
        lead = paired_difference(point.loss, leader[1].loss)
        decided = lead is not None and lead.excludes_zero
        places.append(Place(point.name, point.cost, mean, leader[1].name, decided))
    return places
