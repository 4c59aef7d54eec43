"""Feast's side, run by the Python of an environment that has it: ``feast_peer.py HOME COMMAND`` prints one JSON line.

It uses nothing of Tidegate's. HOME holds what ``tests.benchmarks.features.joins`` and ``reads`` wrote.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.types import Float64
from feast.value_type import ValueType


def store(home: Path, features: list[str]) -> FeatureStore:
    """A store with DuckDB offline and SQLite online, and one view over ``rows.parquet``."""
    config = RepoConfig(
        project="bench",
        provider="local",
        registry=str(home / "registry.db"),
        online_store={"type": "sqlite", "path": str(home / "online.db")},
        offline_store={"type": "duckdb"},
        entity_key_serialization_version=3,
    )
    made = FeatureStore(config=config)
    sensor = Entity(name="sensor", join_keys=["sensor"], value_type=ValueType.STRING)
    view = FeatureView(
        name="readings",
        entities=[sensor],
        ttl=timedelta(days=3650),
        schema=[Field(name=name, dtype=Float64) for name in features],
        source=FileSource(path=str(home / "rows.parquet"), timestamp_field="event_timestamp"),
    )
    made.apply([sensor, view])
    return made


def timed(call: Callable[[], object], rounds: int) -> float:
    """The median in seconds, after a call that is not counted."""
    took = []
    for turn in range(rounds + 1):
        begun = time.perf_counter()
        call()
        if turn:
            took.append(time.perf_counter() - begun)
    return statistics.median(took)


def main() -> None:
    """Runs one command."""
    home, command = Path(sys.argv[1]), sys.argv[2]
    features = [name for name in pq.read_schema(home / "rows.parquet").names if name.startswith("f")]
    feast, wanted = store(home, features), [f"readings:{name}" for name in features]
    answer: dict[str, float] = {}
    if command == "join":
        spine = pd.read_parquet(home / "requests.parquet")

        def join() -> object:
            return feast.get_historical_features(entity_df=spine, features=wanted).to_arrow()

        answer["join_s"] = timed(join, 3)
        pq.write_table(join(), home / "feast.parquet")
    elif command == "online":
        times = pd.read_parquet(home / "rows.parquet", columns=["event_timestamp"])["event_timestamp"]
        begun = time.perf_counter()
        feast.materialize(times.min().to_pydatetime() - timedelta(days=1), datetime.now(UTC))
        answer["materialize_s"] = time.perf_counter() - begun
        names = json.loads((home / "names.json").read_text())
        place = iter(range(10**9))

        def read() -> object:
            return feast.get_online_features(wanted, [{"sensor": names[next(place) % len(names)]}]).to_dict()

        answer["read_s"] = timed(read, 500)
        first = feast.get_online_features(wanted, [{"sensor": names[0]}]).to_dict()
        answer |= {name: first[name][0] for name in features}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
