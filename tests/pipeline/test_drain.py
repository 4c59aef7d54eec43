"""The drain: every record of the log in its table once, with the log trimmed, whatever fails in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.log import Log, Record
from cluster.tables import TableMoved, Tables
from pipelines import drain as module
from pipelines.contracts import events, leases
from pipelines.drain import drain, drain_once
from tests.backends import open_log
from tests.pipeline.loads import START, USE_CASE, World, everything, readings, world

CONTRACT = USE_CASE.contract
NOW_US = events.to_microseconds(START) + 86_400_000_000


class Killed(RuntimeError):
    """Stands for the death of the process at one point."""


@pytest.fixture
def here(home: Path) -> World:
    return world(home)


@pytest.fixture
def log(place: str) -> Iterator[Log]:
    log = open_log(place)
    yield log
    log.close()


def _append(log: Log, numbers: range) -> None:
    records = [
        Record(events.event_id(CONTRACT, row).encode(), events.encode_event(CONTRACT, row))
        for row in readings(numbers).to_pylist()
    ]
    with log.transaction(NOW_US) as transaction:
        transaction.append("events", records)


def _answer(number: int) -> dict[str, Any]:
    return {
        "prediction_id": f"p{number}", "_time": NOW_US + number, "entity": "dma_1",
        "inputs": "{}", "stored": [1.5, None], "status": [0, 3], "numeric": [2.0], "sequence": 7,
        "generation": 1,
        "view": "v", "model_version": "1", "variant": "champion", "value": 3.0, "lower": 2.0, "upper": 4.0,
    }  # fmt: skip


def _put(log: Log, stream: str, values: list[Any]) -> None:
    with log.transaction(NOW_US) as transaction:
        transaction.append(stream, [Record(None, json.dumps(value).encode()) for value in values])


def test_every_stream_reaches_its_table_and_leaves_the_log(here: World, log: Log) -> None:
    _append(log, range(30))
    _put(log, "predictions", [_answer(i) for i in range(3)])
    _put(log, "outcomes", [{"prediction_id": "p1", "value": 3.5, "at": NOW_US}])
    refused = {"_load_id": "http", "source": "http", "position": 0, "contract": "district_readings",
               "contract_version": "1.0.0", "rules": ["rain.missing"],
               "record": "{}", "at": NOW_US}  # fmt: skip
    _put(log, "quarantine", [refused])
    drained = drain(USE_CASE, log, here.tables, here.settings)
    assert drained.rows == {"events": 30, "quarantine": 1, "predictions": 3, "outcomes": 1}
    assert (drained.total, drained.duplicates) == (35, 0)
    accepted, quarantine = everything(here.tables)
    accepted = accepted.sort_by([("_sequence", "ascending")])
    assert accepted.column("_sequence").to_pylist() == list(range(1, 31))
    assert accepted.select(CONTRACT_NAMES).to_pylist() == readings(range(30)).to_pylist()
    assert set(accepted.column("_known_at").cast("int64").to_pylist()) == {NOW_US}
    assert quarantine.column("rules").to_pylist() == [["rain.missing"]]
    answers = here.tables.read("aqua/predictions").sort_by([("prediction_id", "ascending")]).to_pylist()
    assert events.to_microseconds(answers[2]["_time"]) == NOW_US + 2
    assert (answers[0]["stored"], answers[0]["status"]) == ([1.5, None], [0, 3])
    assert here.tables.read("aqua/outcomes").column("value").to_pylist() == [3.5]
    assert [log.pending(s) for s in ("events", "quarantine", "predictions", "outcomes")] == [0] * 4
    assert drain(USE_CASE, log, here.tables, here.settings).total == 0


CONTRACT_NAMES = [field.name for field in CONTRACT.fields]


def test_a_drain_goes_on_where_the_last_one_ended(here: World, log: Log) -> None:
    for start in (0, 10, 20):
        _append(log, range(start, start + 10))
        drain(USE_CASE, log, here.tables, here.settings)
    assert sorted(everything(here.tables)[0].column("_sequence").to_pylist()) == list(range(1, 31))


def test_commits_are_bounded_and_stop_where_told(here: World, log: Log) -> None:
    _append(log, range(25))
    settings = here.settings.model_copy(update={"drain_rows": 10})
    drained = drain(USE_CASE, log, here.tables, settings, stop_at={"events": 15})
    assert (drained.rows, log.first("events")) == ({"events": 15}, 16)
    assert here.tables.version("aqua/events") == 2
    assert drain(USE_CASE, log, here.tables, settings).rows == {"events": 10}


def test_an_event_that_a_load_brought_too_is_refused_as_a_duplicate(here: World, log: Log, tmp_path: Path) -> None:
    _append(log, range(10, 30))
    pq.write_table(readings(range(20)), tmp_path / "a.parquet")
    here.load([str(tmp_path / "a.parquet")])
    drained = drain(USE_CASE, log, here.tables, here.settings)
    assert (drained.rows, drained.duplicates) == ({"events": 10}, 10)
    accepted, quarantine = everything(here.tables)
    ids = accepted.column("_event_id").to_pylist()
    assert (len(ids), len(set(ids))) == (30, 30)
    assert quarantine.column("position").to_pylist() == list(range(1, 11))
    assert quarantine.column("rules").to_pylist() == [["key.duplicate"]] * 10


def test_events_that_another_publishes_while_they_are_drained_are_published_once(
    here: World, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a load that the drain's lease did not keep away, after the drain had looked which events the table has."""
    pq.write_table(readings(range(20)), tmp_path / "a.parquet")
    _append(log, range(20))
    look = module._new

    def looked(*arguments: Any) -> Any:
        found = look(*arguments)
        monkeypatch.undo()
        assert here.load([str(tmp_path / "a.parquet")]).accepted == 20
        return found

    monkeypatch.setattr(module, "_new", looked)
    with pytest.raises(TableMoved):
        drain(USE_CASE, log, here.tables, here.settings)
    assert log.pending("events") == 20
    drain(USE_CASE, log, here.tables, here.settings)
    assert log.pending("events") == 0
    assert everything(here.tables)[0].num_rows == 20


