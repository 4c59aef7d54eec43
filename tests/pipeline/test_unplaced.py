"""Events that state could not place: one alert tells, until none has come for as long as state reaches back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.alerts import Alerts
from cluster.database import Database
from cluster.log import DurableLog
from pipelines.features.online import OnlineState
from pipelines.monitoring.unplaced import ALERT, UnplacedMonitor
from tests.data.test_flood import keeping
from tests.data.worlds import BASE, PLAN
from tests.pipeline.test_online_state import record, use_case, write


class Hand:
    time = BASE

    def now(self) -> int:
        return self.time


class Node:
    """A log, and a state on it that keeps a single unsettled event."""

    def __init__(self, path: Path) -> None:
        self.clock = Hand()
        self.database = Database(f"sqlite:///{path}/control.db")
        self.database.create()
        self.log = DurableLog(path / "log", remember_us=3_600_000_000)
        self.state = OnlineState(path / "state", use_case())
        self.state.plan = keeping(1)
        self.alerts = Alerts(self.database, self.clock)

    def tell(self, time: int) -> None:
        write(self.log, [record("a", time, 1.0, 2.0)], BASE + 3)
        self.state.project(self.log)

    def check(self, monitor: UnplacedMonitor, later_us: int = 0) -> tuple[int, list[tuple[str, str]]]:
        self.clock.time += later_us
        found = monitor.check(self.clock.now())
        return found, [(alert.name, alert.subject) for alert in self.alerts.open_alerts()]

    def monitor(self) -> UnplacedMonitor:
        return UnplacedMonitor(self.state, self.alerts)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.state.close()
    made.log.close()
    made.database.close()


def test_an_alert_opens_when_events_are_left_out_and_resolves_when_none_were_for_long(node: Node) -> None:
    monitor, told = node.monitor(), [(ALERT, "meter")]
    node.tell(BASE)
    node.tell(BASE + 3)
    assert node.check(monitor) == (0, [])
    node.tell(BASE - 1)
    assert node.check(monitor) == (1, told)
    assert node.check(monitor, PLAN.reach_us - 1) == (1, told)
    node.tell(BASE - 2)
    assert node.check(monitor) == (2, told)
    assert node.check(monitor, PLAN.reach_us - 1) == (2, told)
    assert node.check(monitor, 1) == (2, [])


def test_another_process_goes_on_with_an_alert_that_is_open(node: Node) -> None:
    node.tell(BASE)
    node.tell(BASE + 3)
    first = node.monitor()
    assert node.check(first) == (0, [])
    node.tell(BASE - 1)
    assert node.check(first) == (1, [(ALERT, "meter")])
    follower = node.monitor()
    assert node.check(follower) == (1, [(ALERT, "meter")])
    assert node.check(follower, PLAN.reach_us) == (1, [])
    assert node.check(node.monitor()) == (1, []), "what was left out long ago is no news"
