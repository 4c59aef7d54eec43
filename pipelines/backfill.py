"""The backfill job: makes the training table of a use case and, if asked, rebuilds its online state.

``python -m pipelines.backfill aqua [--materialize]`` prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster import session
from cluster.clock import Clock, open_clock
from cluster.log import DurableLog
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, EVENT_ID, INSTANT, KNOWN_AT
from pipelines.features.offline import backfill
from pipelines.features.online import OnlineState, log_path, state_path
from pipelines.spec import UseCase

_REMEMBERED_AT_ONCE = 10_000  # a transaction holds the node's only writer lock: keep it short


@dataclass(frozen=True)
class Materialized:
    """Online state after a rebuild at ``at_us``: from ``events_version`` and the log up to ``sequence``."""

    generation: int
    events_version: int
    sequence: int
    entities: int
    at_us: int


def materialize(
    use_case: UseCase, *, tables: Tables, settings: Settings, clock: Clock, events_version: int | None = None
) -> Materialized:
    """Rebuilds this node's online state from one version of the events table and the ingest log after it.

    No other ``OnlineState`` or ``DurableLog`` of the use case may be open in this process; other processes go
    on reading the old state until the new one is whole. One bucket at a time is held in memory.
    """
    source = events_table(use_case)
    version = tables.version(source) if events_version is None else events_version
    held = tables.read(source, version=version, columns=[BUCKET]).column(BUCKET).unique().to_pylist()

    recent = pa.scalar(clock.now() - settings.remember_seconds * 1_000_000, pa.int64()).cast(INSTANT)
    known: list[bytes] = []

    def parts() -> Iterator[pa.Table]:
        for bucket in sorted(held):
            rows = tables.read(source, version=version, partition={BUCKET: [bucket]})
            fresh = rows.filter(pc.greater_equal(rows.column(KNOWN_AT), recent))
            known.extend(identity.encode() for identity in fresh.column(EVENT_ID).to_pylist())
            yield rows

    log = DurableLog(log_path(settings, use_case), remember_us=settings.remember_seconds * 1_000_000)
    state = OnlineState(state_path(settings, use_case), use_case)
    try:
        generation = state.materialize(parts(), version, log)
        for start in range(0, len(known), _REMEMBERED_AT_ONCE):
            with log.transaction(clock.now()) as transaction:
                transaction.remember("events", known[start : start + _REMEMBERED_AT_ONCE])
        return Materialized(generation, version, state.applied(), state.entities(), clock.now())
    finally:
        state.close()
        log.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.backfill", description=__doc__)
    parser.add_argument("use_case", choices=usecases.names())
    parser.add_argument("--events-version", type=int, help="version of the events table (default: the newest)")
    parser.add_argument("--engine", choices=("auto", "arrow", "ray"), default="auto")
    parser.add_argument("--materialize", action="store_true", help="also rebuild the online state of this node")
    options = parser.parse_args(arguments)
    settings = Settings.from_environment()
    use_case = usecases.load(options.use_case)
    tables = Tables(settings.tables_url, settings.storage_options)
    here = session.current(settings)
    if options.engine == "ray" or (
        options.engine == "auto" and ("RAY_JOB_ID" in os.environ or (here and here.alive()))
    ):
        session.connect(settings)
    result = backfill(
        use_case,
        tables=tables,
        settings=settings,
        events_version=options.events_version,
        engine=options.engine,
    )
    report: dict[str, object] = asdict(result)
    if options.materialize:
        state = materialize(
            use_case,
            tables=tables,
            settings=settings,
            clock=open_clock(settings),
            events_version=result.events_version,
        )
        report["state"] = asdict(state)
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
