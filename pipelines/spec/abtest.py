"""An A/B test: which versions answer which share of the units, what is measured, and when it ends.

Guardrails of a release ask whether a version hurts; a test asks which of several versions is best by what comes back
as outcomes. The engines are in ``serving.rollout`` and ``pipelines.validation.arms``.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Self

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec
from pipelines.spec.release import Assignment


class Measure(StrEnum):
    """What is averaged over the predictions of a unit whose outcome is known."""

    OUTCOME = "outcome"  # the outcome itself, where what is answered influences it
    LOSS = "loss"  # the absolute difference between answer and outcome


class Goal(StrEnum):
    """Which means are the better ones."""

    HIGHER = "higher"
    LOWER = "lower"


class Variant(Spec):
    """A version beside the champion, and its share of the units."""

    version: str = PydanticField(pattern=r"^[1-9][0-9]{0,8}$")
    share: float = PydanticField(gt=0, lt=1)


class ABTest(Spec):
    """Two or more versions on different units at the same time; the champion has what the ``variants`` leave.

    A ``unit`` finds its version by a hash and keeps it for the whole test. It counts by the mean of its ``measure``, in
    the arm it was assigned to, whatever answered it there. Each variant's mean is compared with the champion's by a
    confidence sequence that holds at ``confidence`` for all variants together, however often it is looked at; it is
    tightest at ``units`` of each arm and is read from then on, and after ``time`` on the cluster's clock. (That is so
    while units go on coming. Where all entities there are have been seen, and only their means still move, it is looked
    at with one number of units again and again, and errs somewhat more often: a longer ``time`` helps.) The variant
    with the best mean of those that are shown to be better wins, and its release is asked for; when all are shown to be
    worse, the test is lost. One that is not decided within ``patience`` ends as inconclusive. The test pauses when
    units are not assigned by their shares, shown with an error probability of ``ratio_alpha``; while it is paused the
    champion answers all. A caller waits for a variant at most ``deadline_ms``, then the champion answers; after
    ``harm_cap`` requests in which it had to, the test is lost.
    """

    variants: tuple[Variant, ...] = PydanticField(min_length=1, max_length=8)
    unit: Assignment = Assignment.ENTITY
    measure: Measure = Measure.LOSS
    goal: Goal = Goal.LOWER
    confidence: float = PydanticField(default=0.95, gt=0.5, lt=1)
    units: int = PydanticField(default=1_000, ge=100)
    time: timedelta = PydanticField(default=timedelta(days=7), ge=timedelta(0))
    patience: timedelta = PydanticField(default=timedelta(days=60), gt=timedelta(0))
    ratio_alpha: float = PydanticField(default=0.001, gt=0, lt=1)
    harm_cap: int = PydanticField(default=100, ge=1)
    deadline_ms: float = PydanticField(default=250.0, gt=0, le=4000)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        versions = self.versions
        if len(set(versions)) < len(versions):
            raise ValueError(f"each version is one variant; found {list(versions)}")
        if self.champion_share < 0.01:
            raise ValueError("the shares of the variants leave the champion less than a hundredth of the units")
        if self.measure is Measure.LOSS and self.goal is Goal.HIGHER:
            raise ValueError("a higher loss is no goal: set goal to lower, or measure outcomes")
        if self.time >= self.patience:
            raise ValueError("a test whose patience ends before its time can show nothing")
        return self

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions beside the champion."""
        return tuple(variant.version for variant in self.variants)

    @property
    def champion_share(self) -> float:
        """What the variants leave to the champion."""
        return 1.0 - sum(variant.share for variant in self.variants)

    @property
    def alpha(self) -> float:
        """The error probability of one comparison: that of the test, split equally over its variants."""
        return (1.0 - self.confidence) / len(self.variants)
