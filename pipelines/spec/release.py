"""How a version is released: shadow, canary steps, guardrails and what it takes to be promoted.

The engines are in ``serving.rollout``. A rollout runs under the policy it was started with, whatever the page says
later.
"""

from __future__ import annotations

from datetime import datetime, time, timedelta
from enum import StrEnum
from typing import Self
from zoneinfo import ZoneInfo

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec, check_zone

GUARDRAILS = ("errors", "latency", "budget", "disagreement", "quality", "coverage", "sample_ratio", "degraded")
"""Every guardrail with an error probability of its own. Neither the cap on harmed answers nor feature skew needs one:
what they act on is counted, not estimated."""


class Shadow(Spec):
    """Copies of ``share`` of the requests go to the challenger; nobody waits for them, all through the rollout.

    The first stage ends when ``requests`` copies were judged and ``time`` has passed on the cluster's clock.
    """

    share: float = PydanticField(default=1.0, gt=0, le=1)
    requests: int = PydanticField(default=200, ge=1)
    time: timedelta = PydanticField(default=timedelta(minutes=10), ge=timedelta(0))


class CanaryStep(Spec):
    """The challenger answers ``weight`` of the instances, until ``requests`` were judged and ``time`` has passed."""

    weight: float = PydanticField(gt=0, le=0.5)
    requests: int = PydanticField(default=200, ge=1)
    time: timedelta = PydanticField(default=timedelta(minutes=30), ge=timedelta(0))


class Assignment(StrEnum):
    """What finds its version by a hash and keeps it: each instance of a request, or everything of an entity."""

    INSTANCE = "instance"
    ENTITY = "entity"


ACTIVE_ENTITIES = 1_000
"""So many entities must have been seen in a canary before a version that was tried on entities is promoted."""


class Budget(Spec):
    """What callers may have to wait, from the whole request to its answer: of the challenger's requests at most
    ``share`` take longer than ``ms``.

    A version is withdrawn when it is shown to exceed that and to exceed it more often than the champion, by more than
    the policy's tolerance: what both suffer from, a slow state say, is held against neither. But the way to a
    challenger's process is part of what its callers wait, so a budget that this way alone exceeds on a busy machine
    withdraws every version.
    """

    ms: float = PydanticField(gt=0)
    share: float = PydanticField(default=0.02, gt=0, lt=1)


class Labels(Spec):
    """What matured outcomes must show before promotion.

    Losses of both versions on the same instances are compared by UTC day of the request, in units of the champion's
    interval half-width; a day's mean difference is clipped at ``clip`` of these. A version is promoted when the
    hypothesis that it is worse by ``margin`` (in the same units) is refuted at ``confidence`` over at least ``days``
    complete days, and withdrawn when it is shown to be worse by more. It is withdrawn as well when its interval is
    shown to miss outcomes more often than the champion's: the difference of the two shares of a day, clipped at
    ``coverage_clip``, is larger than ``coverage_margin``. A day is complete ``grace`` after its last outcome was due.
    """

    margin: float = PydanticField(default=0.02, gt=0)
    clip: float = PydanticField(default=0.08, gt=0)
    coverage_margin: float = PydanticField(default=0.05, gt=0)
    coverage_clip: float = PydanticField(default=0.2, gt=0, le=1)
    confidence: float = PydanticField(default=0.95, gt=0, lt=1)
    days: int = PydanticField(default=7, ge=1)
    grace: timedelta = PydanticField(default=timedelta(hours=1), ge=timedelta(0))

    @model_validator(mode="after")
    def _margin_lies_inside(self) -> Self:
        if self.margin >= self.clip:
            raise ValueError(f"a margin of {self.margin} cannot be seen when differences are clipped at {self.clip}")
        if self.coverage_margin >= self.coverage_clip:
            raise ValueError(
                f"a coverage margin of {self.coverage_margin} cannot be seen when differences are clipped at "
                f"{self.coverage_clip}"
            )
        return self


