"""The point-in-time join against Feast's, from one Parquet file: 100,000 requests, 1,000,000 rows of ten features; and
on Ray, with a bucketed table, against polars' ``join_asof`` in one process: 1,000,000 requests, 10,000,000 rows.

Each side reads the rows from files and gives a table; the requests are in memory. Whether the join is exact is asked of
polars, which shares no code with it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import session
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.events import BUCKET, INSTANT
from pipelines.features.asof import join_latest
from pipelines.features.bucketed_join import join_bucketed
from tests.benchmarks.features.worlds import BASE, CONTRACT, MINUTE_US, events
from tests.benchmarks.harness import Incomparable, in_turn, peer, say

FEAST = ("feast[duckdb]==0.67.0",)
KEYS = 50_000  # with fewer keys Feast slows down: it pairs a request with every earlier row of its key
FEATURES = tuple(f"f{place}" for place in range(10))


def rows_of(count: int, sensors: int, seed: int) -> pa.Table:
    """Rows in the order of their times, which differ; every sensor reports at random."""
    rng = np.random.default_rng(seed)
    times = BASE + np.sort(rng.choice(count * 4, count, replace=False)) * (MINUTE_US // 60)
    names = np.array([f"sensor{place:05d}" for place in range(sensors)])
    columns = {name: rng.normal(size=count) for name in FEATURES}
    at = pa.array(times).cast(INSTANT)
    return pa.table({"sensor": names[rng.integers(0, sensors, count)], "event_timestamp": at, **columns})


def requests_of(count: int, rows: pa.Table, seed: int) -> pa.Table:
    """Requests of the rows' sensors at random times among theirs."""
    rng = np.random.default_rng(seed)
    sensors = rows.column("sensor").unique().to_numpy(zero_copy_only=False)
    times = rows.column("event_timestamp").cast(pa.int64()).to_numpy()
    moments = rng.integers(times[0], times[-1], count)
    return pa.table(
        {
            "sensor": pa.array(sensors[rng.integers(0, len(sensors), count)], pa.string()),
            "event_timestamp": pa.array(moments).cast(INSTANT),
            "request": pa.array(range(count), pa.int64()),
        }
    )


def figures(rounds: int = 7) -> dict[str, float]:
    """``pit_vs_feast`` (times faster), ``pit_exact`` and ``pit_ray_over_polars`` (Ray's time over polars')."""
    return {**_against_feast(rounds), "pit_ray_over_polars": _against_polars(rounds)}


