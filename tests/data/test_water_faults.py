"""The long replay's accounting, against a walk over every sensor and minute, and on tables with something wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.tables import Tables
from pipelines.contracts.enforce import events_table, quarantine_table
from pipelines.contracts.events import BUCKET, QUARANTINE_SCHEMA, event_order, events_schema
from tests.benchmarks.water_network import checks
from tests.benchmarks.water_network.faults import REPEATED_WITHIN, Fault, draw
from tests.benchmarks.water_network.page import USE_CASE
from tests.benchmarks.water_network.replay import Acknowledged

SENSORS, MINUTES = 400, 240


def test_every_reading_arrives_once_in_its_minute_after_a_delay_or_never() -> None:
    faults = draw(SENSORS, MINUTES, seed=7)
    assert {Fault(kind) for kind in faults.kind.tolist()} == set(Fault)
    due = {}
    for sensor in range(SENSORS):
        for minute in range(MINUTES):
            kind = faults.kind[sensor]
            inside = faults.start[sensor] <= minute < faults.stop[sensor]
            if not (inside and kind == Fault.SILENT):
                at = int(faults.stop[sensor]) if inside and kind == Fault.DELAYED else minute
                due[sensor, minute] = at, inside and kind == Fault.BROKEN
    arrived: dict[tuple[int, int], int] = {}
    repeats: Counter[tuple[int, int]] = Counter()
    for minute in range(MINUTES):
        found = faults.arrivals(minute)
        for sensor, told, again, broken in zip(
            found.sensors.tolist(), found.minutes.tolist(), found.repeated.tolist(), found.broken.tolist(), strict=True
        ):
            reading = (sensor, told)
            assert broken == due[reading][1]
            assert again == (reading in arrived), "a reading is repeated when it was sent before, and only then"
            if again:
                assert minute - told <= REPEATED_WITHIN
                repeats[reading] += 1
            else:
                arrived[reading] = minute
    assert arrived == {reading: at for reading, (at, _) in due.items() if at < MINUTES}
    assert repeats


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    made = Tables(tmp_path.as_uri())
    made.ensure(events_table(USE_CASE), events_schema(USE_CASE.contract), [BUCKET])
    made.ensure(quarantine_table(USE_CASE), QUARANTINE_SCHEMA)
    return made


@pytest.mark.parametrize(
    ("events", "records", "resent", "differing"),
    [
        ("abc", "xyy", 0, 0),
        ("ab", "xyy", 0, 1),
        ("abcc", "xyy", 0, 1),
        ("abcd", "xyy", 0, 1),
        ("", "", 0, 6),
        ("abc", "xy", 0, 1),
        ("abc", "xxy", 0, 2),
        ("abc", "xyyz", 0, 1),
        ("abc", "xxyy", 0, 1),
        ("abc", "xxyy", 1, 0),
        ("abc", "xyyz", 1, 1),
    ],
)
def test_lost_counts_what_is_missing_doubled_or_not_from_here(
    tables: Tables, events: str, records: str, resent: int, differing: int
) -> None:
    kept = Acknowledged(new=3, repeated=1, resent=resent, ids=[event_order("ab"), event_order("ac")])
    kept.refused = [event_order("xy"), event_order("y")]
    for name, schema, column, texts in (
        (events_table(USE_CASE), events_schema(USE_CASE.contract), "_event_id", events),
        (quarantine_table(USE_CASE), QUARANTINE_SCHEMA, "record", records),
    ):
        columns = {field.name: pa.nulls(len(texts), field.type) for field in schema}
        columns[column] = pa.array(list(texts), pa.string())
        if BUCKET in columns:
            columns[BUCKET] = pa.array(np.arange(len(texts)) % 2, pa.int32())
        tables.append(name, pa.table(columns, schema=schema), "rows")
    assert checks.lost(kept, tables, buckets=2) == differing
