"""Bulk ingest: files to the events table, each load once, with rows in = accepted + quarantined.

``python -m pipelines.ingest USECASE SOURCE… [--load-id ID]`` is the job; its last line is a JSON report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.fs as pafs

from cluster.clock import Clock, open_clock
from cluster.database import Database
from cluster.filesystems import open_filesystem
from cluster.settings import Settings
from cluster.tables import DataFile, TableMoved, Tables
from pipelines import usecases
from pipelines.commands import explained
from pipelines.contracts import enforce, events, sources
from pipelines.contracts.datasets import Manifest, findings, reconcile, refusals
from pipelines.contracts.leases import events_lease, kept_lease
from pipelines.contracts.profile import expects, merged
from pipelines.spec import EventSource, References
from pipelines.spec.base import fingerprint

REPLAY = "replay"
"""What the ids of loads begin with that bring rows again."""
_ATTEMPTS = 5
Status = Literal["published", "refused", "already_published", "already_refused"]


@dataclass(frozen=True)
class LoadReport:
    """What a load did. ``by_source`` gives rows_in, accepted and quarantined of each file.

    ``refusals`` say why nothing was published, ``warnings`` which rules the load breaks that only warn; ``warned``
    counts the rows that these rules of rows let pass, duplicates among them, by the rules they break.
    """

    load_id: str
    status: Status
    rows_in: int
    accepted: int
    quarantined: int
    by_rule: dict[str, int]
    by_source: dict[str, dict[str, int]]
    events_version: int
    quarantine_version: int
    seconds: float
    warned: dict[str, int] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def ingest(
    source: EventSource,
    names: Sequence[str],
    *,
    tables: Tables,
    database: Database,
    settings: Settings,
    clock: Clock,
    load_id: str | None = None,
    engine: Literal["auto", "arrow", "ray"] = "auto",
    known_from_us: int = 0,
) -> LoadReport:
    """Loads files, directories or s3:// URIs of .parquet, .csv and .jsonl into the use case's events table.

    A load is known by ``load_id`` (by default a hash of contract, names and contents, which an id of one's own stands
    for; ``OtherLoad`` where it stands for others): one that ended before is only
    reported, one that was interrupted is completed as if it had not been, and one that another process is at is waited
    for (``TimeoutError`` after two minutes). When more than the contract's share of rows is refused no event is
    published; all its rows are in the quarantine. ``auto`` is Ray above ``settings.ray_rows`` rows if this process is
    connected to it. No row is taken to have been known before ``known_from_us``, for rows that nobody could use until
    now.

    Events are committed before the quarantine: the two markers then tell an interrupted load's decision.
    """
    began = time.monotonic()
    options = tables.storage_options
    found = sources.find(names, options)
    what = sources.identity(source.contract, source.name, found, options)
    load_id = load_id or what
    event_table, quarantine_table = enforce.events_table(source), enforce.quarantine_table(source)
    tables.ensure(event_table, events.events_schema(source.contract), [events.BUCKET], grows=True)
    tables.ensure(quarantine_table, events.QUARANTINE_SCHEMA)
    holder = f"load/{load_id}/{uuid.uuid4().hex}"
    with kept_lease(database, f"load/{fingerprint(load_id)}", holder):
        load = database.begin_load(load_id, source.name, event_table, clock.now(), what)
        staging = f"{tables.url}/_staging/{fingerprint(load_id)}"
        if load.manifest is not None:
            _remove(staging, options)  # which an earlier run may not have come to
            done = {**load.manifest, "status": f"already_{load.status}", "seconds": time.monotonic() - began}
            return LoadReport(**done)
        context = enforce.LoadContext(
            contract=source.contract,
            events=event_table,
            quarantine=quarantine_table,
            load_id=load_id,
            as_of_us=load.as_of_us,
            tables=tables,
            staging=f"{staging}/{uuid.uuid4().hex}",
            names=tuple(file.name for file in found),
            buckets=settings.buckets,
            known_from_us=known_from_us,
        )
        report = _load(context, _engine(engine, found, settings, options), found, source, database, holder)
        report = LoadReport(**{**asdict(report), "seconds": time.monotonic() - began})
        ended: Literal["published", "refused"] = "refused" if report.status == "refused" else "published"
        database.finish_load(load_id, ended, asdict(report))
        _remove(staging, options)  # that of earlier runs, too: nobody else is at this load
        return report


def _remove(staging: str, options: Mapping[str, str]) -> None:
    filesystem, path = open_filesystem(staging, options)
    filesystem.delete_dir_contents(path, missing_dir_ok=True)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def _load(
    context: enforce.LoadContext,
    engine: enforce.Engine,
    found: list[sources.Source],
    source: EventSource,
    database: Database,
    holder: str,
) -> LoadReport:
    splits = sources.split(found, context.tables.storage_options)
    staged = _whole_files(context, enforce.run(engine, partial(enforce.stage, context), splits))
    work = _buckets(staged, context.buckets if expects(context.contract) is not None else 0)
    with events_lease(database, source, holder) as still_held:
        for again in range(_ATTEMPTS, 0, -1):
            history = _history(database, source.name, context.events)
            try:
                return _publish(context, engine, staged, work, history, still_held)
            except TableMoved:  # by what holds no lease, such as a compaction
                if again == 1:
                    raise
    raise AssertionError("unreachable")


def _publish(
    context: enforce.LoadContext,
    engine: enforce.Engine,
    staged: list[enforce.Staged],
    work: list[enforce.Bucket],
    history: list[int],
    still_held: Any,
) -> LoadReport:
    tables, marker = context.tables, f"load/{context.load_id}"
    version = tables.version(context.events)
    committed = tables.marker(context.events, marker) is not None
    decided = tables.marker(context.quarantine, marker) is not None

    def settle(mode: Literal["publish", "refuse", "recover"]) -> tuple[list[enforce.Settled], Manifest]:
        function = partial(enforce.settle, context, mode=mode, version=version)
        settled: list[enforce.Settled] = enforce.run(engine, function, work)
        counts = [*(s.by_rule for s in staged), *(s.by_rule for s in settled)]
        pairs = [pair for count in counts for pair in count.items()]
        return settled, reconcile(enforce.by_source(context, staged, settled), pairs)

    refused = decided and not committed  # a refused load has only the quarantine's marker
    settled, manifest = settle("recover" if committed else "refuse" if refused else "publish")
    profile = merged(part.profile for part in settled)
    broken = findings(context.contract, profile, history, context.as_of_us, partial(_referred, tables))
    reasons = refusals(context.contract, manifest) + [f"{f.rule}: {f.said}" for f in broken if f.refuses]
    if reasons and not committed and not refused:
        refused = True
        settled, manifest = settle("refuse")
    still_held()
    if not refused:
        version = tables.commit(context.events, _files(s.events for s in settled), marker, after=version).version
    refused_rows = _files([*(s.quarantine for s in staged), *(s.quarantine for s in settled)])
    quarantine_version = tables.commit(context.quarantine, refused_rows, marker).version
    warned: Counter[str] = Counter()
    for part in staged:
        warned.update(part.warned)
    return LoadReport(
        load_id=context.load_id,
        status="refused" if refused else "published",
        rows_in=manifest.total.rows_in,
        accepted=manifest.total.accepted,
        quarantined=manifest.total.quarantined,
        by_rule=manifest.by_rule,
        by_source={name: asdict(tally) for name, tally in manifest.by_source.items()},
        events_version=version,
        quarantine_version=quarantine_version,
        seconds=0.0,
        warned=dict(sorted(warned.items())),
        refusals=tuple(reasons) if refused else (),
        warnings=tuple(f"{f.rule}: {f.said}" for f in broken if not f.refuses),
    )


def _referred(tables: Tables, rule: References) -> frozenset[Any] | None:
    """The values of the column that a rule refers to, None when there is no such column."""
    table = f"{rule.source}/events"
    if not tables.exists(table) or rule.column not in tables.schema(table).names:
        return None
    return frozenset(pc.unique(tables.read(table, columns=[rule.column]).column(rule.column)).to_pylist())


def _history(database: Database, usecase: str, table: str) -> list[int]:
    """The accepted rows of the loads that were published into a table, the newest last; replays are no deliveries, and
    empty loads no measure.
    """
    loads = (load for load in database.loads(usecase) if load.table == table and load.status == "published")
    return [
        load.manifest["accepted"]
        for load in loads
        # Of empty ones nothing can be measured, and a few of them would let no other load pass.
        if load.manifest is not None and load.manifest["accepted"] and not load.load_id.startswith(f"{REPLAY}/")
    ]


def _whole_files(context: enforce.LoadContext, staged: list[enforce.Staged]) -> list[enforce.Staged]:
    """If one split of a file cannot be read, none of the file's rows is taken: it is one refused row."""
    reasons = {part.order: part.unreadable for part in staged if part.unreadable is not None}
    kept = [part for part in staged if part.order not in reasons]
    return kept + [enforce.unreadable_file(context, order, reason) for order, reason in reasons.items()]