def _against_feast(rounds: int) -> dict[str, float]:
    rows = rows_of(1_000_000, KEYS, 1)
    requests = requests_of(100_000, rows, 2)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        pq.write_table(rows, home / "rows.parquet")
        pq.write_table(requests, home / "requests.parquet")

        def ours() -> pa.Table:
            found = pq.read_table(home / "rows.parquet")
            return join_latest(requests, found, entity="sensor", time="event_timestamp", columns=FEATURES)

        exact = float(_sorted(ours()).equals(_sorted(_by_polars(requests, rows))))
        spent = in_turn({"tidegate": ours}, rounds)["tidegate"]
        done = subprocess.run(
            [str(peer("feast", FEAST)), Path(__file__).with_name("feast_peer.py"), place, "join"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        feast_s = json.loads(done.stdout.splitlines()[-1])["join_s"]
        right = _agreement(ours(), pq.read_table(home / "feast.parquet"))
    say(f"point-in-time join: {spent.wall_s:.3f} s, Feast {feast_s:.3f} s with {right:.5%} of its rows as here")
    if right < 0.99:
        raise Incomparable(f"Feast's join agrees with this one in {right:.3%} of the rows only")
    return {"pit_vs_feast": feast_s / spent.wall_s, "pit_exact": exact}


def _sorted(table: pa.Table) -> pa.Table:
    return table.sort_by("request").select(["request", *FEATURES]).combine_chunks()


def _by_polars(requests: pa.Table, rows: pa.Table) -> pa.Table:
    left, right = pl.from_arrow(requests), pl.from_arrow(rows)
    assert isinstance(left, pl.DataFrame)
    assert isinstance(right, pl.DataFrame)
    joined = left.sort("event_timestamp").join_asof(
        right.sort("event_timestamp"), on="event_timestamp", by="sensor", strategy="backward"
    )
    return joined.to_arrow()


def _agreement(ours: pa.Table, theirs: pa.Table) -> float:
    """The share of requests for which both sides gave the same ten values."""
    mine, other = _sorted(ours), _sorted(theirs)
    if mine.num_rows != other.num_rows:
        raise Incomparable(f"Feast's join has {other.num_rows} rows for {mine.num_rows} requests")
    left = np.column_stack([mine.column(name).to_numpy() for name in FEATURES])
    right = np.column_stack([other.column(name).to_numpy() for name in FEATURES])
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    return float(same.all(axis=1).mean())


def _against_polars(rounds: int) -> float:
    with tempfile.TemporaryDirectory() as place:
        settings = Settings(home=Path(place), num_cpus=2, http_port=session.free_port())
        tables = Tables(settings.tables_url)
        requests = _events(tables, settings, 10_000_000, 1_000_000)
        files = [urlsplit(uri).path for uri in tables.files("bench/events")]
        asked = pl.from_arrow(requests)
        assert isinstance(asked, pl.DataFrame)

        def ours() -> pa.Table:
            return join_bucketed(
                requests, "bench/events", tables=tables, settings=settings, engine="ray",
                entity="sensor", time="at", columns=["flow"],
            )  # fmt: skip

        # The files stand by sensor and time, which is all that join_asof needs of its right side.
        lazy = pl.scan_parquet(files).select("sensor", "at", "flow")
        right, left = lazy.collect(), asked.sort("sensor", "at")

        def reading() -> pl.DataFrame:
            found = asked.lazy().sort("sensor", "at").join_asof(lazy, on="at", by="sensor", check_sortedness=False)
            return found.sort("request").collect()

        def in_memory() -> pl.DataFrame:
            return left.join_asof(right, on="at", by="sensor", check_sortedness=False)

        with session.running(settings):
            mine = ours().select(["request", "flow"])
            for theirs in (reading(), in_memory().sort("request")):
                if not mine.equals(theirs.select("request", "flow").to_arrow().cast(mine.schema)):
                    raise Incomparable("polars' join_asof does not give the rows that the join on Ray gives")
            spent = in_turn({"ray": ours, "polars": reading, "in memory": in_memory}, rounds)
    ray_s, polars_s, memory_s = (spent[name].wall_s for name in ("ray", "polars", "in memory"))
    say(
        f"1 M x 10 M on Ray, bucketed on disk: {ray_s:.3f} s; polars in one process {polars_s:.3f} s from the same "
        f"files (ratio {ray_s / polars_s:.2f}), {memory_s:.3f} s from sorted tables in memory ({ray_s / memory_s:.2f})"
    )
    return ray_s / polars_s


def _events(tables: Tables, settings: Settings, count: int, asked: int) -> pa.Table:
    """Writes ``count`` events of 10,000 sensors as ingest does, by bucket, sensor and time; gives requests of them."""
    rng = np.random.default_rng(3)
    times = BASE + rng.choice(count * 4, count, replace=False) * (MINUTE_US // 600)
    sensors = rng.integers(0, 10_000, count)
    order = np.lexsort((times, sensors))
    names = pa.array([f"sensor{place:05d}" for place in range(10_000)])
    columns = {"sensor": names.take(pa.array(sensors[order])), "at": pa.array(times[order]).cast(INSTANT)}
    made = events(CONTRACT, pa.table({**columns, "flow": rng.normal(size=count)}), settings.buckets)
    tables.ensure("bench/events", made.schema, partition_by=[BUCKET])
    tables.append("bench/events", made, "load")
    moments = pa.array(rng.integers(times.min(), times.max(), asked)).cast(INSTANT)
    sensor = names.take(pa.array(rng.integers(0, 10_000, asked)))
    return pa.table({"sensor": sensor, "at": moments, "request": pa.array(range(asked), pa.int64())})
