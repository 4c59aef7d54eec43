"""The backfill job: makes the training table of a use case and, if asked, rebuilds its online state.

``python -m pipelines.backfill aqua [--materialize]`` prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import session
from cluster.clock import Clock, open_clock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.commands import explained
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, EVENT_ID, INSTANT, KNOWN_AT, events_schema, log_identities
from pipelines.contracts.leases import events_lease
from pipelines.drain import EVENTS
from pipelines.features.online import open_log
from pipelines.features.projection import Projection
from pipelines.features.training_table import backfill
from pipelines.features.views import open_views
from pipelines.spec import EventSource, UseCase

_REMEMBERED_AT_ONCE = 10_000  # others cannot append during a transaction: keep it short


@dataclass(frozen=True)
class Materialized:
    """The state of ``view`` after a rebuild at ``at_us``: from ``events_version`` and the log up to ``sequence``.

    That of the present view says in ``kept`` what became of the states of the page's kept views.
    """

    view: str
    generation: int
    events_version: int
    sequence: int
    entities: int
    at_us: int
    kept: tuple[Materialized, ...] = ()


def materialize(
    use_case: UseCase, *, tables: Tables, database: Database, settings: Settings, clock: Clock
) -> Materialized:
    """Rebuilds the state of every view of the page from the newest events table and the ingest log after it.

    The present view comes first, the kept ones after it, their dimensions last; newer state stays.
    No load and no drain commits meanwhile. In LMDB, no other state or log of the use case may be open in this
    process; other processes go on reading the old state until the new one is whole. Every state, also that of
    neighbours, reads its table once, two buckets at a time. First the log learns the ids of all rows that could still
    reach state, so an event that came with a load is not taken again over HTTP.
    """
    views = open_views(settings, use_case)
    try:
        of_events = [one for state in views.states.values() for one in state.projections]
        version = _rebuild(use_case, of_events, tables, database, settings, clock)
        for fed in views.dimensions.values():
            tables.ensure(events_table(fed.source), events_schema(fed.source.contract), [BUCKET])
            _rebuild(fed.source, list(fed.states.values()), tables, database, settings, clock)
        now = clock.now()
        done = [
            Materialized(view, state.position()[0], version, state.applied(), state.entities(), now)
            for view, state in views.states.items()
        ]
        return replace(done[0], kept=tuple(done[1:]))
    finally:
        views.close()


def _rebuild(
    source: EventSource,
    states: Sequence[Projection[Any]],
    tables: Tables,
    database: Database,
    settings: Settings,
    clock: Clock,
) -> int:
    """Rebuilds states of one source, one after the other, and returns the version of its table that they are of."""
    table = events_table(source)
    log = open_log(settings, source)
    try:
        with events_lease(database, source, f"materialize/{uuid.uuid4().hex}") as still_held:
            version = tables.version(table)
            drained = tables.marker(table, f"drain/{EVENTS}") or 0
            held = sorted(tables.read(table, version=version, columns=[BUCKET]).column(BUCKET).unique().to_pylist())
            oldest = pa.scalar(clock.now() - log.remember_us, pa.int64()).cast(INSTANT)
            for bucket in held:
                recent = tables.read(
                    table,
                    version=version,
                    columns=[EVENT_ID, source.contract.time],
                    filter=pc.field(KNOWN_AT) >= oldest,
                    partition={BUCKET: [bucket]},
                )
                known = log_identities(source.contract, recent)
                for start in range(0, len(known), _REMEMBERED_AT_ONCE):
                    with log.transaction(clock.now()) as transaction:
                        transaction.remember(EVENTS, known[start : start + _REMEMBERED_AT_ONCE])

            def read(bucket: int) -> pa.Table:
                return tables.read(table, version=version, partition={BUCKET: [bucket]})

            for state in states:
                still_held()
                state.materialize(map(read, held), version, log, EVENTS, drained)
        return version
    finally:
        log.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.backfill", description=__doc__)
    parser.add_argument("use_case", choices=usecases.names())
    parser.add_argument("--events-version", type=int, help="version of the events table (default: the newest)")
    parser.add_argument("--engine", choices=("auto", "arrow", "ray"), default="auto")
    parser.add_argument("--materialize", action="store_true", help="also rebuild the state of all views")
    parser.add_argument("--only-state", action="store_true", help="with --materialize: leave the training table alone")
    options = parser.parse_args(arguments)
    if options.only_state and not options.materialize:
        parser.error("--only-state goes with --materialize")
    with explained(options.use_case):
        sys.stdout.write(json.dumps(_run(options)) + "\n")
    return 0


def _run(options: argparse.Namespace) -> dict[str, object]:
    settings = Settings.from_environment()
    use_case = usecases.load(options.use_case)
    tables = Tables(settings.tables_url, settings.storage_options)
    report: dict[str, object] = {}
    if not options.only_state:
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
        report |= asdict(result)
    if options.materialize:
        database = Database(settings.database_url)
        database.create()
        state = materialize(
            use_case,
            tables=tables,
            database=database,
            settings=settings,
            clock=open_clock(settings),
        )
        report["state"] = asdict(state)
    return report


if __name__ == "__main__":
    raise SystemExit(main())
