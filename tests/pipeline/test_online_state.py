"""Entity state as a projection of the ingest log, on both backends: restarts, rebuilds, its reader, the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.log import DurableLog, Log, Record
from cluster.settings import Settings
from pipelines.contracts.events import decode_events, encode_event, event_order, from_microseconds
from pipelines.features import online as module
from pipelines.features.online import NO_TABLE, OnlineState
from pipelines.features.served import Status
from pipelines.features.state import StateError
from pipelines.features.stores import StoreFull, Transaction
from pipelines.features.stores.lmdb import LmdbStore
from pipelines.spec import FeatureView, FieldType, ModelSpec, Split, Target, UseCase
from tests.backends import on_redis, open_log, open_state
from tests.data.oracle import Event, features
from tests.data.worlds import BASE, CONTRACT, SECOND, VIEW, World, same_bits, worlds

MINUTE = 60_000_000


def use_case(view: FeatureView = VIEW, *kept: FeatureView) -> UseCase:
    model = ModelSpec(
        name="meter",
        target=Target(field="flow", horizon=60 * SECOND),
        numeric=("flow_mean_1m",),
        split=Split(calibration=timedelta(days=1), test=timedelta(days=1)),
    )
    return UseCase(name="meter", title="Meters", contract=CONTRACT, view=view, kept=kept, model=model, gates=())


def two_views() -> UseCase:
    """A page with an earlier view, which had no lags."""
    return use_case(VIEW, VIEW.model_copy(update={"lags": ()}))


def record(meter: str, at: int, flow: float | None, level: float | None = None) -> dict[str, object]:
    return {"meter": meter, "at": from_microseconds(at), "flow": flow, "level": level}


def write(log: Log, records: list[dict[str, object]], now: int) -> None:
    with log.transaction(now) as txn:
        txn.append("events", [Record(None, encode_event(CONTRACT, r)) for r in records])


def bulk(records: list[dict[str, object]], sequences: list[int] | None = None) -> pa.Table:
    blobs = [encode_event(CONTRACT, r) for r in records]
    known = [int(r["at"].timestamp() * 1_000_000) for r in records]
    return decode_events(CONTRACT, blobs, known, sequences or [0] * len(records), load_id="bulk", buckets=4)


def bulk_row(log: Log, sequence: int) -> pa.Table:
    """A record of the log as a row of the events table."""
    (found,) = log.read("events", sequence - 1, 1)
    return decode_events(CONTRACT, [found.value], [found.known_at_us], [sequence], load_id="drain", buckets=4)


def oracle(records: list[tuple[dict[str, object], int]], meter: str, now: int) -> np.ndarray:
    events = []
    for row, known_at in records:
        if row["meter"] == meter:
            at = int(row["at"].timestamp() * 1_000_000)
            order = int(event_order([f"{meter}|{at}"])[0])
            events.append(Event(at, order, known_at, row))
    return np.array([value for value, _ in features(VIEW, CONTRACT, events, now)])


@pytest.fixture
def log(place: str) -> Iterator[Log]:
    opened = open_log(place)
    yield opened
    opened.close()


@pytest.fixture
def online(place: str) -> Iterator[OnlineState]:
    opened = open_state(place, use_case())
    yield opened
    opened.close()


def test_state_equals_the_oracle_whatever_was_projected_reopened_or_rebuilt(place: str) -> None:
    numbers = itertools.count()

    @given(worlds(most=25), st.data())
    @settings(max_examples=30, deadline=None)
    def holds(world: World, data: st.DataObject) -> None:
        log = open_log(place, f"log{next(numbers)}")
        # A generation of its own, so that what an earlier example left is gone.
        state = open_state(place, use_case())
        state.materialize([], 0, log)
        told: dict[int, tuple[dict[str, object], int]] = {}
        rows: list[dict[str, object]] = []
        done = 0
        for read in world.reads:
            for event in world.events[done : read.cut]:
                if event.time not in told:  # an event of one meter and one time is one event
                    rows.append(record("m", event.time, event.values["flow"], event.values["level"]))
                    told[event.time] = rows[-1], event.known_at
                    write(log, rows[-1:], event.known_at)
            done = read.cut
            if data.draw(st.booleans()):
                state.close()
                state = open_state(place, use_case())
            if data.draw(st.booleans()):
                cut = data.draw(st.integers(0, len(rows)))
                table = [bulk_row(log, sequence) for sequence in range(1, cut + 1)]
                state.materialize([pa.concat_tables(table)] if table else [], 1, log, drained=cut)
            assert state.project(log) == len(rows)
            got = state.bind().read(["m"], read.now).values[0]
            assert same_bits(got, oracle(list(told.values()), "m", read.now))
        state.close()
        log.close()

    holds()


def test_projected_state_reads_as_the_oracle_says(log: Log, online: OnlineState) -> None:
    told: list[tuple[dict[str, object], int]] = []
    rng = np.random.default_rng(3)
    now = BASE
    for _ in range(12):
        now += 20_000_000
        rows = [
            record(meter, now - int(rng.integers(0, 100_000_000)), float(rng.normal()), float(rng.normal()))
            for meter in ("a", "b")
        ]
        write(log, rows, now)
        told += [(row, now) for row in rows]
        assert online.project(log) == log.last("events")
        read = online.bind().read(["a", "b", "never"], now)
        assert same_bits(read.values[0], oracle(told, "a", now))
        assert same_bits(read.values[1], oracle(told, "b", now))
        assert read.known.tolist() == [True, True, False]
        assert (read.sequence, read.generation) == (log.last("events"), 0)
    assert online.generation(0) == NO_TABLE
    assert online.entities() == 2


def test_projecting_again_or_after_a_restart_applies_nothing_twice(log: Log, place: str) -> None:
    write(log, [record("a", BASE, 1.0), record("a", BASE + 1, 2.0)], BASE + 1)
    first = open_state(place, use_case())
    first.project(log)
    first.project(log)
    first.close()
    write(log, [record("a", BASE + 2, 3.0)], BASE + 2)
    again = open_state(place, use_case())
    again.project(log)
    count = again.plan.features.index("flow_count_1m")
    assert again.bind().read(["a"], BASE + 2).values[0, count] == 3.0
    again.close()


def test_materialized_state_is_table_rows_and_the_log_after_them(log: Log, online: OnlineState) -> None:
    history = [record("a", BASE + i * MINUTE, float(i) / 3, 1.0) for i in range(20)]
    later = [record("a", BASE + 20 * MINUTE, 0.1), record("b", BASE + 20 * MINUTE, 7.0)]
    now = BASE + 20 * MINUTE
    write(log, later[:1], now)
    write(log, later[1:], now)
    drained = bulk(later[:1], sequences=[1])
    generation = online.materialize(pa.concat_tables([bulk(history), drained]), 17, log)
    assert (generation, online.generation(generation), online.applied()) == (1, 17, 2)
    told = [(row, int(row["at"].timestamp() * 1_000_000)) for row in history] + [(row, now) for row in later]
    read = online.bind().read(["a", "b"], now)
    assert same_bits(read.values[0], oracle(told, "a", now))
    assert same_bits(read.values[1], oracle(told, "b", now))
    assert online.materialize([bulk(history)], 18, log) == 2
    assert same_bits(online.bind().read(["a"], now).values[0], read.values[0])


def test_a_rebuild_that_fails_leaves_the_old_state(log: Log, online: OnlineState) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    before = online.bind().read(["a"], BASE).values

    def broken() -> Iterator[pa.Table]:
        yield bulk([record("a", BASE, 9.0)])
        raise OSError("the table went away")

    with pytest.raises(OSError, match="went away"):
        online.materialize(broken(), 3, log)
    assert same_bits(online.bind().read(["a"], BASE).values, before)
    assert online.applied() == 1


def test_a_gap_in_the_log_is_an_error_that_says_to_rebuild(log: Log, online: OnlineState) -> None:
    write(log, [record("a", BASE, 1.0), record("a", BASE + 1, 2.0)], BASE + 1)
    log.trim("events", 1)
    with pytest.raises(StateError, match="--materialize"):
        online.project(log)


def test_state_ahead_of_the_log_is_an_error_and_a_rebuild_its_remedy(log: Log, online: OnlineState, place: str) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    young = open_log(place, "another")
    with pytest.raises(StateError, match="holds 1 to 0"):
        online.project(young)
    online.materialize([bulk([record("b", BASE, 1.0)])], 1, young)
    assert (online.project(young), online.names()) == (0, ["b"])
    young.close()


def test_a_changed_view_has_a_state_of_its_own(log: Log, online: OnlineState, place: str) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    narrower = open_state(place, use_case(VIEW.model_copy(update={"lags": ()})))
    assert narrower.applied() == 0
    assert narrower.project(log) == 1
    assert narrower.bind().read(["a"], BASE).values.shape[1] == len(VIEW.stored) - 2
    narrower.close()


def test_stale_values_are_flagged_by_the_reader(log: Log, online: OnlineState) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    mean = online.plan.features.index("flow_mean_1m")
    read = online.bind().read(["a"], BASE + 51_000_000)
    assert read.status[0, mean] == Status.STALE
    assert read.age_s[0, mean] == 51.0


def test_settings_say_where_log_and_state_are_kept(place: str, home: Path) -> None:
    made = Settings(home=home, state_url=place if on_redis(place) else None)
    log, state = module.open_log(made, use_case()), module.open_state(made, use_case())
    for where in (log.where, state.store.where):
        assert where.startswith("unix:///" if on_redis(place) else str(home / "state" / "meter"))
    assert log.remember_us == 7 * 86_400_000_000
    state.close()
    log.close()


def test_names_and_numbers_of_entities_survive_a_rebuild(log: Log, online: OnlineState) -> None:
    assert (online.entities(), online.names()) == (0, [])
    write(log, [record(name, BASE, 1.0) for name in ("b", "head", "é")], BASE)
    online.project(log)
    assert (online.entities(), online.names()) == (3, ["b", "head", "é"])
    online.materialize([bulk([record("c", BASE, 1.0)])], 1, log)
    assert (online.entities(), online.names()) == (4, ["b", "c", "head", "é"])


def test_a_rebuild_from_the_past_is_refused_when_the_log_no_longer_has_what_follows(
    log: Log, online: OnlineState
) -> None:
    write(log, [record("a", BASE + i, 1.0) for i in range(3)], BASE + 3)
    online.project(log)
    log.trim("events", 2)
    with pytest.raises(StateError, match="holds 3 to 3"):
        online.materialize([bulk([record("a", BASE, 1.0)])], 1, log, drained=1)
    assert (online.generation(0), online.position()) == (NO_TABLE, (0, 3))


def test_a_change_that_raises_changes_nothing(online: OnlineState) -> None:
    def failing(txn: Transaction) -> None:
        txn.put(["a"], [b"state"])
        txn.put_head(b"head")
        raise OSError("not this time")

    with pytest.raises(OSError, match="not this time"):
        online.store.change(failing)
    assert (online.entities(), online.position()) == (0, (0, 0))


def test_a_rebuild_that_is_not_published_is_an_error_and_changes_nothing(log: Log, online: OnlineState) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    with pytest.raises(RuntimeError, match="without being published"), online.store.rebuilding() as rebuild:
        rebuild.put(["b"], [b"state"])
    assert online.names() == ["a"]


def test_a_full_store_says_so(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "small", map_bytes=64 * 1024)

    def fill(txn: Transaction) -> None:
        for i in range(100):
            txn.put([f"entity {i}"], [bytes(4096)])

    with pytest.raises(StoreFull, match="65536 bytes"):
        store.change(fill)
    store.close()


def test_state_of_another_boot_is_forgotten(tmp_path: Path) -> None:
    store, name = LmdbStore(tmp_path / "s"), "a" * 600
    store.change(lambda txn: txn.put([name], [b"state"]))
    store.close()
    again = LmdbStore(tmp_path / "s")
    with again.reading([name]) as snapshot:
        assert [bytes(blob or b"") for blob in snapshot.blobs] == [b"state"]
    again.close()
    (tmp_path / "s" / "boot").write_text("another boot")
    empty = LmdbStore(tmp_path / "s")
    with empty.reading([name]) as snapshot:
        assert list(snapshot.blobs) == [None]
    empty.close()


def test_integers_beyond_what_a_float_holds_are_rounded_and_stop_nothing(tmp_path: Path) -> None:
    fields = tuple(
        f.model_copy(update={"type": FieldType.INTEGER}) if f.name == "level" else f for f in CONTRACT.fields
    )
    case = use_case()
    case = UseCase(**{**dict(case), "contract": CONTRACT.model_copy(update={"fields": fields})})
    log, state = DurableLog(tmp_path / "log", remember_us=3_600_000_000), OnlineState(tmp_path / "state", case)
    rows = [{"meter": "a", "at": from_microseconds(BASE + i), "flow": 1.0, "level": 2**53 + 1 + i} for i in range(4)]
    with log.transaction(BASE) as txn:
        txn.append("events", [Record(None, encode_event(case.contract, row)) for row in rows])
    assert state.project(log) == 4
    most = case.view.stored.index("level_max_7m")
    assert state.bind().read(["a"], BASE + 9).values[0, most] == float(2**53 + 4)
    state.close()
    log.close()
