"""Alerts: one opens, repeats quietly while its cause lasts, and resolves.

An alert is known by its name and subject. However often and from however many processes it is opened, it
is one open alert, and its sinks hear of it once per interval.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Protocol

from sqlalchemy import Row, insert, select, update

from cluster.clock import Clock
from cluster.database import Database
from cluster.schema import ALERTS

logger = logging.getLogger(__name__)


class Change(StrEnum):
    """What a sink is told about."""

    OPENED = "opened"
    REPEATED = "repeated"
    RESOLVED = "resolved"


@dataclass(frozen=True)
class Alert:
    """One alert as stored. ``repeats`` counts how often it was opened again; moments in microseconds."""

    name: str
    subject: str
    detail: str
    opened_us: int
    seen_us: int
    repeats: int
    resolved_us: int | None


class Sink(Protocol):
    """Somewhere alerts are told."""

    def tell(self, change: Change, alert: Alert) -> None:
        """Pass the change on; an error it raises reaches whoever opened or resolved the alert."""
        ...


class LogSink:
    """Tells alerts to the Python log: opened and repeated as warnings, resolved as information."""

    def tell(self, change: Change, alert: Alert) -> None:
        """Write one line."""
        level = logging.INFO if change is Change.RESOLVED else logging.WARNING
        message = "alert %s: %s on %s (%d repeats): %s"
        logger.log(level, message, change, alert.name, alert.subject, alert.repeats, alert.detail)


class Alerts:
    """The alerts in ``database``. Sinks are told after the change is stored, at most once per change.

    While an alert stays open they are told of its repeats at most once per ``repeat_every``, counted from
    when they were last told.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        sinks: Sequence[Sink] = (LogSink(),),
        *,
        repeat_every: timedelta = timedelta(hours=1),
    ) -> None:
        self._database = database
        self._clock = clock
        self._sinks = tuple(sinks)
        self._repeat_us = repeat_every // timedelta(microseconds=1)

    def open(self, name: str, subject: str, detail: str) -> Alert:
        """Open the alert, or count a repeat and keep the newest detail when it is open."""
        now = self._clock.now()
        with self._database.write() as connection:
            row = connection.execute(_open_one(name, subject)).one_or_none()
            if row is None:
                change: Change | None = Change.OPENED
                alert = Alert(name, subject, detail, opened_us=now, seen_us=now, repeats=0, resolved_us=None)
                moments = {"opened_us": now, "seen_us": now, "told_us": now}
                connection.execute(
                    insert(ALERTS).values(name=name, subject=subject, detail=detail, repeats=0, **moments)
                )
            else:
                change = Change.REPEATED if now - row.told_us >= self._repeat_us else None
                alert = Alert(name, subject, detail, row.opened_us, now, row.repeats + 1, None)
                told = now if change else row.told_us
                values = {"detail": detail, "seen_us": now, "repeats": row.repeats + 1, "told_us": told}
                connection.execute(update(ALERTS).where(ALERTS.c.id == row.id).values(**values))
        self._tell(change, alert)
        return alert

    def resolve(self, name: str, subject: str, detail: str) -> Alert | None:
        """Close the alert with a last detail; None if it is not open."""
        now = self._clock.now()
        with self._database.write() as connection:
            row = connection.execute(_open_one(name, subject)).one_or_none()
            if row is None:
                return None
            values = {"detail": detail, "seen_us": now, "resolved_us": now}
            connection.execute(update(ALERTS).where(ALERTS.c.id == row.id).values(**values))
        alert = Alert(name, subject, detail, row.opened_us, now, row.repeats, now)
        self._tell(Change.RESOLVED, alert)
        return alert

    def open_alerts(self) -> list[Alert]:
        """All open alerts, the oldest first."""
        query = select(ALERTS).where(ALERTS.c.resolved_us.is_(None)).order_by(ALERTS.c.opened_us, ALERTS.c.id)
        with self._database.read() as connection:
            return [_alert(row) for row in connection.execute(query)]

    def _tell(self, change: Change | None, alert: Alert) -> None:
        if change is not None:
            for sink in self._sinks:
                sink.tell(change, alert)


def _open_one(name: str, subject: str) -> Any:
    return select(ALERTS).where(ALERTS.c.name == name, ALERTS.c.subject == subject, ALERTS.c.resolved_us.is_(None))


def _alert(row: Row[Any]) -> Alert:
    return Alert(row.name, row.subject, row.detail, row.opened_us, row.seen_us, row.repeats, row.resolved_us)
