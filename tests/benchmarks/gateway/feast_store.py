"""Feast's side, run by the Python of an environment that has it: ``feast_store.py HOME`` makes the repository that
``feast serve`` reads, and puts the values of ``HOME/features.parquet`` into its online store.

It uses nothing of Tidegate's.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource
from feast.types import Float64
from feast.value_type import ValueType

CONFIG = """\
project: bench
provider: local
registry: registry.db
online_store:
  type: sqlite
  path: online.db
entity_key_serialization_version: 3
"""


def main() -> None:
    """Makes the repository."""
    home = Path(sys.argv[1])
    (home / "feature_store.yaml").write_text(CONFIG)
    values = pd.read_parquet(home / "features.parquet")
    values["event_timestamp"] = datetime.now(UTC)
    store = FeatureStore(repo_path=str(home))
    sensor = Entity(name="sensor", join_keys=["sensor"], value_type=ValueType.STRING)
    view = FeatureView(
        name="flow",
        entities=[sensor],
        ttl=timedelta(days=3650),
        schema=[Field(name=name, dtype=Float64) for name in values.columns.drop(["sensor", "event_timestamp"])],
        source=FileSource(path=str(home / "features.parquet"), timestamp_field="event_timestamp"),
    )
    values.to_parquet(home / "features.parquet")
    store.apply([sensor, view])
    store.write_to_online_store("flow", values)


if __name__ == "__main__":
    main()
