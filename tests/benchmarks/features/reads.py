"""Online reads and materialization: LMDB against Feast's SQLite store, Redis against a bare HMGET of the same bytes."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.clock import SystemClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.backfill import materialize
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, events_schema
from pipelines.features import derived
from pipelines.features.online import open_log, open_state
from pipelines.spec import Contract, Derived, FeatureView, Field, FieldType, Fold, UseCase, Window
from tests.benchmarks.features import joins, worlds
from tests.benchmarks.features.worlds import BASE, DAY, HOUR, MINUTE, MINUTE_US
from tests.benchmarks.harness import Incomparable, median_us, peer, say
from tests.services import redis

SENSORS, EACH = 200, 2_000
_FOLDS = (Fold.COUNT, Fold.MEAN, Fold.MIN, Fold.MAX, Fold.STD)


def level(flow_mean_1h, flow_mean_1d):
    return flow_mean_1h / flow_mean_1d


def span(flow_max_1h, flow_min_1h):
    return flow_max_1h - flow_min_1h


def score(flow_mean_1h, flow_mean_1d, flow_std_1d):
    return (flow_mean_1h - flow_mean_1d) / flow_std_1d


def seen(flow_count_1d):
    return np.log1p(flow_count_1d)


def usual(flow_mean_1h):
    return np.where(np.isnan(flow_mean_1h), 0.0, flow_mean_1h)


def page() -> UseCase:
    """Ten windowed and five derived features of a sensor."""
    made = worlds.view((HOUR, 5 * MINUTE), (DAY, HOUR), folds=_FOLDS)
    functions = tuple(Derived(name=f.__name__, function=f) for f in (level, span, score, seen, usual))
    return worlds.use_case(made.model_copy(update={"derived": functions}))


def figures() -> dict[str, float]:
    """Medians of reads in microseconds and milliseconds, and how many times faster than the peers."""
    made = page()
    rows = worlds.events(made.contract, worlds.rows_of(worlds.readings(SENSORS, EACH, MINUTE_US)))
    now = BASE + EACH * MINUTE_US
    with tempfile.TemporaryDirectory() as place:
        one, hundred = _reads(Settings(home=Path(place)), made, rows, now)
    with tempfile.TemporaryDirectory() as place, redis() as server:
        settings = Settings(home=Path(place), state_url=server.url)
        over_raw = _over_raw(settings, made, rows, now)
    say(f"10 windowed and 5 derived features: one entity {one:.1f} us, 100 entities {hundred / 1e3:.3f} ms")
    say(f"10 windowed features from Redis: {over_raw:.2f} times the HMGET of their bytes")
    ours, theirs = _latest()
    say(f"10 latest values: one entity {ours['read_s'] * 1e6:.1f} us, Feast {theirs['read_s'] * 1e6:.1f} us")
    say(f"1,000,000 rows into {joins.KEYS} keys: {ours['materialize_s']:.2f} s, Feast {theirs['materialize_s']:.2f} s")
    return {
        "read_us_p50": one,
        "read100_ms_p50": hundred / 1e3,
        "read_vs_feast": theirs["read_s"] / ours["read_s"],
        "read_redis_over_raw": over_raw,
        "materialize_vs_feast": theirs["materialize_s"] / ours["materialize_s"],
    }


def _reads(settings: Settings, made: UseCase, rows: pa.Table, now: int) -> tuple[float, float]:
    state, log = open_state(settings, made), open_log(settings, made)
    state.materialize(rows, 1, log)
    reader, names = state.bind(), state.names()
    once, often = np.full(1, now), np.full(100, now)

    def one(turn: int) -> dict[str, np.ndarray]:
        return derived.columns(made.view, reader.read([names[turn % SENSORS]], now).values, {}, once)

    def hundred(turn: int) -> dict[str, np.ndarray]:
        return derived.columns(made.view, reader.read(names[turn % 100 :][:100], now).values, {}, often)

    alone, together = one(5), hundred(5)
    if any(alone[name][0] != together[name][0] for name in alone):
        raise Incomparable("a read of one entity and one of a hundred differ")
    found = median_us(one, 20_000), median_us(hundred, 1_000)
    state.close()
    log.close()
    return found


def _over_raw(settings: Settings, made: UseCase, rows: pa.Table, now: int) -> float:
    from pipelines.features.stores.redis import RedisStore

    state, log = open_state(settings, made), open_log(settings, made)
    state.materialize(rows, 1, log)
    reader, names, store = state.bind(), state.names(), state.store
    assert isinstance(store, RedisStore)
    key = store.hash_of(store.client.get(store.key(b"current")))
    client = store._reads.client

    def raw(turn: int) -> object:
        return client.hmget(key, [b"head", b"=" + names[turn % SENSORS].encode()])

    def read(turn: int) -> object:
        return reader.read([names[turn % SENSORS]], now)

    if None in raw(0):
        raise Incomparable("the bare HMGET did not find what a read finds")
    ratios = [median_us(read, 2_000) / median_us(raw, 2_000) for _ in range(5)]
    state.close()
    log.close()
    return float(np.median(ratios))


def _latest() -> tuple[dict[str, float], dict[str, float]]:
    """Both sides' seconds to materialize the latest of ten values by key, and to read those of one key."""
    rows = joins.rows_of(1_000_000, joins.KEYS, 1)
    numbers = tuple(Field(name=name, type=FieldType.FLOAT, nullable=True) for name in joins.FEATURES)
    contract = Contract(
        name="rows",
        version="1.0.0",
        owner="benchmarks",
        fields=(
            Field(name="sensor", type=FieldType.STRING),
            Field(name="event_timestamp", type=FieldType.TIMESTAMP),
            *numbers,
        ),
        entity="sensor",
        time="event_timestamp",
        key=("sensor", "event_timestamp"),
    )
    ever = 3650 * DAY
    windows = (Window(field=name, length=ever, hop=ever, folds=(Fold.LAST,)) for name in joins.FEATURES)
    made = worlds.use_case(FeatureView(name="latest", windows=tuple(windows), ttl=ever), contract)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        pq.write_table(rows, home / "rows.parquet")
        settings = Settings(home=home / "tidegate")
        ours = _ours(settings, made, worlds.events(contract, rows))
        names = rows.column("sensor").unique().to_pylist()[:1_000]
        (home / "names.json").write_text(json.dumps(names))
        done = subprocess.run(
            [str(peer("feast", joins.FEAST)), Path(__file__).with_name("feast_peer.py"), place, "online"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        theirs: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        state = open_state(settings, made)
        reader, now = state.bind(), SystemClock().now()
        mine = dict(zip(joins.FEATURES, reader.read([names[0]], now).values[0].tolist(), strict=True))
        if {name: theirs[name] for name in joins.FEATURES} != mine:
            raise Incomparable(f"the latest values of {names[0]} are {mine} here and {theirs} in Feast")
        ours["read_s"] = median_us(lambda turn: reader.read([names[turn % 1_000]], now), 20_000) / 1e6
        state.close()
    return ours, theirs


def _ours(settings: Settings, made: UseCase, rows: pa.Table) -> dict[str, float]:
    tables, database = Tables(settings.tables_url), Database(settings.database_url)
    database.create()
    tables.ensure(events_table(made), events_schema(made.contract), [BUCKET])
    tables.append(events_table(made), rows, "load/1")
    begun = time.perf_counter()
    done = materialize(made, tables=tables, database=database, settings=settings, clock=SystemClock())
    took = time.perf_counter() - begun
    if done.entities != joins.KEYS:
        raise Incomparable(f"{done.entities} of {joins.KEYS} keys were materialized")
    return {"materialize_s": took}
