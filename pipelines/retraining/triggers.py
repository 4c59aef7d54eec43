"""Why a model is to be trained again: small conditions look at what was observed, and the first that is due opens a
trigger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

from cluster.alerts import Alerts
from cluster.clock import Clock
from cluster.database import Database
from cluster.triggers import Trigger, Triggers
from pipelines.monitoring.drift import Drift
from pipelines.monitoring.performance import Decay
from pipelines.spec import RetrainPolicy, UseCase
from pipelines.spec.base import microseconds

Kind = Literal["decay", "drift", "age", "manual"]
ALERT, FAILED_ALERT = "retraining_triggered", "retraining_failed"
_SHOWN = 10  # drifted series in the evidence; their number is there besides


@dataclass(frozen=True)
class Observed:
    """What conditions look at. A verdict that the policy does not ask for is None.

    ``newest_us`` is the request time of the newest example that the champion ``version`` was made with, None where the
    policy does not ask or the present view did not make them.
    """

    version: str
    now_us: int
    newest_us: int | None = None
    decay: Decay | None = None
    drift: Drift | None = None


@dataclass(frozen=True)
class Seen:
    """What one condition found: whether it is due, in words why or why not, and the numbers."""

    kind: Kind
    due: bool
    reason: str
    evidence: dict[str, Any]


class Condition(Protocol):
    """A reason to train again."""

    def look(self, observed: Observed) -> Seen:
        """What it finds; pure."""
        ...


@dataclass(frozen=True)
class Decayed:
    """The champion errs more than its validation promised."""

    def look(self, observed: Observed) -> Seen:
        """Due on a verdict of decay; inconclusive is not due, and says so."""
        decay = observed.decay
        if decay is None:
            return Seen("decay", False, "inconclusive: decay was not judged", {})
        reason = decay.reason if decay.finding != "inconclusive" else f"inconclusive: {decay.reason}"
        return Seen("decay", decay.finding == "decayed", reason, _numbers(asdict(decay)))


@dataclass(frozen=True)
class Drifted:
    """What the champion is shown has moved away from what it was trained on."""

    def look(self, observed: Observed) -> Seen:
        """Due when any series has drifted."""
        drift = observed.drift
        if drift is None:
            return Seen("drift", False, "inconclusive: drift was not judged", {})
        silent = sum(one.finding == "inconclusive" for one in drift.series)
        found = drift.drifted
        names = [one.column if one.entity is None else f"{one.column} of {one.entity}" for one in found]
        if found:
            reason = f"{len(found)} of {len(drift.series)} series drifted: {', '.join(names[:_SHOWN])}"
        else:
            reason = f"none of {len(drift.series)} series drifted, {silent} are inconclusive"
            reason = f"inconclusive: {reason}" if drift.finding == "inconclusive" else reason
        evidence = {
            "version": observed.version,
            "series": len(drift.series),
            "inconclusive": silent,
            "drifted": len(found),
            "largest": [_numbers(asdict(one)) for one in found[:_SHOWN]],
        }
        return Seen("drift", drift.finding == "drifted", reason, evidence)


@dataclass(frozen=True)
class Aged:
    """The champion's newest example is older than ``limit``."""

    limit: timedelta

    def look(self, observed: Observed) -> Seen:
        """Due once the age exceeds the limit."""
        if observed.newest_us is None:
            return Seen("age", False, "inconclusive: the champion's examples are of another view", {})
        age_us = observed.now_us - observed.newest_us
        due = age_us > microseconds(self.limit)
        days, most = age_us / 86_400e6, self.limit / timedelta(days=1)
        reason = f"the newest example of version {observed.version} is {days:.1f} days old; the limit is {most:g}"
        return Seen("age", due, reason, {"version": observed.version, "age_days": days, "limit_days": most})


def conditions(policy: RetrainPolicy) -> tuple[Condition, ...]:
    """The conditions that a policy watches; decay first, because it is about answers and not about their causes."""
    watched: list[Condition] = []
    if policy.decay is not None:
        watched.append(Decayed())
    if policy.drift is not None:
        watched.append(Drifted())
    if policy.max_age is not None:
        watched.append(Aged(policy.max_age))
    return tuple(watched)


def look(watched: Sequence[Condition], observed: Observed) -> tuple[Seen, ...]:
    """What every condition finds, in order."""
    return tuple(condition.look(observed) for condition in watched)


def pending(database: Database, usecase: str) -> Trigger | None:
    """The trigger of a use case that is open or running."""
    return next((trigger for trigger in reversed(Triggers(database).all(usecase)) if trigger.pending), None)


def open_due(
    use_case: UseCase, policy: RetrainPolicy, seen: Sequence[Seen], *, database: Database, clock: Clock
) -> Trigger | None:
    """Opens a trigger on the first finding that is due, with its alert; None when there is none or it has to wait.

    It waits for the cool-down, for another trigger, and for a release that is under way: until that has ended, the
    champion that decays is the one that is being replaced.
    """
    due = next((one for one in seen if one.due), None)
    if due is None or database.open_releases(use_case.name):
        return None
    evidence = {**due.evidence, "reason": due.reason}
    cool_down = microseconds(policy.cool_down)
    return _told(Triggers(database).open(use_case.name, due.kind, evidence, clock.now(), cool_down), database, clock)


def open_by_hand(use_case: UseCase, reason: str, *, database: Database, clock: Clock) -> Trigger | None:
    """Opens a trigger because a person asks for it, whatever the cool-down; None while another is pending."""
    if not reason.strip():
        raise ValueError("a trigger opened by hand needs a reason: it is the only evidence there is")
    return _told(Triggers(database).open(use_case.name, "manual", {"reason": reason}, clock.now()), database, clock)


def tell(trigger: Trigger, alerts: Alerts) -> None:
    """Opens the trigger's alert unless it is open; a process killed before it could is made up for by the next."""
    for alert in alerts.open_alerts():
        if (alert.name, alert.subject) == (ALERT, trigger.usecase):
            return
    alerts.open(ALERT, trigger.usecase, f"{trigger.kind}: {trigger.evidence.get('reason', '')}")


def _told(trigger: Trigger | None, database: Database, clock: Clock) -> Trigger | None:
    if trigger is not None:
        tell(trigger, Alerts(database, clock))
    return trigger


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values: a figure that could not be taken is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