def _buckets(staged: list[enforce.Staged], expected: int) -> list[enforce.Bucket]:
    """The buckets that rows came for, and all below ``expected``, unless no row came at all."""
    low = min((s.earliest_us for s in staged if s.earliest_us is not None), default=0)
    high = max((s.latest_us for s in staged if s.latest_us is not None), default=0)
    found = {bucket for part in staged for bucket in part.files}
    numbers = sorted(found | set(range(expected if found else 0)))
    return [
        enforce.Bucket(number, tuple(part.files[number] for part in staged if number in part.files), low, high)
        for number in numbers
    ]


def _engine(
    engine: Literal["auto", "arrow", "ray"],
    found: list[sources.Source],
    settings: Settings,
    options: dict[str, str],
) -> enforce.Engine:
    if engine != "auto":
        return engine
    import ray

    if not ray.is_initialized():
        return "arrow"
    return "ray" if sources.estimated_rows(found, options) > settings.ray_rows else "arrow"


def _files(files: Any) -> list[DataFile]:
    return [file for file in files if file is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    """The job: 0 when the load is in the table, 1 when it was refused."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.ingest", description=__doc__)
    parser.add_argument("usecase", choices=usecases.names())
    parser.add_argument("sources", nargs="+", help="files, directories or s3:// URIs of .parquet, .csv, .jsonl")
    parser.add_argument("--dimension", help="load rows of this dimension of the view, instead of events")
    parser.add_argument("--load-id", help="by default a hash of the files' names and contents")
    parser.add_argument("--engine", choices=("auto", "arrow", "ray"), default="auto")
    given = parser.parse_args(arguments)
    use_case = usecases.load(given.usecase)
    dimensions = {dimension.name: dimension for dimension in use_case.view.dimensions}
    if given.dimension is not None and given.dimension not in dimensions:
        parser.error(f"use case {use_case.name!r} has no dimension {given.dimension!r}; it has {sorted(dimensions)}")
    settings = Settings.from_environment()
    _join_cluster(settings, given.engine)
    with explained(use_case.name):
        database = Database(settings.database_url)
        database.create()
        report = ingest(
            use_case if given.dimension is None else use_case.source(dimensions[given.dimension]),
            given.sources,
            tables=Tables(settings.tables_url, settings.storage_options),
            database=database,
            settings=settings,
            clock=open_clock(settings),
            load_id=given.load_id,
            engine=given.engine,
        )
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
    return 1 if report.status.endswith("refused") else 0


def _join_cluster(settings: Settings, engine: str) -> None:
    from cluster import session

    running = session.current(settings)
    if engine == "ray" or "RAY_JOB_ID" in os.environ or (running is not None and running.alive()):
        session.connect(settings)


if __name__ == "__main__":
    sys.exit(main())