@pytest.mark.parametrize("point", ["events", "duplicates", "trim"])
def test_a_drain_killed_between_its_steps_repeats_and_loses_nothing(
    here: World, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    pq.write_table(readings(range(20)), tmp_path / "a.parquet")
    here.load([str(tmp_path / "a.parquet")])
    _append(log, range(10, 30))
    append = Tables.append

    def dying(self: Tables, name: str, table: Any, app_id: str, *rest: Any, **options: Any) -> Any:
        if app_id.endswith(point):
            raise Killed
        return append(self, name, table, app_id, *rest, **options)

    with monkeypatch.context() as patch:
        if point == "trim":
            patch.setattr(type(log), "trim", lambda *_: (_ for _ in ()).throw(Killed))
        else:
            patch.setattr(Tables, "append", dying)
        with pytest.raises(Killed):
            drain(USE_CASE, log, here.tables, here.settings)
    assert log.pending("events") == 20
    _append(log, range(30, 40))
    drain(USE_CASE, log, here.tables, here.settings)
    accepted, quarantine = everything(here.tables)
    assert sorted(accepted.column("_event_id").to_pylist()) == sorted(_ids(range(40)))
    assert sorted(quarantine.column("position").to_pylist()) == list(range(1, 11))
    assert log.pending("events") == 0


def test_only_the_holder_of_the_lease_drains(here: World, log: Log) -> None:
    _append(log, range(10))
    arguments = (USE_CASE, log, here.tables, here.database, here.settings)
    assert leases.try_events(here.database, USE_CASE, "a load")
    assert drain_once(*arguments, "me") is None
    assert log.pending("events") == 10
    here.database.release_lease(f"drain/{USE_CASE.name}", "a load")

    def stop_at() -> dict[str, int]:
        assert not leases.try_events(here.database, USE_CASE, "a rebuild"), "what a rebuild publishes could be missed"
        return {"events": 6}

    drained = drain_once(*arguments, "me", stop_at=stop_at)
    assert drained is not None
    assert (drained.rows, log.pending("events")) == ({"events": 6}, 4)
    assert leases.try_events(here.database, USE_CASE, "a load")


def test_a_record_of_another_form_is_named_and_kept(here: World, log: Log) -> None:
    _put(log, "outcomes", [{"prediction_id": "p1", "value": 3.5, "at": NOW_US}, {"prediction": "p1"}])
    with pytest.raises(ValueError, match="record 2 of stream 'outcomes' must be an object of"):
        drain(USE_CASE, log, here.tables, here.settings)
    assert log.pending("outcomes") == 2


def test_streams_are_named_as_the_writers_name_them() -> None:
    names = (module.EVENTS, module.QUARANTINE, module.PREDICTIONS, module.OUTCOMES)
    assert names == ("events", "quarantine", "predictions", "outcomes")


def _ids(numbers: range) -> list[str]:
    return events.event_ids(CONTRACT, readings(numbers)).to_pylist()
