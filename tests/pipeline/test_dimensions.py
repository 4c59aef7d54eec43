"""Slowly changing dimensions end to end, on both backends: their log, state, table, training rows and audit."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.alerts import Alerts
from cluster.clock import ReplayClock
from cluster.database import Database
from cluster.log import Log, Record
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import ingest as job
from pipelines import usecases
from pipelines.backfill import materialize
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, contract_schema, decode_events, encode_event, events_schema
from pipelines.features import derived, dimensions
from pipelines.features.dimensions import look_up
from pipelines.features.offline import examples_schema
from pipelines.features.online import open_log as log_from_settings
from pipelines.features.online import open_state as open_from_settings
from pipelines.features.served import SERVED_SCHEMA, Status
from pipelines.features.skew import audit
from pipelines.features.state import StateError
from pipelines.features.training_table import NoTrainingRows, backfill, training_rows
from serving.events import DimensionFeed
from tests.backends import open_log, open_state
from tests.data.profiles import BASE, DAY_US, KIND, PROFILE, Asked, Fact, expected, made_case, table, worlds
from tests.data.worlds import same_bits
from tests.pipeline.test_backfill import same_tables

CASE = made_case()
SOURCE = CASE.source(PROFILE)


def fact(number: int, since: int, people: int | None, who: str = "m", known_at: int | None = None) -> Fact:
    from pipelines.contracts.events import from_microseconds

    told = {"revision": f"r{number}", "who": who, "since": from_microseconds(since), "people": people}
    return Fact({**told, "pipes": 0.1 * number, "open": None}, since if known_at is None else known_at)


def write(log: Log, told: Fact) -> None:
    with log.transaction(told.known_at) as txn:
        txn.append("events", [Record(None, encode_event(PROFILE.contract, told.record))])


def test_state_gives_what_the_past_has_however_it_was_made(place: str) -> None:
    numbers = itertools.count()

    @given(worlds(), st.data())
    @settings(max_examples=12, deadline=None)
    def holds(world: tuple[list[Fact], list[Asked]], data: st.DataObject) -> None:
        facts, requests = world
        log, opened = open_log(place, f"log{next(numbers)}"), open_state(place, CASE)
        state = opened.dimensions[0]
        state.materialize([], 0, log)
        done = 0
        for request in requests:
            for told in facts[done : request.cut]:
                write(log, told)
            done = request.cut
            if data.draw(st.booleans()):  # from the table up to some row, and the log after it
                upto = data.draw(st.integers(0, done))
                state.materialize(table(facts[:upto], list(range(1, upto + 1))), 7, log)
            assert state.project(log) == done
            found, (_, sequence) = state.read([request.key], request.now)
            assert sequence == done
            now, cut = np.array([request.now]), np.array([request.cut])
            past = look_up(PROFILE, table(facts), np.arange(1, len(facts) + 1), [request.key], now, cut)
            assert same_bits(found.values, past.values)
            assert found.newest == past.newest
            assert same_bits(found.values[:, 0], expected(facts, request)[0])
        opened.close()
        log.close()

    holds()


def test_a_value_is_stale_by_the_dimension_s_own_rule_and_missing_without_a_key(place: str) -> None:
    log, state = open_log(place), open_state(place, CASE)
    write(log, fact(1, BASE, 7))
    write(log, fact(2, BASE, 9, "garden"))
    for dimension in state.dimensions:
        dimension.project(log)
    reader, names = state.bind(), CASE.view.stored
    people, pipes = names.index("profile_people"), names.index("kind_pipes")
    read = reader.read(["m", "m", "n"], BASE + 11 * DAY_US, {"sort": ["garden", None, "never"]})
    assert read.values[0, [people, pipes]].tolist() == [7.0, 0.2]
    assert read.status[:, people].tolist() == [Status.STALE, Status.STALE, Status.MISSING]
    assert read.status[:, pipes].tolist() == [Status.FRESH, Status.MISSING, Status.MISSING]
    assert read.age_s[0, people] == 11 * 86_400.0
    assert read.others == ((0, 2), (0, 2))
    unasked = reader.read(["m"], BASE + DAY_US)  # by the entity alone, which is one dimension's key
    assert unasked.status[0, [people, pipes]].tolist() == [Status.FRESH, Status.MISSING]
    state.close()
    log.close()


def test_of_a_key_with_very_many_rows_the_latest_are_kept(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimensions, "MOST_ROWS", 3)
    log, opened = open_log(place), open_state(place, CASE)
    state = opened.dimensions[0]
    for number in (4, 1, 3, 2, 5):
        write(log, fact(number, BASE + number * DAY_US, number))
    state.project(log)
    assert state.read(["m"], BASE + 3 * DAY_US)[0].values[0] == 3.0
    with pytest.raises(StateError, match="more than 3 rows after"):
        state.read(["m"], BASE + 2 * DAY_US)
    opened.close()
    log.close()


@pytest.fixture
def settings_(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, buckets=4, drain_seconds=0.05)


@pytest.fixture
def tables(settings_: Settings) -> Tables:
    """Readings of two meters in the events table, one every six hours, known a minute later."""
    made = Tables(settings_.tables_url)
    made.ensure(events_table(CASE), events_schema(CASE.contract), partition_by=[BUCKET])
    blobs, known = [], []
    for i in range(40):
        at = fact(0, BASE + i * DAY_US // 4, None).record["since"]
        record = {"meter": f"m{i % 2}", "at": at, "flow": float(i), "level": 1.0, "sort": ["garden", None][i % 2]}
        blobs.append(encode_event(CASE.contract, record))
        known.append(BASE + i * DAY_US // 4 + 60_000_000)
    rows = decode_events(CASE.contract, blobs, known, [0] * 40, load_id="bulk", buckets=4)
    made.append(events_table(CASE), rows, "load/1")
    return made


def load_facts(tables: Tables, facts: list[Fact], marker: str) -> None:
    tables.ensure(events_table(SOURCE), events_schema(SOURCE.contract), [BUCKET])
    tables.ensure(events_table(CASE.source(KIND)), events_schema(SOURCE.contract), [BUCKET])
    tables.append(events_table(SOURCE), table(facts), marker)


def test_training_rows_see_the_facts_known_at_their_request(tables: Tables, settings_: Settings) -> None:
    with pytest.raises(NoTrainingRows, match=r"pipelines\.ingest meter --dimension profile"):
        backfill(CASE, tables=tables, settings=settings_, engine="arrow")
    late = fact(3, BASE + 2 * DAY_US, 30, "m0", known_at=BASE + 6 * DAY_US)
    facts = [fact(1, BASE - DAY_US, 10, "m0"), fact(2, BASE + 4 * DAY_US, 20, "m0"), late, fact(4, BASE, 1, "m1")]
    load_facts(tables, facts, "load/1")
    first = backfill(CASE, tables=tables, settings=settings_, engine="arrow")
    rows = training_rows(CASE, tables, first.events_version)
    assert rows.num_rows > 30
    for row in rows.select(["_time", "meter", "profile_people", "kind_pipes"]).to_pylist():
        now = round(row["_time"].timestamp() * 1e6)
        known = [f for f in facts if f.known_at <= now]
        wanted, _ = expected(known, Asked(len(known), now, row["meter"]))
        assert row["profile_people"] == wanted[0]
        assert np.isnan(row["kind_pipes"])
    load_facts(tables, [fact(5, BASE + DAY_US, 99, "m0")], "load/2")
    second = backfill(CASE, tables=tables, settings=settings_, engine="arrow")
    assert (second.buckets, second.rows) == (first.buckets, first.rows)
    pinned = training_rows(CASE, tables, first.events_version, dimensions=first.dimensions)
    assert same_tables(*(t.select(examples_schema(CASE).names).sort_by("_event_id") for t in (pinned, rows)))
    assert 99.0 in training_rows(CASE, tables, first.events_version).column("profile_people").to_pylist()


def test_rows_come_in_by_the_feed_reach_state_and_table_and_are_audited(tables: Tables, settings_: Settings) -> None:
    clock, database = ReplayClock(settings_.home / "clock"), Database(settings_.database_url)
    clock.set(BASE + 12 * DAY_US)
    database.create()
    load_facts(tables, [fact(1, BASE, 10, "m0"), fact(2, BASE, 4, "garden")], "load/1")
    materialize(CASE, tables=tables, database=database, settings=settings_, clock=clock)
    state = open_from_settings(settings_, CASE)
    log = log_from_settings(settings_, SOURCE)
    feed = DimensionFeed(
        SOURCE, log, lambda: state.dimensions[0].project(log), settings=settings_, clock=clock, tables=tables,
        database=database, alerts=Alerts(database, clock), holder="test",
    )  # fmt: skip
    served = []

    def serve(number: int) -> None:
        inputs = {"sort": ["garden"]}
        read, now = state.bind().read(["m0"], clock.now(), inputs), clock.now()
        columns = derived.columns(CASE.view, read.values, inputs, np.array([now]))
        row = {
            "prediction_id": f"p{number}", "_time": now, "entity": "m0", "inputs": '{"sort": "garden"}',
            "stored": read.values[0].tolist(), "status": read.status[0].tolist(),
            "numeric": [float(columns[name][0]) for name in CASE.model.numeric],
            "sequence": read.sequence, "generation": read.generation,
            "others": [n for position in read.others for n in position], "view": state.plan.fingerprint,
        }  # fmt: skip
        served.append(dict.fromkeys(SERVED_SCHEMA.names) | orjson.loads(orjson.dumps(row)))

    def since(at: int) -> str:
        return fact(0, at, None).record["since"].isoformat()

    serve(0)
    coming = {"revision": "r8", "who": "m0", "since": since(clock.now() + DAY_US), "people": 12}
    odd = {"revision": "r9", "who": "m0", "since": since(clock.now()), "people": -1}
    results = asyncio.run(feed.intake.ingest([coming, odd]))
    assert [r["status"] for r in results] == ["accepted", "quarantined"]
    serve(1)
    clock.set(clock.now() + 2 * DAY_US)
    serve(2)
    feed.close()
    people = CASE.view.stored.index("profile_people")
    assert [row["stored"][people] for row in served] == [10.0, 10.0, 12.0]
    from pipelines.drain import drain_once

    drain_once(SOURCE, feed.log, tables, database, settings_, "test")
    held = tables.read(events_table(SOURCE)).column("revision").to_pylist()
    assert sorted(held) == ["r1", "r2", "r8"]
    quarantine = tables.read("meter.profile/quarantine")
    assert quarantine.column("rules").to_pylist() == [["people.minimum"]]

    def report() -> tuple[int, int, list[str]]:
        found = audit(
            CASE, pa.Table.from_pylist(served, SERVED_SCHEMA), tables=tables, states={state.plan.fingerprint: state}
        )
        return found.checked, found.mismatched, sorted(found.by_feature)

    assert report() == (3, 0, [])
    served[1]["stored"][people] = 12.0
    assert report() == (3, 1, ["profile_people"])
    state.close()
    feed.log.close()
    database.close()


def test_the_job_loads_the_rows_of_a_dimension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(usecases, "load", lambda _: CASE)
    monkeypatch.setattr(usecases, "names", lambda: ["meter"])
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path / "home"))
    facts = [fact(i, BASE + i, i) for i in range(5)]
    file = tmp_path / "facts.parquet"
    pq.write_table(pa.Table.from_pylist([f.record for f in facts], contract_schema(SOURCE.contract)), file)
    assert job.main(["meter", str(file), "--dimension", "profile"]) == 0
    assert json.loads(capsys.readouterr().out)["accepted"] == 5
    assert Tables(Settings.from_environment().tables_url).read("meter.profile/events").num_rows == 5
    with pytest.raises(SystemExit):
        job.main(["meter", str(file), "--dimension", "colour"])
    assert "no dimension 'colour'; it has ['kind', 'profile']" in capsys.readouterr().err
