"""Alerts: one per name and subject, told when it opens, once per interval while it lasts, and at its end."""

from __future__ import annotations

from datetime import timedelta

import pytest

from cluster.alerts import Alerts, Change
from cluster.database import Database

HOUR = 3_600_000_000


class Hand:
    """A clock that a test turns."""

    def __init__(self):
        self.time = 1

    def now(self):
        return self.time


class Listener:
    def __init__(self):
        self.heard = []

    def tell(self, change, alert):
        self.heard.append((change, alert.name, alert.subject, alert.detail, alert.repeats))


@pytest.fixture
def database(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    yield database
    database.close()


@pytest.fixture
def clock():
    return Hand()


@pytest.fixture
def listener():
    return Listener()


@pytest.fixture
def alerts(database, clock, listener):
    return Alerts(database, clock, (listener,), repeat_every=timedelta(hours=1))


def test_an_alert_opens_once_and_counts_its_repeats(alerts, clock, listener):
    alerts.open("silent", "dma_1", "no reading for 3 h")
    clock.time += HOUR - 1
    again = alerts.open("silent", "dma_1", "no reading for 4 h")
    assert (again.repeats, again.opened_us, again.seen_us) == (1, 1, HOUR)
    assert alerts.open_alerts() == [again]
    assert listener.heard == [(Change.OPENED, "silent", "dma_1", "no reading for 3 h", 0)]


def test_its_sinks_hear_of_repeats_once_per_interval(alerts, clock, listener):
    alerts.open("silent", "dma_1", "a")
    for _ in range(9):  # every 20 minutes for three hours
        clock.time += HOUR // 3
        alerts.open("silent", "dma_1", "b")
    assert [(change, repeats) for change, _, _, _, repeats in listener.heard] == [
        (Change.OPENED, 0),
        (Change.REPEATED, 3),
        (Change.REPEATED, 6),
        (Change.REPEATED, 9),
    ]


def test_it_resolves_once_and_may_open_anew(alerts, clock, listener):
    alerts.open("silent", "dma_1", "a")
    clock.time += 5
    assert alerts.resolve("silent", "dma_1", "reads again").resolved_us == 6
    assert alerts.resolve("silent", "dma_1", "reads again") is None
    assert alerts.open_alerts() == []
    assert alerts.open("silent", "dma_1", "b").repeats == 0
    assert [heard[0] for heard in listener.heard] == [Change.OPENED, Change.RESOLVED, Change.OPENED]


def test_subjects_and_names_do_not_mix(alerts):
    alerts.open("silent", "dma_1", "a")
    alerts.open("silent", "dma_2", "a")
    alerts.open("drift", "dma_1", "a")
    alerts.resolve("silent", "dma_1", "b")
    assert [(alert.name, alert.subject) for alert in alerts.open_alerts()] == [
        ("silent", "dma_2"),
        ("drift", "dma_1"),
    ]


def test_processes_share_one_alert(alerts, database, clock, listener):
    other = Listener()
    alerts.open("silent", "dma_1", "a")
    Alerts(Database(database.url), clock, (other,)).open("silent", "dma_1", "a")
    assert (len(listener.heard), other.heard) == (1, [])
    assert alerts.open_alerts()[0].repeats == 1


def test_a_sink_that_fails_is_loud_and_the_alert_is_kept(database, clock):
    class Broken:
        def tell(self, change, alert):
            raise ConnectionError("no pager")

    alerts = Alerts(database, clock, (Broken(),))
    with pytest.raises(ConnectionError):
        alerts.open("silent", "dma_1", "a")
    assert len(alerts.open_alerts()) == 1


def test_the_log_is_told_by_default(database, clock, caplog):
    Alerts(database, clock).open("silent", "dma_1", "no reading")
    assert "opened: silent on dma_1 (0 repeats): no reading" in caplog.text
