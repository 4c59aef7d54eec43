"""What is known of a challenger so far, or of the arms of an A/B test: counters of gateways, losses on matured outcomes
by day, results by arm, and feature skew.

Evidence only ever grows by journalled reports and is never edited, so a replayed journal gives the same evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from pipelines.statistics.asymptotic import Sample
from pipelines.validation.arms import Arm
from pipelines.validation.paired import PairedDay

Counts = dict[float, tuple[int, int]]
What = Literal["exposed", "errors", "slow", "over"]
Units = dict[float, tuple[list[int], list[int]]]
"""Digests of entities by the challenger's share at assignment: the challenger's, the champion's."""
_NAMED = 5  # features that a sentence names
_EVER, _ARMS = "canary", "arms"


class Report(BaseModel):
    """What one gateway counted since its last report.

    ``rollout`` says of which rollout; ``sequence`` counts a gateway's reports of it from 1. Counters of two are
    [challenger, champion] by the challenger's share at assignment. The unit of ``exposed``, ``errors``, ``slow`` and
    ``over`` (the budget of what callers wait) is a request, represented by its first instance: the instances of one
    request share its fate, and counting each would count one accident many times. Of ``seen`` requests, whichever
    version answered, ``degraded`` had inputs that were missing, stale or made up. ``copies`` were answered by both,
    ``disagreed`` of them by different answers. ``served`` and ``harmed`` are instances: answered by the challenger, and
    answered by the champion in its place; ``accidents`` are the requests in which any was harmed, and copies that were
    not answered in time.

    Where entities are assigned, these four counters are empty and ``units`` tells of which entities they would be, each
    as soon as this gateway sees it; that several gateways see one is noticed where they come together.

    In an A/B test ``arms`` are the instances that were assigned to each arm, the champion's first, or ``members`` the
    digests of entities that were; ``served``, ``harmed`` and ``accidents`` are those of all variants.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gateway: str
    sequence: int
    rollout: int
    exposed: dict[float, tuple[NonNegativeInt, NonNegativeInt]] = {}
    errors: dict[float, tuple[NonNegativeInt, NonNegativeInt]] = {}
    slow: dict[float, tuple[NonNegativeInt, NonNegativeInt]] = {}
    over: dict[float, tuple[NonNegativeInt, NonNegativeInt]] = {}
    units: dict[What, Units] = {}
    seen: NonNegativeInt = 0
    degraded: NonNegativeInt = 0
    copies: NonNegativeInt = 0
    disagreed: NonNegativeInt = 0
    served: NonNegativeInt = 0
    harmed: NonNegativeInt = 0
    accidents: NonNegativeInt = 0
    arms: tuple[NonNegativeInt, ...] = ()
    members: tuple[tuple[int, ...], ...] = ()


class Skew(BaseModel):
    """What an audit found: of ``checked`` answers ``mismatched`` differ from what their events make again; ``features``
    says in how many values, by feature.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checked: PositiveInt
    mismatched: PositiveInt
    features: dict[str, PositiveInt]

    def __str__(self) -> str:
        worst = sorted(self.features.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{name} in {count}" for name, count in worst[:_NAMED])
        more = f" and {len(worst) - _NAMED} more features" if len(worst) > _NAMED else ""
        return f"{self.mismatched} of {self.checked} answers differ from what their events make again: {named}{more}"


@dataclass(frozen=True)
class Results:
    """The arms of an A/B test as they were known at a moment, in microseconds."""

    at_us: int
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Evidence:
    """All of it; moments in microseconds. What pauses a rollout is kept since somebody last resumed it: ``ratio``
    (``exposed`` since then), ``arms``, ``seen`` with ``degraded``, and the last ``skew`` that was found. ``known`` are
    the entities that were counted, by what for. ``results`` of an A/B test are in the order of time.
    """

    exposed: Counts = field(default_factory=dict)
    errors: Counts = field(default_factory=dict)
    slow: Counts = field(default_factory=dict)
    over: Counts = field(default_factory=dict)
    ratio: Counts = field(default_factory=dict)
    seen: int = 0
    degraded: int = 0
    copies: int = 0
    disagreed: int = 0
    served: int = 0
    harmed: int = 0
    accidents: int = 0
    days: tuple[PairedDay, ...] = ()
    skew: Skew | None = None
    started_us: int = 0
    stage_us: int = 0
    sequences: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[str, frozenset[int]] = field(default_factory=dict)
    arms: tuple[int, ...] = ()
    results: tuple[Results, ...] = ()

    def with_report(self, report: Report) -> Evidence:
        """With one more report, which must be the gateway's next (see ``is_next``)."""
        named = _Named(self.known)
        exposed, over, first = named.exposures(report.units)
        return replace(
            self,
            exposed=_sum(_sum(self.exposed, report.exposed), exposed),
            errors=_sum(_sum(self.errors, report.errors), named.events(report.units, "errors")),
            slow=_sum(_sum(self.slow, report.slow), named.events(report.units, "slow")),
            over=_sum(_sum(self.over, report.over), over),
            ratio=_sum(_sum(self.ratio, report.exposed), first),
            arms=_longer_sum(_longer_sum(self.arms, report.arms), named.members(report.members)),
            seen=self.seen + report.seen,
            degraded=self.degraded + report.degraded,
            copies=self.copies + report.copies,
            disagreed=self.disagreed + report.disagreed,
            served=self.served + report.served,
            harmed=self.harmed + report.harmed,
            accidents=self.accidents + report.accidents,
            sequences={**self.sequences, report.gateway: report.sequence},
            known=named.known,
        )

    def is_next(self, report: Report) -> bool:
        """False for a report that was journalled before; ``ValueError`` when one before it is missing."""
        last = self.sequences.get(report.gateway, 0)
        if report.sequence > last + 1:
            raise ValueError(f"gateway {report.gateway} sent report {report.sequence} after {last}: one is missing")
        return report.sequence == last + 1

    def with_labels(self, days: tuple[PairedDay, ...]) -> Evidence:
        """With these days after those before: a day that was judged is not judged again."""
        return replace(self, days=(*self.days, *self.later(days)))

    def later(self, days: tuple[PairedDay, ...]) -> tuple[PairedDay, ...]:
        """Those of ``days`` that come after every day so far."""
        last = self.days[-1].day if self.days else -1
        return tuple(day for day in days if day.day > last)

    def at_stage(self, now_us: int) -> Evidence:
        """A stage begins."""
        return replace(self, stage_us=now_us)

    def resumed(self) -> Evidence:
        """Without what pauses a rollout: whoever resumes it has looked at that. Its tests begin anew."""
        known = {name: units for name, units in self.known.items() if name != _ARMS}
        return replace(self, ratio={}, arms=(), skew=None, seen=0, degraded=0, known=known)

    @property
    def entities(self) -> int:
        """How many entities were seen in the canary, where entities are assigned."""
        return len(self.known.get(_EVER, ()))

    def challenger_requests(self) -> int:
        """How many requests the challenger got, copies included."""
        return self.copies + sum(challenger for challenger, _ in self.exposed.values())


class _Named:
    """Counts entities that are reported by name, each once.

    What befalls an entity is counted once a rollout: as the place of an entity in the split is drawn once, its second
    error would tell nothing new of the version. An exposure is counted once a step, for progress, and once a rollout
    for the sample ratio; a wait over the budget only with the exposure it came with, so that it is one of a request.
    """

    def __init__(self, known: Mapping[str, frozenset[int]]) -> None:
        self.known = dict(known)

    def exposures(self, units: Mapping[What, Units]) -> tuple[Counts, Counts, Counts]:
        """The new exposures of the step, those of them that were over the budget, and the first ones."""
        exposed, over, first = {}, {}, {}
        for weight, pair in units.get("exposed", {}).items():
            new = self._new(f"step {weight}", pair)
            exposed[weight] = (len(new[0]), len(new[1]))
            late = units.get("over", {}).get(weight, ([], []))
            over[weight] = (len(new[0].intersection(late[0])), len(new[1].intersection(late[1])))
            ever = self._new(_EVER, new)
            first[weight] = (len(ever[0]), len(ever[1]))
        return exposed, over, first

    def events(self, units: Mapping[What, Units], kind: What) -> Counts:
        """The first events of a kind."""
        new = {weight: self._new(kind, pair) for weight, pair in units.get(kind, {}).items()}
        return {weight: (len(challenger), len(champion)) for weight, (challenger, champion) in new.items()}

    def members(self, arms: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """How many entities of each arm were not seen before."""
        had, seen, counts = self.known.get(_ARMS, frozenset()), set[int](), []
        for given in arms:
            new = set(given) - had - seen
            counts.append(len(new))
            seen |= new
        if seen:
            self.known[_ARMS] = had | seen
        return tuple(counts)

    def _new(self, name: str, pair: tuple[Iterable[int], Iterable[int]]) -> tuple[set[int], set[int]]:
        had = self.known.get(name, frozenset())
        challenger, champion = (set(side) - had for side in pair)
        self.known[name] = had | challenger | champion
        return challenger, champion


def days_of(payload: Any) -> tuple[PairedDay, ...]:
    """The days of a journalled ``labels`` event."""
    return tuple(PairedDay(**day) for day in payload["days"])


def results_of(payload: Any) -> Results:
    """The results of a journalled ``test_results`` event."""
    arms = (Arm(arm["version"], arm["predictions"], Sample(**arm["sample"])) for arm in payload["arms"])
    return Results(payload["at_us"], tuple(arms))


def _longer_sum(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))


def _sum(left: Counts, right: Counts) -> Counts:
    total = dict(left)
    for weight, (challenger, champion) in right.items():
        had = total.get(weight, (0, 0))
        total[weight] = (had[0] + challenger, had[1] + champion)
    return total
