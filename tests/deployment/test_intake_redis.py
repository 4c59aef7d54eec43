"""Ingest while its Redis server is away: refused with what to do, never acknowledged, and nothing twice afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.alerts import Alerts
from cluster.clock import SystemClock
from cluster.database import Database
from cluster.redis_log import RedisLog
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import EVENT_ID
from pipelines.drain import drain
from pipelines.features.online import OnlineState
from serving.events import ALERT, Drain, EventIntake
from serving.problems import Problem
from tests import services
from tests.deployment.waiting import until

NOW = 1_700_000_000_000_000


class Clock:
    def now(self) -> int:
        return NOW


def event(second: int) -> dict[str, Any]:
    return {
        "district": "dma_1", "time": f"2023-11-14T22:00:{second:02d}Z", "inflow": 1.0, "temperature": 1.0, "rain": 0.0,
        "humidity": None, "windspeed": None, "holiday": False,
    }  # fmt: skip


def refusal(ask: Callable[[], Awaitable[object]]) -> Problem:
    async def run() -> object:
        return await ask()

    with pytest.raises(Problem) as caught:
        asyncio.run(run())
    return caught.value


def test_events_are_refused_while_the_server_is_away_and_taken_once_when_it_is_back(home: Path) -> None:
    case = usecases.load("aqua")
    with services.redis() as server:
        log = RedisLog(server.url, case.name, remember_us=3_600_000_000, patience_s=0.2)
        state = OnlineState(server.url, case)
        intake = EventIntake(case, log, Clock(), lambda: state.project(log))
        (first,) = asyncio.run(intake.ingest([event(0)]))
        assert (first["status"], first["sequence"]) == ("accepted", 1)
        server.kill()
        for ask in (lambda: intake.ingest([event(1)]), lambda: intake.outcomes({"p": b"{}"})):
            problem = refusal(ask)
            assert (problem.status, problem.retry_after_s) == (503, 1)
            assert "does not answer" in problem.title
        server.start()
        again = asyncio.run(intake.ingest([event(0), event(1)]))
        assert [(r["status"], r.get("duplicate"), r.get("sequence")) for r in again] == [
            ("accepted", True, None),
            ("accepted", None, 2),
        ]
        intake.close()
        assert (state.applied(), state.names()) == (2, ["dma_1"])
        tables = Tables((home / "tables").as_uri())
        assert drain(case, log, tables, Settings(home=home)).rows == {"events": 2}
        ids = tables.read(events_table(case)).column(EVENT_ID).to_pylist()
        assert len(ids) == len(set(ids)) == 2


@pytest.mark.parametrize("first_asked", ["state", "log"])
def test_the_drain_outlives_a_server_that_is_away(home: Path, first_asked: str) -> None:
    case, settings = usecases.load("aqua"), Settings(home=home, drain_seconds=0.05)
    database = Database(settings.database_url)
    database.create()
    alerts, tables = Alerts(database, SystemClock()), Tables(settings.tables_url)
    with services.redis() as server:
        log = RedisLog(server.url, case.name, remember_us=3_600_000_000, patience_s=0.2)
        state = OnlineState(server.url, case)
        project = {"state": lambda: state.project(log), "log": lambda: log.last("events")}[first_asked]
        drain = Drain(case, log, project, tables, database, settings, alerts, "me")
        server.kill()
        until(lambda: [a.name for a in alerts.open_alerts()] == [ALERT], "the alert is open", 20)
        assert drain.alive()
        server.start()
        until(lambda: not alerts.open_alerts(), "the alert is resolved", 20)
        assert drain.failure is None
        drain.close()
