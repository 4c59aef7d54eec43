"""What the ingest tests share: readings of the water contract, a standing clock, a home with stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts import enforce, events
from pipelines.ingest import LoadReport, ingest
from pipelines.spec import UseCase
from pipelines.usecases import aqua

START = datetime(2023, 1, 1, tzinfo=UTC)
USE_CASE = aqua.USE_CASE


@dataclass(frozen=True)
class FixedClock:
    moment: datetime = datetime(2023, 1, 3, tzinfo=UTC)

    def now(self) -> int:
        return events.to_microseconds(self.moment)


@dataclass(frozen=True)
class World:
    """One home: its settings, tables, database and clock."""

    settings: Settings
    tables: Tables
    database: Database
    clock: FixedClock

    def load(self, sources: Sequence[str], use_case: UseCase = USE_CASE, **options: Any) -> LoadReport:
        return ingest(
            use_case,
            sources,
            tables=self.tables,
            database=self.database,
            settings=self.settings,
            clock=self.clock,
            **options,
        )


def world(home: Path) -> World:
    settings = Settings(home=home)
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    database.create()
    return World(settings, Tables(settings.tables_url), database, FixedClock())


def readings(numbers: range) -> pa.Table:
    """Row i: a reading of one of ten districts, inflow i (modulo 300), at its own hundredth of a second."""
    count = len(numbers)
    return pa.table(
        {
            "district": [f"dma_{i % 10}" for i in numbers],
            "time": pa.array([START + timedelta(milliseconds=10 * i) for i in numbers], events.INSTANT),
            "inflow": [float(i % 300) for i in numbers],
            "temperature": [1.0] * count,
            "rain": [0.0] * count,
            "humidity": pa.array([None] * count, pa.float64()),
            "windspeed": [2.0] * count,
            "holiday": [False] * count,
        }
    )


def everything(tables: Tables) -> tuple[pa.Table, pa.Table]:
    """All accepted events and all refused rows."""
    return tables.read(enforce.events_table(USE_CASE)), tables.read(enforce.quarantine_table(USE_CASE))
