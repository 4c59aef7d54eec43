"""Tells when state could not place events: features of their entity may then lack them."""

from __future__ import annotations

import math

from cluster.alerts import Alerts
from pipelines.features.online import OnlineState
from pipelines.features.windows import MAX_RAW_EVENTS

ALERT = "events_unplaced"
"""The alert's name; its subject is the use case."""


class UnplacedMonitor:
    """Keeps one alert open from when the count of a state grows until it has rested for as long as state reaches back.

    For one thread at a time. Several may watch one state: an alert that is open already counts a repeat.
    """

    def __init__(self, online: OnlineState, alerts: Alerts) -> None:
        self._online, self._alerts = online, alerts
        self._name = online.use_case.name
        self._reach_us = online.plan.reach_us
        self._seen: int | None = None  # None before the first check: what was left out long ago is no news
        self._until = math.inf  # when an alert that is open is resolved

    def check(self, now_us: int) -> int:
        """How many events of this state could not be placed, as of ``now_us`` (the cluster's clock); sees to the alert.

        After an error of state or database the next check does the same again.
        """
        count = self._online.unplaced()
        if self._seen is None:
            self._until = now_us + self._reach_us  # an earlier process may have left one open
        elif count > self._seen:
            detail = (
                f"{count} events came when events after them were settled already, and features leave them out: see "
                f"which entity has more than {MAX_RAW_EVENTS} events within {self._reach_us / 1e6:g} s; lower the "
                "contract's lateness or split the entity"
            )
            self._alerts.open(ALERT, self._name, detail)
            self._until = now_us + self._reach_us
        elif now_us >= self._until:
            self._alerts.resolve(ALERT, self._name, "no further event was left out")
            self._until = math.inf
        self._seen = count
        return count
