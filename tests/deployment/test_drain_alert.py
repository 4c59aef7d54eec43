"""A drain that cannot reach its tables opens an alert and loses nothing; no answer is drained before its events."""

from __future__ import annotations

from cluster.alerts import Alerts
from cluster.clock import SystemClock
from cluster.database import Database
from cluster.log import DurableLog, Record
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import encode_event, from_microseconds
from pipelines.features.served import predictions_table
from serving.events import ALERT, Drain
from tests.deployment.waiting import until

EVENT = {
    "district": "dma_1", "time": from_microseconds(1_700_000_000_000_000), "inflow": 1.0, "temperature": 1.0,
    "rain": 0.0, "humidity": None, "windspeed": None, "holiday": False,
}  # fmt: skip


def test_a_failing_drain_opens_an_alert_and_resolves_it_when_the_tables_are_back(home):
    settings = Settings(home=home, drain_seconds=0.05)
    use_case, clock = usecases.load("aqua"), SystemClock()
    database = Database(settings.database_url)
    database.create()
    alerts, tables = Alerts(database, clock), Tables(settings.tables_url)
    log = DurableLog(home / "log", remember_us=1_000_000)
    with log.transaction(clock.now()) as transaction:
        transaction.append("events", [Record(b"one", encode_event(use_case.contract, EVENT))])
    blocked = home / "tables"
    blocked.write_text("a file where the tables' directory should be")
    drain = Drain(use_case, log, lambda: log.last("events"), tables, database, settings, alerts, "me")
    try:
        until(lambda: [a.name for a in alerts.open_alerts()] == [ALERT], "the alert is open", 20)
        assert drain.alive()
        assert drain.failure is not None
        assert log.pending("events") == 1
        blocked.unlink()
        until(lambda: not alerts.open_alerts(), "the alert is resolved", 20)
        assert drain.failure is None
        assert tables.read(events_table(use_case)).num_rows == 1
        assert log.pending("events") == 0
    finally:
        drain.close()
        log.close()


def test_no_answer_reaches_its_table_before_the_events_that_it_was_made_from(home):
    settings = Settings(home=home, drain_seconds=0.01)
    use_case, clock = usecases.load("aqua"), SystemClock()
    database = Database(settings.database_url)
    database.create()
    tables, log = Tables(settings.tables_url), DurableLog(home / "log", remember_us=1_000_000)

    def one_more(number: int) -> None:
        told = {**EVENT, "time": from_microseconds(1_700_000_000_000_000 + number)}
        with log.transaction(clock.now()) as transaction:
            transaction.append("events", [Record(None, encode_event(use_case.contract, told))])
            transaction.append("predictions", [Record(None, b'{"prediction_id": "p%d"}' % number)])

    def project() -> int:
        applied = log.last("events")
        one_more(applied + 1)  # an event, and an answer from it, as soon as state has been brought up to the log
        return applied

    one_more(0)
    drain = Drain(use_case, log, project, tables, database, settings, Alerts(database, clock), "me")
    answers = predictions_table(use_case)
    try:
        until(lambda: tables.exists(answers) and tables.read(answers).num_rows > 2, "answers are drained", 20)
    finally:
        drain.close()
        log.close()
    assert tables.read(answers).num_rows <= tables.read(events_table(use_case)).num_rows
