"""The backfill: its training table, its two engines, its idempotence, and the rebuild of online state."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.clock import ReplayClock, SystemClock
from cluster.database import Database
from cluster.log import DurableLog, Record
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import backfill as job
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, EVENT_ID, encode_event, events_schema, log_identities
from pipelines.drain import drain
from pipelines.features.offline import build_examples, examples_schema
from pipelines.features.online import OnlineState, open_log, open_state
from pipelines.features.training_table import NoTrainingRows, backfill, training_rows, training_table
from pipelines.spec import Calendar
from tests.backends import on_redis
from tests.data.worlds import BASE, CONTRACT, SECOND, VIEW, same_bits
from tests.pipeline.test_online_state import MINUTE, bulk, record, use_case

CASE = use_case()


def history(meters: int = 7, events: int = 40) -> pa.Table:
    rng = np.random.default_rng(11)
    return bulk(
        [
            record(f"m{m}", BASE + i * MINUTE + m, float(rng.normal()), float(rng.normal()))
            for i in range(events)
            for m in range(meters)
        ]
    )


@pytest.fixture
def tables(home: Path) -> Tables:
    made = Tables((home / "tables").as_uri())
    made.ensure(events_table(CASE), events_schema(CONTRACT), partition_by=[BUCKET])
    made.append(events_table(CASE), history(), "load/1")
    return made


@pytest.fixture
def settings(home: Path, place: str) -> Settings:
    """Settings of each backend of log and state."""
    return Settings(home=home, state_url=place if on_redis(place) else None)


def database(settings: Settings) -> Database:
    made = Database(settings.database_url)
    made.create()
    return made


def rows_of(tables: Tables, version: int) -> pa.Table:
    rows = training_rows(CASE, tables, version)
    return rows.select(examples_schema(CASE).names).sort_by([("_time", "ascending"), (EVENT_ID, "ascending")])


def same_tables(left: pa.Table, right: pa.Table) -> bool:
    if left.schema != right.schema or left.num_rows != right.num_rows:
        return False
    for name in left.schema.names:
        one, other = left.column(name).combine_chunks(), right.column(name).combine_chunks()
        if pa.types.is_floating(one.type):
            if not same_bits(one.to_numpy(zero_copy_only=False), other.to_numpy(zero_copy_only=False)):
                return False
        elif not one.equals(other):
            return False
    return True


def test_training_rows_are_the_examples_of_all_buckets(tables: Tables, home: Path) -> None:
    done = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    expected = build_examples(CASE, history()).sort_by([("_time", "ascending"), (EVENT_ID, "ascending")])
    assert done.rows == expected.num_rows > 0
    assert same_tables(rows_of(tables, done.events_version), expected)


def test_a_second_backfill_of_the_same_events_adds_nothing(tables: Tables, home: Path) -> None:
    first = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    again = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    assert (again.rows, again.table_version) == (first.rows, first.table_version)


def test_each_events_version_has_its_own_rows(tables: Tables, home: Path) -> None:
    first = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    more = bulk([record("m0", BASE + 50 * MINUTE + i, 1.0) for i in range(3)])
    tables.append(events_table(CASE), more, "load/2")
    second = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    assert second.rows == first.rows + 3
    assert training_rows(CASE, tables, first.events_version).num_rows == first.rows
    old = backfill(
        CASE, tables=tables, settings=Settings(home=home), events_version=first.events_version, engine="arrow"
    )
    assert old.rows == first.rows


def test_only_buckets_that_a_new_version_touched_are_made_again(tables: Tables, home: Path) -> None:
    first = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    assert first.buckets == len(set(history().column(BUCKET).to_pylist())) > 1
    tables.append(events_table(CASE), bulk([record("m0", BASE + 50 * MINUTE, 1.0)]), "load/2")
    second = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    assert (second.buckets, second.rows) == (1, first.rows + 1)
    expected = build_examples(CASE, tables.read(events_table(CASE)))
    names = [("_time", "ascending"), (EVENT_ID, "ascending")]
    assert same_tables(rows_of(tables, second.events_version), expected.sort_by(names))


def test_rows_that_were_never_made_are_asked_for_by_name(tables: Tables, home: Path) -> None:
    with pytest.raises(NoTrainingRows, match=r"pipelines\.backfill meter --events-version 1"):
        training_rows(CASE, tables, 1)
    done = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    tables.append(events_table(CASE), bulk([record("m0", BASE + 50 * MINUTE, 1.0)]), "load/2")
    with pytest.raises(NoTrainingRows, match=r"1 of [0-9]+ buckets of events version 2"):
        training_rows(CASE, tables, 2)
    assert training_rows(CASE, tables, 1).num_rows == done.rows


def test_backfills_that_race_make_each_bucket_once(tables: Tables, home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = [
            pool.submit(backfill, CASE, tables=tables, settings=Settings(home=home), engine="arrow") for _ in range(4)
        ]
        rows = {done.result().rows for done in made}
        buckets = sorted(done.result().buckets for done in made)
    assert rows == {training_rows(CASE, tables, 1).num_rows} == {build_examples(CASE, history()).num_rows}
    assert buckets[:-1] == [0, 0, 0]


@given(st.integers(1, 90), st.integers(0, 3))
@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_slices_of_a_bucket_make_the_rows_of_the_whole_bit_for_bit(
    tables: Tables, home: Path, task_rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    silent = [record("m8", BASE + int(at) * 3 * MINUTE, float(rng.normal()), 1.0) for at in (0, 1, 40, 41, 300)]
    held = pa.concat_tables([history(3, 60), bulk(silent)])
    case = CASE.model_copy(update={"name": f"meter{seed}x{task_rows}"})
    tables.ensure(events_table(case), events_schema(CONTRACT), partition_by=[BUCKET])
    tables.append(events_table(case), held, "load/1")
    settings = Settings(home=home, task_rows=task_rows)
    done = backfill(case, tables=tables, settings=settings, engine="arrow")
    names = [("_time", "ascending"), (EVENT_ID, "ascending")]
    expected = build_examples(case, held).sort_by(names)
    assert done.rows == expected.num_rows
    assert same_tables(training_rows(case, tables, done.events_version).sort_by(names), expected)


def test_a_backfill_of_an_older_version_does_not_see_later_events(tables: Tables, home: Path) -> None:
    pinned = tables.version(events_table(CASE))
    more = bulk([record("m0", BASE + 50 * MINUTE + i, 1.0) for i in range(3)])
    tables.append(events_table(CASE), more, "load/2")
    done = backfill(CASE, tables=tables, settings=Settings(home=home), events_version=pinned, engine="arrow")
    assert done.rows == build_examples(CASE, history()).num_rows


def test_another_view_or_target_has_a_table_of_its_own() -> None:
    fewer = use_case(VIEW.model_copy(update={"lags": ()}))
    target = CASE.model.target.model_copy(update={"horizon": 120 * SECOND})
    other = CASE.model_copy(update={"model": CASE.model.model_copy(update={"target": target})})
    assert len({training_table(case) for case in (CASE, fewer, other)}) == 3


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_and_plain_arrow_make_the_same_rows(tables: Tables, home: Path, tmp_path: Path) -> None:
    plain = backfill(CASE, tables=tables, settings=Settings(home=home), engine="arrow")
    expected = rows_of(tables, plain.events_version)
    other = Tables((tmp_path / "other").as_uri())
    other.ensure(events_table(CASE), events_schema(CONTRACT), partition_by=[BUCKET])
    other.append(events_table(CASE), history(), "load/1")
    # A bucket of this many rows is made by several tasks, so one busy key does not keep the others waiting.
    carried = backfill(CASE, tables=other, settings=Settings(home=home, task_rows=25), engine="ray")
    assert carried.rows == plain.rows
    assert same_tables(rows_of(other, carried.events_version), expected)


def test_the_ray_engine_without_a_cluster_says_what_to_do(
    tables: Tables, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="connect first"):
        backfill(CASE, tables=tables, settings=Settings(home=home), engine="ray")


def test_rebuilt_state_continues_the_table_with_the_log(tables: Tables, settings: Settings) -> None:
    now = BASE + 41 * MINUTE
    log = open_log(settings, CASE)
    fresh = record("m0", now, 4.5, 1.0)
    with log.transaction(now) as txn:
        txn.append("events", [Record(None, encode_event(CONTRACT, fresh))])
    log.close()
    done = job.materialize(CASE, tables=tables, database=database(settings), settings=settings, clock=SystemClock())
    assert (done.generation, done.sequence, done.entities) == (1, 1, 7)
    state = open_state(settings, CASE)
    assert state.generation(1) == done.events_version == tables.version(events_table(CASE))
    read = state.bind().read(["m0"], now)
    assert read.values[0, state.plan.features.index("flow_last_1m")] == 4.5
    state.close()


def test_an_event_that_a_load_brought_is_not_taken_again_by_the_log(tables: Tables, settings: Settings) -> None:
    settings = settings.model_copy(update={"remember_seconds": 3600})
    clock = ReplayClock(settings.clock_file)
    clock.set(BASE + 80 * MINUTE)
    job.materialize(CASE, tables=tables, database=database(settings), settings=settings, clock=clock)
    rows = history().sort_by("_known_at")
    oldest, *_, newest = log_identities(CONTRACT, rows)
    log = open_log(settings, CASE)
    with log.transaction(clock.now()) as txn:
        taken = txn.append("events", [Record(newest, b"x"), Record(oldest, b"y"), Record(b"new", b"z")])
    assert taken == [None, 1, 2]  # the oldest is past what is remembered
    log.close()


def test_state_is_rebuilt_after_a_drain_whose_last_records_were_duplicates(tables: Tables, settings: Settings) -> None:
    now = BASE + 41 * MINUTE
    log = open_log(settings, CASE)
    again = record("m0", BASE, 1.0)  # the table has this event from the load
    with log.transaction(now) as txn:
        txn.append("events", [Record(None, encode_event(CONTRACT, again))])
    drained = drain(CASE, log, tables, settings)
    assert (drained.duplicates, log.pending("events")) == (1, 0)
    log.close()
    done = job.materialize(CASE, tables=tables, database=database(settings), settings=settings, clock=SystemClock())
    assert (done.sequence, done.entities) == (1, 7)


def test_state_is_rebuilt_from_the_newest_table_while_drains_go_on(tables: Tables, settings: Settings) -> None:
    now = BASE + 41 * MINUTE
    first = backfill(CASE, tables=tables, settings=settings, engine="arrow")
    log = open_log(settings, CASE)
    with log.transaction(now) as txn:
        txn.append("events", [Record(None, encode_event(CONTRACT, record("m0", now, 4.5)))])
    drain(CASE, log, tables, settings)
    log.close()
    done = job.materialize(CASE, tables=tables, database=database(settings), settings=settings, clock=SystemClock())
    assert done.events_version > first.events_version
    assert done.sequence == 1


def test_an_event_of_a_time_that_no_calendar_covers_does_not_stop_the_others(tables: Tables) -> None:
    calendar = Calendar(zone="Europe/Rome", parts=("hour",))
    case = use_case(VIEW.model_copy(update={"calendar": calendar}))
    old = [record("m0", -2_200_000_000_000_000 + i * MINUTE, 1.0) for i in range(3)]  # the year 1900
    with_old = pa.concat_tables([history(), bulk(old)])
    assert build_examples(case, with_old).num_rows >= build_examples(case, history()).num_rows > 0
    times = build_examples(case, with_old).column("_time").cast(pa.int64()).to_pylist()
    assert min(times) > 0


def test_state_read_at_a_request_time_equals_the_trained_row(tables: Tables, home: Path) -> None:
    examples = build_examples(CASE, history())
    now = max(examples.column("_time").cast(pa.int64()).to_pylist())
    wanted = examples.filter(pa.compute.equal(examples.column("_time").cast(pa.int64()), now))
    visible = history().filter(pa.compute.less_equal(history().column("_known_at").cast(pa.int64()), now))
    log = DurableLog(home / "log", remember_us=1_000_000)
    state = OnlineState(home / "state", CASE)
    state.materialize(visible, 0, log)
    read = state.bind().read(wanted.column("meter").to_pylist(), now)
    trained = np.column_stack([wanted.column(name).to_numpy() for name in VIEW.stored])
    assert same_bits(read.values, trained)
    assert read.status.tolist() == wanted.column("_status").to_pylist()
    state.close()
    log.close()


def test_the_job_prints_its_report_as_the_last_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIDEGATE_HOME", str(home))
    monkeypatch.setattr(job.usecases, "names", lambda: ["meter"])
    monkeypatch.setattr(job.usecases, "load", lambda _: CASE)
    made = Tables(Settings(home=home).tables_url)
    made.ensure(events_table(CASE), events_schema(CONTRACT), partition_by=[BUCKET])
    made.append(events_table(CASE), history(2, 5), "load/1")
    assert job.main(["meter", "--engine", "arrow", "--materialize"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["rows"] == 8
    assert report["state"]["entities"] == 2
    assert job.main(["meter", "--materialize", "--only-state"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone.keys() == {"state"}
    assert alone["state"]["generation"] == 2