class Blackout(Spec):
    """Hours in which no version gets more traffic; what hurts is withdrawn all the same.

    From ``begin`` to ``end`` on the wall clock of ``zone``, on ``days`` (0 is Monday). An ``end`` that is not after
    ``begin`` is of the following day.
    """

    begin: time
    end: time
    zone: str
    days: tuple[int, ...] = tuple(range(7))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_zone(self.zone)
        if self.begin.tzinfo is not None or self.end.tzinfo is not None:
            raise ValueError("begin and end of a blackout are times of its zone and carry none of their own")
        if not self.days or not set(self.days) <= set(range(7)):
            raise ValueError(f"days of a blackout are 0 (Monday) to 6, at least one; found {self.days}")
        return self

    def covers(self, now_us: int) -> bool:
        """Whether the moment (microseconds since the Unix epoch) lies in one of them."""
        local = datetime.fromtimestamp(now_us // 1_000_000, ZoneInfo(self.zone))
        clock, today, yesterday = local.time(), local.weekday() in self.days, (local.weekday() - 1) % 7 in self.days
        if self.begin < self.end:
            return today and self.begin <= clock < self.end
        return (today and clock >= self.begin) or (yesterday and clock < self.end)


class AfterWatch(Spec):
    """How long a promoted version is watched beside the one before it, which is kept warm and copied ``share`` of the
    requests in the gateways.

    For ``time`` on the cluster's clock the version before it answers again by itself as soon as the new one is shown to
    err, to be slow or, by matured outcomes, to be worse. This test has an error probability of its own, of the same
    size as the rollout's. A release that is asked for meanwhile begins at once and ends the watch.
    """

    time: timedelta = PydanticField(default=timedelta(days=1), gt=timedelta(0))
    share: float = PydanticField(default=0.1, gt=0, le=1)


class SkewRule(Spec):
    """The skew audit that runs by itself, and pauses a rollout when a served value is not what its events make again.

    ``every`` so long on the cluster's clock, a ``share`` of the answers given since the last audit is made again, of
    more than ``rows`` a smaller one, so that there are about so many.
    """

    every: timedelta = PydanticField(default=timedelta(minutes=15), gt=timedelta(0))
    share: float = PydanticField(default=1.0, gt=0, le=1)
    rows: int = PydanticField(default=5_000, ge=1)


class ReleasePolicy(Spec):
    """Everything a rollout is held to.

    With an ``assignment`` by entity all requests of an entity find the same version; then it is entities that are
    counted, each once a step and once for what first befalls it, since the requests of one share its fate. Fewer than
    ``ACTIVE_ENTITIES`` of them are too few to tell anything by, so there the requests of steps are entities.
    ``alpha`` is the probability of ever withdrawing a version that is as good as the champion, split over the
    guardrails by ``split`` (equally when empty). ``tolerance`` is the excess over the champion's rate of errors or slow
    calls that is put up with. A call is slow above ``slow_factor`` times the champion's median time inside the runner,
    at least ``slow_floor_ms``. The challenger disagrees when its answer lies outside the champion's interval;
    ``disagreement`` is the declared rate of that. Without a ``budget`` only the deadline bounds what callers wait. When
    more than the share ``degraded`` of the requests, whichever version answers, has inputs that are missing, stale or
    made up by the fallback ladder, the rollout pauses: nothing good can be told of a version then. After ``harm_cap``
    requests with harmed answers (the champion had to step in) or copies left unanswered the challenger is withdrawn at
    once; the cap is no part of alpha. A caller's request waits for the challenger at most ``deadline_ms``. Without
    ``labels`` a version is promoted on its guardrails alone. No stage begins and nothing is promoted in hours of
    ``blackouts``. A rollout that is not decided within ``patience`` ends as inconclusive, but not while only a blackout
    holds it. When the release of a further version is asked for, it waits; with ``supersede`` it takes the place of one
    that is in shadow or canary. Without a ``watch`` a version that was promoted is the champion for good, or until
    somebody takes it back. Without ``skew`` no audit runs by itself; while nothing is being tried, it runs by the
    page's.
    """

    assignment: Assignment = Assignment.INSTANCE
    shadow: Shadow = Shadow()
    steps: tuple[CanaryStep, ...] = (CanaryStep(weight=0.1), CanaryStep(weight=0.5))
    alpha: float = PydanticField(default=0.01, gt=0, lt=1)
    split: dict[str, float] = PydanticField(default_factory=dict)
    tolerance: float = PydanticField(default=0.25, ge=0)
    slow_factor: float = PydanticField(default=5.0, gt=1)
    slow_floor_ms: float = PydanticField(default=0.5, ge=0)
    disagreement: float = PydanticField(default=0.1, gt=0, lt=1)
    budget: Budget | None = None
    degraded: float = PydanticField(default=0.25, gt=0, lt=1)
    harm_cap: int = PydanticField(default=25, ge=1)
    deadline_ms: float = PydanticField(default=250.0, gt=0, le=4000)
    labels: Labels | None = None
    skew: SkewRule | None = SkewRule()
    approval: bool = False
    supersede: bool = False
    blackouts: tuple[Blackout, ...] = ()
    patience: timedelta = PydanticField(default=timedelta(days=30), gt=timedelta(0))
    watch: AfterWatch | None = AfterWatch()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        weights = [step.weight for step in self.steps]
        if not weights or weights != sorted(set(weights)):
            raise ValueError(f"canary steps need rising weights, at least one; found {weights}")
        if odd := sorted(set(self.split) - set(GUARDRAILS)):
            raise ValueError(f"alpha is split over unknown guardrails {odd}; there are {list(GUARDRAILS)}")
        if self.split and (set(self.split) != set(GUARDRAILS) or min(self.split.values()) <= 0):
            raise ValueError(f"a split of alpha gives each of {list(GUARDRAILS)} a share above zero")
        if self.split and sum(self.split.values()) > 1 + 1e-9:
            raise ValueError(f"the shares of alpha add up to {sum(self.split.values())}, more than 1")
        return self

    def alpha_of(self, guardrail: str) -> float:
        """The error probability of one guardrail."""
        return self.alpha * (self.split[guardrail] if self.split else 1 / len(GUARDRAILS))
