"""A sensor that falls silent: one alert opens and resolves, whoever watches, and the state says what is held."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from cluster.alerts import Alert, Alerts, Change
from cluster.database import Database
from cluster.log import DurableLog
from pipelines.features.offline import silenced
from pipelines.features.online import OnlineState
from pipelines.monitoring.sensors import ALERT, SilenceMonitor
from pipelines.spec import Fallback, UseCase
from tests.data.worlds import BASE, same_bits
from tests.pipeline.test_online_state import MINUTE, bulk, oracle, record, use_case, write

SECOND = 1_000_000
SILENCE = 120 * SECOND
POLICY = Fallback(
    hold=timedelta(minutes=3), silence=timedelta(microseconds=SILENCE), zone="Europe/Rome", slots=("hour",)
)
CASE: UseCase = use_case().model_copy(update={"fallback": POLICY})


class Hand:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.time = BASE

    def now(self) -> int:
        return self.time

    def advance(self, microseconds: int) -> int:
        self.time += microseconds
        return self.time


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[Change, str]] = []

    def tell(self, change: Change, alert: Alert) -> None:
        assert alert.name == ALERT
        self.heard.append((change, alert.subject))


@dataclasses.dataclass
class Network:
    """Meters that write to one log, the state on it, and the database of alerts."""

    path: Path
    clock: Hand
    log: DurableLog
    state: OnlineState
    database: Database
    alerts: Alerts
    listener: Listener

    def tell(self, *meters: str, flow: float | None = 1.0, late: int = 0) -> None:
        write(self.log, [record(m, self.clock.time - late, flow, 2.0) for m in meters], self.clock.time)
        self.state.project(self.log)

    def monitor(self) -> SilenceMonitor:
        return SilenceMonitor(CASE, self.state, self.alerts)

    def open(self) -> list[str]:
        return sorted(alert.subject for alert in self.alerts.open_alerts())


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    clock, listener = Hand(), Listener()
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    log = DurableLog(tmp_path / "log", remember_us=3_600_000_000)
    state = OnlineState(tmp_path / "state", CASE)
    yield Network(tmp_path, clock, log, state, database, Alerts(database, clock, (listener,)), listener)
    state.close()
    log.close()
    database.close()


def test_an_alert_opens_when_a_sensor_falls_silent_and_resolves_when_readings_return(network: Network) -> None:
    monitor = network.monitor()
    network.tell("a", "b")
    assert monitor.check(network.clock.now()) == ()
    network.tell("b")
    assert monitor.check(network.clock.advance(SILENCE)) == (), "silent is more than the limit, not the limit"
    network.tell("b")
    assert monitor.check(network.clock.advance(1)) == ("a",)
    assert network.open() == ["meter/a"]
    (alert,) = network.alerts.open_alerts()
    assert "no flow for 0.0 h, since 2023-11-14T22:13:20Z" in alert.detail
    network.clock.advance(10 * SECOND)
    network.tell("a", "b")
    assert monitor.check(network.clock.now()) == ()
    assert network.open() == []
    assert network.listener.heard == [(Change.OPENED, "meter/a"), (Change.RESOLVED, "meter/a")]


def test_events_without_the_watched_reading_are_silence(network: Network) -> None:
    monitor = network.monitor()
    network.tell("a")
    for _ in range(5):
        network.clock.advance(30 * SECOND)
        network.tell("a", flow=None)
        monitor.check(network.clock.now())
    assert network.open() == ["meter/a"]


def test_a_sensor_that_was_read_since_it_was_last_looked_at_is_not_silent(network: Network) -> None:
    monitor = network.monitor()
    network.tell("a")
    monitor.check(network.clock.now())
    for _ in range(10):
        network.clock.advance(50 * SECOND)
        network.tell("a")
        assert monitor.check(network.clock.now()) == ()
    assert network.listener.heard == []


def test_silence_is_noticed_although_nothing_at_all_comes_in_any_more(network: Network) -> None:
    monitor = network.monitor()
    network.tell("a", "b")
    monitor.check(network.clock.now())
    assert monitor.check(network.clock.advance(SILENCE + 1)) == ("a", "b")
    assert network.open() == ["meter/a", "meter/b"]


def test_a_reading_that_comes_late_ends_silence_only_if_it_is_recent(network: Network) -> None:
    monitor = network.monitor()
    network.tell("a")
    monitor.check(network.clock.advance(SILENCE + 60 * SECOND))
    network.tell("a", late=85 * SECOND)
    assert monitor.check(network.clock.now()) == ()
    network.clock.advance(SILENCE)
    assert monitor.check(network.clock.now()) == ("a",)


def test_a_monitor_that_is_started_anew_resolves_what_an_earlier_one_opened(network: Network) -> None:
    network.tell("a", "b")
    network.clock.advance(SILENCE + 1)
    network.tell("b")
    network.monitor().check(network.clock.now())
    network.tell("a")
    assert network.open() == ["meter/a"]
    assert network.monitor().check(network.clock.now()) == ()
    assert network.open() == []


def test_a_sensor_silent_for_longer_than_state_remembers_stays_silent_over_a_restart(network: Network) -> None:
    network.tell("a")
    first = network.monitor()
    first.check(network.clock.now())
    network.clock.advance(SILENCE + 1)
    first.check(network.clock.now())
    network.clock.advance(60 * MINUTE)
    assert first.check(network.clock.now()) == ("a",)
    assert network.monitor().check(network.clock.now()) == ("a",)
    assert [change for change, _ in network.listener.heard] == [Change.OPENED]


def test_an_entity_that_never_gave_a_reading_is_waited_for(network: Network) -> None:
    monitor = network.monitor()
    network.tell("new", flow=None)
    assert monitor.check(network.clock.now()) == ()
    assert monitor.check(network.clock.advance(SILENCE)) == ()
    assert monitor.check(network.clock.advance(1)) == ("new",)
    (alert,) = network.alerts.open_alerts()
    assert alert.detail.startswith("no flow was ever read")
    network.tell("new")
    assert monitor.check(network.clock.now()) == ()
    assert network.open() == []


def test_two_monitors_open_and_resolve_one_alert_once(network: Network) -> None:
    one, two = network.monitor(), network.monitor()
    network.tell("a")
    one.check(network.clock.now())
    two.check(network.clock.now())
    network.clock.advance(SILENCE + 1)
    assert one.check(network.clock.now()) == two.check(network.clock.now()) == ("a",)
    (alert,) = network.alerts.open_alerts()
    assert alert.repeats == 0
    network.tell("a")
    one.check(network.clock.now())
    two.check(network.clock.now())
    assert [change for change, _ in network.listener.heard] == [Change.OPENED, Change.RESOLVED]


def test_the_database_is_left_alone_while_nothing_changes(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = network.monitor()
    network.tell("a", "b")
    network.clock.advance(SILENCE + 1)
    network.tell("b")
    monitor.check(network.clock.now())

    def refuse(*_: object) -> None:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(network.database, "write", refuse)
    monkeypatch.setattr(network.database, "read", refuse)
    for _ in range(5):
        network.clock.advance(10 * SECOND)
        network.tell("b")
        assert monitor.check(network.clock.now()) == ("a",)


def test_an_alert_that_could_not_be_written_is_written_at_the_next_check(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = network.monitor()
    network.tell("a")
    monitor.check(network.clock.now())
    network.clock.advance(SILENCE + 1)

    def fail(*_: object) -> None:
        raise ConnectionError("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(network.database, "write", fail)
        with pytest.raises(ConnectionError):
            monitor.check(network.clock.now())
    assert monitor.check(network.clock.now()) == ("a",)
    assert network.open() == ["meter/a"]


def test_state_that_was_rebuilt_is_read_anew(network: Network) -> None:
    monitor = network.monitor()
    network.tell("a", "b")
    network.clock.advance(SILENCE + 1)
    assert monitor.check(network.clock.now()) == ("a", "b")
    history = [record(m, network.clock.time - SECOND, 1.0) for m in ("a", "c")]
    network.state.materialize(bulk(history), 1, network.log, drained=network.log.last("events"))
    assert monitor.check(network.clock.now()) == ()
    assert network.open() == ["meter/b"], "nothing is known of an entity that left the state: its alert stays"


def test_alerts_of_others_are_left_alone_and_stand_in_for_none(network: Network) -> None:
    others = Alerts(network.database, network.clock, ())
    others.open(ALERT, "other/a", "another use case")
    others.open(ALERT, "a", "no use case at all")
    others.open("drift", "meter/a", "another alert")
    network.tell("a")
    monitor = network.monitor()
    monitor.check(network.clock.now())
    assert network.open() == ["a", "meter/a", "other/a"]
    assert monitor.check(network.clock.advance(SILENCE + 1)) == ("a",)
    assert network.open() == ["a", "meter/a", "meter/a", "other/a"]


def test_without_a_policy_nothing_says_what_silence_is(network: Network) -> None:
    with pytest.raises(ValueError, match="has no fallback"):
        SilenceMonitor(use_case(), network.state, network.alerts)


def test_a_simulated_silence_is_what_state_gives_when_events_stop() -> None:
    rng = np.random.default_rng(5)
    rows = [
        record(meter, BASE + i * 20 * SECOND + int(rng.integers(0, SECOND)), float(rng.normal()), float(rng.normal()))
        for i in range(40)
        for meter in ("a", "b")
    ]
    told = [(row, int(row["at"].timestamp() * 1_000_000)) for row in rows]
    moments = np.array([BASE + int(t) * SECOND for t in rng.integers(300, 900, 12)], np.int64)
    entities = np.array(["b", "a", "nobody"] * 4, dtype=object)
    moments[:2] = told[1][1] + 200 * SECOND, told[2][1] + 45 * SECOND  # to the microsecond a silence after an event
    for silence in (0, 45 * SECOND, 200 * SECOND):
        found = silenced(CASE, bulk(rows), entities, moments, silence)
        for row, (entity, moment) in enumerate(zip(entities, moments.tolist(), strict=True)):
            heard = [(event, known) for event, known in told if known <= moment - silence]
            assert same_bits(found[row], oracle(heard, entity, moment))
