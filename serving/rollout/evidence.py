"""What is known of a challenger so far: counters of gateways, losses on matured outcomes by day, and feature skew.

Evidence only ever grows by journalled reports and is never edited, so a replayed journal gives the same evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from pipelines.validation.paired import PairedDay

Counts = dict[float, tuple[int, int]]
_NAMED = 5  # features that a sentence names


class Report(BaseModel):
    """What one gateway counted since its last report.

    ``rollout`` says of which rollout; ``sequence`` counts a gateway's reports of it from 1. Counters of two are
    [challenger, champion] by the challenger's share at assignment. The unit of ``exposed``, ``errors`` and ``slow``
    is a request, represented by its first instance: the instances of one request share its fate, and counting each
    would count one accident many times. ``copies`` were answered by both, ``disagreed`` of them by different
    answers. ``served`` and ``harmed`` are instances: answered by the challenger, and answered by the champion in its
    place; ``accidents`` are the requests in which any was harmed, and copies that were not
    answered in time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gateway: str
    sequence: int
    rollout: int
    exposed: dict[float, tuple[NonNegativeInt, NonNegativeInt]] = {}
    errors: dict[float, tuple[NonNegativeInt, NonNegativeInt]] = {}
    slow: dict[float, tuple[NonNegativeInt, NonNegativeInt]] = {}
    copies: NonNegativeInt = 0
    disagreed: NonNegativeInt = 0
    served: NonNegativeInt = 0
    harmed: NonNegativeInt = 0
    accidents: NonNegativeInt = 0


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
class Evidence:
    """All of it. ``ratio`` is ``exposed`` since the sample-ratio test last began, ``skew`` the last that was found
    since somebody resumed the rollout; moments in microseconds.
    """

    exposed: Counts = field(default_factory=dict)
    errors: Counts = field(default_factory=dict)
    slow: Counts = field(default_factory=dict)
    ratio: Counts = field(default_factory=dict)
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

    def with_report(self, report: Report) -> Evidence:
        """With one more report, which must be the gateway's next (see ``is_next``)."""
        return replace(
            self,
            exposed=_sum(self.exposed, report.exposed),
            errors=_sum(self.errors, report.errors),
            slow=_sum(self.slow, report.slow),
            ratio=_sum(self.ratio, report.exposed),
            copies=self.copies + report.copies,
            disagreed=self.disagreed + report.disagreed,
            served=self.served + report.served,
            harmed=self.harmed + report.harmed,
            accidents=self.accidents + report.accidents,
            sequences={**self.sequences, report.gateway: report.sequence},
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
        """Without what pauses a rollout: whoever resumes it has looked at that. The sample-ratio test begins anew."""
        return replace(self, ratio={}, skew=None)

    def challenger_requests(self) -> int:
        """How many requests the challenger got, copies included."""
        return self.copies + sum(challenger for challenger, _ in self.exposed.values())


def days_of(payload: Any) -> tuple[PairedDay, ...]:
    """The days of a journalled ``labels`` event."""
    return tuple(PairedDay(**day) for day in payload["days"])


def _sum(left: Counts, right: Counts) -> Counts:
    total = dict(left)
    for weight, (challenger, champion) in right.items():
        had = total.get(weight, (0, 0))
        total[weight] = (had[0] + challenger, had[1] + champion)
    return total
