"""A backfill and a join of more events than Ray's object store holds, on a cluster of their own; run by ``python -m``.

Prints a JSON object: what the store holds, the events' size, what was spilled (before and after more was put into the
store than it holds, so that the measure is seen to work), and whether the rows were right.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, INSTANT, KNOWN_AT, buckets_of, event_ids, events_schema
from pipelines.features.asof import join_latest
from pipelines.features.bucketed_join import join_bucketed
from pipelines.features.training_table import backfill
from pipelines.spec import FeatureView, Fold, Window
from tests.data.worlds import BASE, CONTRACT, SECOND
from tests.pipeline.test_online_state import use_case

STORE = 75 * 1024 * 1024  # the smallest that Ray starts with
METERS, EACH = 100, 9_000
CASE = use_case(
    FeatureView(
        name="meter",
        windows=(Window(field="flow", length=60 * SECOND, hop=20 * SECOND, folds=(Fold.MEAN,)),),
        ttl=timedelta(days=1),
    )
)


def events(settings: Settings) -> pa.Table:
    """Events of meters in turn, of which the first reports as often as all others together."""
    count = METERS * EACH
    rng = np.random.default_rng(7)
    meters = np.where(np.arange(count) % 2, 0, rng.integers(1, METERS, count))
    times = pa.array(BASE + np.arange(count) * 250_000).cast(INSTANT)
    flow, level = rng.normal(size=(2, count))
    names = pa.array([f"meter{number:03d}" for number in range(METERS)]).take(pa.array(meters))
    rows = pa.table({"meter": names, "at": times, "flow": flow, "level": level})
    nothing, load = pa.array(np.zeros(count, np.int64)), pa.repeat("load/1", count)
    system = [event_ids(CONTRACT, rows), times, nothing, load, buckets_of(names, settings.buckets)]
    return pa.Table.from_arrays([*rows.columns, *system], schema=events_schema(CONTRACT))


def spilled() -> int:
    """Bytes that the store had no room for, on disk or beside it, since it began."""
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return int(stats.spilled_bytes_total + stats.object_store_bytes_fallback)


def main(home: str) -> None:
    settings = Settings(home=Path(home), buckets=4, task_rows=150_000)
    tables, held = Tables(settings.tables_url), events(settings)
    tables.ensure(events_table(CASE), events_schema(CONTRACT), partition_by=[BUCKET])
    tables.append(events_table(CASE), held, "load/1")
    # Not below ``home``: Ray keeps UNIX sockets there, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="tidegate-", ignore_cleanup_errors=True) as place:
        options = {"include_dashboard": False, "log_to_driver": False, "_temp_dir": place}
        ray.init(address="local", num_cpus=2, object_store_memory=STORE, **options)
        try:
            report = run(settings, tables, held)
        finally:
            ray.shutdown()
    sys.stdout.write(json.dumps(report) + "\n")


def run(settings: Settings, tables: Tables, held: pa.Table) -> dict[str, object]:
    done = backfill(CASE, tables=tables, settings=settings, engine="ray")
    rng = np.random.default_rng(8)
    at = pa.array(BASE + rng.integers(0, len(held) * 250_000, 200_000)).cast(INSTANT)
    asked = pa.table({"meter": held.column("meter").take(pa.array(rng.integers(0, len(held), len(at)))), "at": at})
    wanted = {"entity": "meter", "time": "at", "columns": ["flow", "level"], "known_at": KNOWN_AT}
    joined = join_bucketed(asked, events_table(CASE), tables=tables, settings=settings, engine="ray", **wanted)
    before, part = spilled(), len(held) // 8
    kept = [ray.put(held.slice(begin, part)) for begin in range(0, len(held), part)]
    return {
        "store": STORE,
        "events": held.nbytes,
        "examples": done.rows,
        "joined": joined.equals(join_latest(asked, held, **wanted)),
        "spilled": before,
        "spilled_by_the_events_themselves": spilled() if kept else 0,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
