"""What the evidence says about an A/B test now. Pure functions, so a replayed journal decides alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from pipelines.spec import ABTest, Goal
from pipelines.spec.base import microseconds
from pipelines.statistics.asymptotic import Sample, difference
from pipelines.statistics.sequential import sample_ratio_log_e
from pipelines.validation.arms import Arm
from serving.rollout.evidence import Evidence
from serving.rollout.machine import Outcome


class Finding(StrEnum):
    """How a variant compares with the champion."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "open"


@dataclass(frozen=True)
class Compared:
    """A variant against the champion: its units and their mean, the difference of the two means and the confidence
    interval around it, infinite while nothing is known.
    """

    version: str
    units: int
    mean: float
    difference: float
    low: float
    high: float
    finding: Finding


@dataclass(frozen=True)
class Verdict:
    """``outcome`` ends the test, with its ``winner`` if it has one; ``pause`` pauses it; otherwise it goes on."""

    reason: str
    outcome: Outcome | None = None
    winner: str | None = None
    pause: bool = False


def compare(test: ABTest, champion: str, arms: tuple[Arm, ...]) -> tuple[Compared, ...]:
    """Every variant against the ``champion``, in the order of the definition."""
    samples = {arm.version: arm.sample for arm in arms}
    nothing = Sample(0, math.nan, math.nan)
    control, found = samples.get(champion, nothing), []
    for version in test.versions:
        treated = samples.get(version, nothing)
        estimate, half = difference(treated, control, test.alpha, 2 * test.units)
        low, high = (estimate - half, estimate + half) if math.isfinite(half) else (-math.inf, math.inf)
        better, worse = (low > 0, high < 0) if test.goal is Goal.HIGHER else (high < 0, low > 0)
        finding = Finding.BETTER if better else Finding.WORSE if worse else Finding.OPEN
        found.append(Compared(version, treated.units, treated.mean, estimate, low, high, finding))
    return tuple(found)


def split_log_e(test: ABTest, arms: tuple[int, ...]) -> float:
    """Evidence that units were not assigned by their shares; ``arms`` counts them, the champion's first.

    The mean over the arms of the evidence that one has another share than its own against all others together, which
    is an e-value as each of them is.
    """
    if not any(arms):
        return 0.0
    shares = (test.champion_share, *(variant.share for variant in test.variants))
    total, logs = sum(arms), []
    for share, count in zip(shares, arms, strict=True):
        logs.append(sample_ratio_log_e({share: (count, total - count)}))
    top = max(logs)
    return top + math.log(sum(math.exp(log - top) for log in logs) / len(logs))


def verdict(test: ABTest, champion: str, paused: bool, evidence: Evidence, now_us: int) -> Verdict:
    """What follows for a test that runs, at the cluster's time ``now_us``."""
    if evidence.accidents >= test.harm_cap:
        return Verdict(
            f"in {evidence.accidents} requests the champion had to answer for a variant: that is the cap", Outcome.LOST
        )
    elapsed = now_us - evidence.started_us
    late = Verdict(f"undecided after {test.patience}", Outcome.INCONCLUSIVE)
    is_late = elapsed >= microseconds(test.patience)
    if paused:
        return late if is_late else Verdict("paused")
    ratio, acts = split_log_e(test, evidence.arms), -math.log(test.ratio_alpha)
    if ratio >= acts:
        said = f"units are not assigned by their shares: log e {ratio:.2f} of {list(evidence.arms)} reaches {acts:.2f}"
        return Verdict(said, pause=True)
    if elapsed < microseconds(test.time):
        return Verdict(f"the test lasts at least {test.time}")
    arms = evidence.results[-1].arms if evidence.results else ()
    units = {arm.version: arm.sample.units for arm in arms}
    fewest = min(units.get(version, 0) for version in (champion, *test.versions))
    if fewest < test.units:
        return late if is_late else Verdict(f"{fewest} of {test.units} units with outcomes in the smallest arm")
    found = compare(test, champion, arms)
    if better := [one for one in found if one.finding is Finding.BETTER]:
        sign = 1 if test.goal is Goal.HIGHER else -1
        best = max(better, key=lambda one: sign * one.mean)
        said = f"version {best.version} is better by {best.difference:.6g}, from {best.low:.6g} to {best.high:.6g}"
        return Verdict(said, Outcome.WON, best.version)
    if all(one.finding is Finding.WORSE for one in found):
        return Verdict("every variant is shown to be worse than the champion", Outcome.LOST)
    return late if is_late else Verdict("no variant is shown to be better or worse yet")
