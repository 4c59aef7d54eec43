"""Alerts told to a webhook, which is a real server that may be away, and may refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.alerts import Alerts
from cluster.clock import SystemClock
from cluster.database import Database
from cluster.notifications import NotificationFailed, Notifier, Webhook
from tests.receiver import Receiver, receiving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/control.db")
    made.create()
    yield made
    made.close()


def said(receiver: Receiver) -> list[tuple[str, str]]:
    return [(document["change"], document["alert"]["name"]) for document in receiver.told]


def test_an_alert_is_told_when_it_opens_and_when_it_resolves_and_not_in_between(receiver, database):
    alerts, notifier = Alerts(database, SystemClock()), Notifier(database, Webhook(receiver.url), "one")
    assert notifier.turn() == 0
    alerts.open("silent", "aqua/dma_1", "no inflow for 3.0 h")
    alerts.open("silent", "aqua/dma_1", "no inflow for 4.0 h")
    alerts.open("skew", "aqua", "3 of 9 differ")
    assert (notifier.turn(), notifier.turn()) == (2, 0)
    alerts.open("skew", "aqua", "4 of 9 differ")
    assert notifier.turn() == 0
    alerts.resolve("silent", "aqua/dma_1", "readings are back")
    assert (notifier.turn(), notifier.turn()) == (1, 0)
    assert said(receiver) == [("opened", "silent"), ("opened", "skew"), ("resolved", "silent")]
    assert receiver.told[0]["text"] == "opened: silent on aqua/dma_1: no inflow for 4.0 h"
    alerts.open("silent", "aqua/dma_1", "once more")
    assert notifier.turn() == 1


def test_what_a_receiver_does_not_take_is_told_later_and_its_url_is_in_no_message(receiver, database):
    alerts, notifier = Alerts(database, SystemClock()), Notifier(database, Webhook(receiver.url), "one")
    alerts.open("first", "aqua", "")
    receiver.status = 500
    with pytest.raises(NotificationFailed, match="the webhook answered 500") as refused:
        notifier.turn()
    assert "secret" not in str(refused.value)
    away = Notifier(database, Webhook("http://127.0.0.1:9/hook/secret"), "one")
    with pytest.raises(NotificationFailed, match="cannot be reached: ConnectError") as unreached:
        away.turn()
    assert "secret" not in str(unreached.value)
    with pytest.raises(NotificationFailed, match="cannot be reached: InvalidURL"):
        Notifier(database, Webhook("http://hook:port"), "one").turn()
    alerts.resolve("first", "aqua", "")
    alerts.open("second", "aqua", "")
    receiver.status = 200
    assert notifier.turn() == 1
    assert said(receiver) == [("opened", "second")], "what is over before it was told is not told"


def test_of_two_notifiers_one_is_at_work(receiver, database):
    alerts = Alerts(database, SystemClock())
    one, other = (Notifier(database, Webhook(receiver.url), name) for name in ("one", "other"))
    alerts.open("first", "aqua", "")
    assert (one.turn(), other.turn()) == (1, 0)
    alerts.open("second", "aqua", "")
    assert (other.turn(), one.turn()) == (0, 1)
    assert said(receiver) == [("opened", "first"), ("opened", "second")]


def test_what_another_sent_while_this_one_waited_for_its_turn_is_not_sent_again(receiver, database, monkeypatch):
    alerts = Alerts(database, SystemClock())
    one, other = (Notifier(database, Webhook(receiver.url), name) for name in ("one", "other"))
    alerts.open("first", "aqua", "")
    due = [other._due()]
    assert one.turn() == 1
    database.release_lease("notifications", "one")
    later = other._due
    monkeypatch.setattr(other, "_due", lambda: due.pop() if due else later())
    assert other.turn() == 0
    assert said(receiver) == [("opened", "first")]
