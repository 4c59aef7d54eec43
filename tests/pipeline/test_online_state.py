"""Entity state as a projection of the ingest log: restarts, rebuilds, several processes, and its reader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.log import DurableLog, Record
from pipelines.contracts.events import decode_events, encode_event, event_order, from_microseconds
from pipelines.features.online import NO_TABLE, OnlineState
from pipelines.features.served import Status
from pipelines.features.state import StateError
from pipelines.features.stores import Store, StoreFull
from pipelines.spec import FeatureView, ModelSpec, Split, Target, UseCase
from tests.data.oracle import Event, features
from tests.data.worlds import BASE, CONTRACT, SECOND, VIEW, same_bits

MINUTE = 60_000_000


def use_case(view: FeatureView = VIEW) -> UseCase:
    model = ModelSpec(
        name="meter",
        target=Target(field="flow", horizon=60 * SECOND),
        numeric=("flow_mean_1m",),
        split=Split(calibration=timedelta(days=1), test=timedelta(days=1)),
    )
    return UseCase(name="meter", title="Meters", contract=CONTRACT, view=view, model=model, gates=())


def record(meter: str, at: int, flow: float | None, level: float | None = None) -> dict[str, object]:
    return {"meter": meter, "at": from_microseconds(at), "flow": flow, "level": level}


def write(log: DurableLog, records: list[dict[str, object]], now: int) -> None:
    with log.transaction(now) as txn:
        txn.append("events", [Record(None, encode_event(CONTRACT, r)) for r in records])


def bulk(records: list[dict[str, object]], sequences: list[int] | None = None) -> pa.Table:
    blobs = [encode_event(CONTRACT, r) for r in records]
    known = [int(r["at"].timestamp() * 1_000_000) for r in records]
    return decode_events(CONTRACT, blobs, known, sequences or [0] * len(records), load_id="bulk", buckets=4)


def oracle(records: list[tuple[dict[str, object], int]], meter: str, now: int) -> np.ndarray:
    events = []
    for row, known_at in records:
        if row["meter"] == meter:
            at = int(row["at"].timestamp() * 1_000_000)
            order = int(event_order([f"{meter}|{at}"])[0])
            events.append(Event(at, order, known_at, row))
    return np.array([value for value, _ in features(VIEW, CONTRACT, events, now)])


@pytest.fixture
def log(tmp_path: Path) -> Iterator[DurableLog]:
    opened = DurableLog(tmp_path / "log", remember_us=3_600_000_000)
    yield opened
    opened.close()


@pytest.fixture
def online(tmp_path: Path) -> Iterator[OnlineState]:
    opened = OnlineState(tmp_path / "state", use_case())
    yield opened
    opened.close()


def test_projected_state_reads_as_the_oracle_says(log: DurableLog, online: OnlineState) -> None:
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


def test_projecting_again_or_after_a_restart_applies_nothing_twice(log: DurableLog, tmp_path: Path) -> None:
    write(log, [record("a", BASE, 1.0), record("a", BASE + 1, 2.0)], BASE + 1)
    first = OnlineState(tmp_path / "s", use_case())
    first.project(log)
    first.project(log)
    first.close()
    write(log, [record("a", BASE + 2, 3.0)], BASE + 2)
    again = OnlineState(tmp_path / "s", use_case())
    again.project(log)
    count = again.plan.features.index("flow_count_1m")
    assert again.bind().read(["a"], BASE + 2).values[0, count] == 3.0
    again.close()


def test_materialized_state_is_table_rows_and_the_log_after_them(log: DurableLog, online: OnlineState) -> None:
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


def test_a_rebuild_that_fails_leaves_the_old_state(log: DurableLog, online: OnlineState) -> None:
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


def test_a_gap_in_the_log_is_an_error_that_says_to_rebuild(log: DurableLog, online: OnlineState) -> None:
    write(log, [record("a", BASE, 1.0), record("a", BASE + 1, 2.0)], BASE + 1)
    log.trim("events", 1)
    with pytest.raises(StateError, match="--materialize"):
        online.project(log)


def test_state_ahead_of_the_log_is_an_error(log: DurableLog, online: OnlineState, tmp_path: Path) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    young = DurableLog(tmp_path / "another", remember_us=1_000_000)
    with pytest.raises(StateError, match="holds 1 to 0"):
        online.project(young)
    young.close()


def test_a_changed_view_has_a_state_of_its_own(log: DurableLog, online: OnlineState, tmp_path: Path) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    narrower = OnlineState(tmp_path / "state", use_case(VIEW.model_copy(update={"lags": ()})))
    assert narrower.applied() == 0
    assert narrower.project(log) == 1
    assert narrower.bind().read(["a"], BASE).values.shape[1] == len(VIEW.stored) - 2
    narrower.close()


def _project_many(home: str, rounds: int) -> None:
    log = DurableLog(Path(home) / "log", remember_us=3_600_000_000)
    state = OnlineState(Path(home) / "state", use_case())
    for i in range(rounds):
        with log.transaction(BASE + i) as txn:
            txn.append("events", [Record(None, encode_event(CONTRACT, record("a", BASE + i, 1.0)))])
        state.project(log)
    state.close()
    log.close()


def test_several_processes_project_one_log_without_loss(log: DurableLog, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_project_many, args=(str(tmp_path), 60)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    state = OnlineState(tmp_path / "state", use_case())
    assert state.applied() == log.last("events") == 120
    count = state.plan.features.index("flow_count_1m")
    assert state.bind().read(["a"], BASE + 60).values[0, count] == 120.0
    state.close()


def test_stale_values_are_flagged_by_the_reader(log: DurableLog, online: OnlineState) -> None:
    write(log, [record("a", BASE, 1.0)], BASE)
    online.project(log)
    mean = online.plan.features.index("flow_mean_1m")
    read = online.bind().read(["a"], BASE + 51_000_000)
    assert read.status[0, mean] == Status.STALE
    assert read.age_s[0, mean] == 51.0


def test_a_full_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "small", map_bytes=64 * 1024)

    def fill() -> None:
        with store.writing() as txn:
            for i in range(100):
                txn.put(f"entity {i}", bytes(4096))

    with pytest.raises(StoreFull, match="65536 bytes"):
        fill()
    store.close()


def test_state_of_another_boot_is_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    with store.writing() as txn:
        txn.put("a" * 600, b"state")
    store.close()
    again = Store(tmp_path / "s")
    with again.reading() as txn:
        assert bytes(txn.get("a" * 600) or b"") == b"state"
    again.close()
    (tmp_path / "s" / "boot").write_text("another boot")
    empty = Store(tmp_path / "s")
    with empty.reading() as txn:
        assert txn.get("a" * 600) is None
    empty.close()
