"""Sends the alerts to a webhook: each when it opens and when it resolves, at least once, whoever opened it.

What was sent is kept beside the alerts, so a process that is killed or a receiver that is away delays it and loses
nothing. An alert that has resolved before anybody could be told of it is not told of.
"""

from __future__ import annotations

from typing import Any

import httpx
from sqlalchemy import Row, and_, insert, or_, select, update

from cluster.alerts import Change
from cluster.clock import SystemClock
from cluster.database import Database
from cluster.schema import ALERTS, NOTIFICATIONS

_TIMEOUT_S, _LEASE_S = 5.0, 30.0


class NotificationFailed(ConnectionError):
    """The webhook did not take a notification; its URL, which may hold a secret, is in no message."""


class Webhook:
    """A URL that takes JSON documents."""

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, document: dict[str, Any]) -> None:
        """Posts the document; raises ``NotificationFailed`` when it is not taken."""
        try:
            answer = httpx.post(self._url, json=document, timeout=_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotificationFailed(f"the webhook cannot be reached: {type(error).__name__}") from None
        if not answer.is_success:
            raise NotificationFailed(f"the webhook answered {answer.status_code}")


class Notifier:
    """Tells ``webhook``; of the notifiers on one database one is at work. ``holder`` names this one."""

    def __init__(self, database: Database, webhook: Webhook, holder: str) -> None:
        self._database, self._webhook, self._holder = database, webhook, holder

    def turn(self) -> int:
        """Sends what has not been sent, the oldest alert first, and returns how much that was.

        Raises ``NotificationFailed``; then the next turn goes on from there. The lease is held in real time.
        """
        sent = 0
        if not self._due() or not self._at_work():
            return sent
        for row in self._due():  # as it is now that nobody else sends
            if not self._at_work():
                return sent
            change = Change.OPENED if row.told is None else Change.RESOLVED
            self._webhook.send(_document(row, change))
            with self._database.write() as connection:
                if row.told is None:
                    connection.execute(insert(NOTIFICATIONS).values(alert_id=row.id, told=change.value))
                else:
                    this = NOTIFICATIONS.c.alert_id == row.id
                    connection.execute(update(NOTIFICATIONS).where(this).values(told=change.value))
            sent += 1
        return sent

    def _at_work(self) -> bool:
        return self._database.acquire_lease("notifications", self._holder, _LEASE_S, SystemClock().now())

    def _due(self) -> list[Row[Any]]:
        told, resolved = NOTIFICATIONS.c.told, ALERTS.c.resolved_us
        both = ALERTS.outerjoin(NOTIFICATIONS, NOTIFICATIONS.c.alert_id == ALERTS.c.id)
        due = or_(and_(told.is_(None), resolved.is_(None)), and_(told == Change.OPENED.value, resolved.is_not(None)))
        with self._database.read() as connection:
            return list(connection.execute(select(ALERTS, told).select_from(both).where(due).order_by(ALERTS.c.id)))


def _document(row: Row[Any], change: Change) -> dict[str, Any]:
    """``text`` is for receivers that show a line of text, as chats do."""
    return {
        "text": f"{change.value}: {row.name} on {row.subject}: {row.detail}",
        "change": change.value,
        "alert": {
            "name": row.name,
            "subject": row.subject,
            "detail": row.detail,
            "opened_us": row.opened_us,
            "resolved_us": row.resolved_us,
        },
    }
