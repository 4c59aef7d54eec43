"""The training table: the examples of a view, made once for every content of a bucket of events.

A bucket holds whole entities, so its examples depend on its own events alone. They are kept under the fingerprint of
the bucket's data files, and a new version of the events table costs only the buckets that it touched. A bucket of
many rows is made in slices of request time: a window reaches back a known span, and tiles are aligned to absolute
time, so slices give the same bits as the whole, side by side and in bounded memory.

Where the view has neighbours, which may lie in any bucket, a bucket's examples depend on all events: each slice then
reads the events of its time in all buckets, and every new version of the events table is made anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings import Settings
from cluster.tables import DataFile, Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, INSTANT
from pipelines.features.buckets import Bucket, Engine, buckets_in, ray_carries
from pipelines.features.neighbours import columns_of
from pipelines.features.offline import build_examples, examples_schema
from pipelines.features.windows import compile_plan, instants, view_fingerprint
from pipelines.spec import UseCase
from pipelines.spec.base import fingerprint, microseconds

SOURCE = "_source"  # which data files of a bucket the rows were made from
_FORMAT = 2  # of the training table: raise it when the same events give other rows


class NoTrainingRows(ValueError):
    """The training table lacks what was asked for; the message says which job makes it."""


@dataclass(frozen=True)
class Backfill:
    """Version ``table_version`` of the training table has ``rows`` examples of ``events_version``.

    ``buckets`` of them had to be made, the others were there; ``seconds`` is how long that took. ``dimensions`` are
    the versions of the dimensions' tables.
    """

    table_version: int
    events_version: int
    rows: int
    view_fingerprint: str
    buckets: int
    seconds: float
    dimensions: dict[str, int]


def training_table(use_case: UseCase) -> str:
    """The name of the Delta table of examples of the present view and target.

    Another view has other columns, and another target other rows, so each pair has a table of its own.
    """
    target = use_case.model.target
    parts = (_FORMAT, view_fingerprint(use_case.view, use_case.contract), target.field, microseconds(target.horizon))
    return f"{use_case.name}/training-{fingerprint(*parts)}"


def backfill(
    use_case: UseCase,
    *,
    tables: Tables,
    settings: Settings,
    events_version: int | None = None,
    dimensions: Mapping[str, int] | None = None,
    engine: Engine = "auto",
) -> Backfill:
    """Makes the training table's rows of one version of the events table, as far as they are not there yet.

    ``dimensions`` are the versions of the tables of the view's dimensions, by name; of others the newest is taken.

    With ``auto`` Ray Data carries the work when more than ``settings.ray_rows`` events are in buckets to be made and a
    Ray cluster is connected, and a plain loop otherwise. Any number of backfills may run at once.
    """
    begun = time.monotonic()
    source, name = events_table(use_case), training_table(use_case)
    version = tables.version(source) if events_version is None else events_version
    tables.ensure(name, _schema(use_case), partition_by=[BUCKET, SOURCE])
    pinned = _pinned(use_case, tables, dimensions)
    events = _buckets(use_case, tables, version, pinned)
    wanted, buckets = {bucket.source: bucket for bucket in events}, 0
    while True:
        # Whoever commits first is right; the loser looks again at what is missing.
        turn = (tables.marker(name, "backfill") or 0) + 1
        missing = [wanted[key] for key in sorted(wanted.keys() - _present(tables, name))]
        if not missing:
            break
        job = _Job(use_case, tables, version, pinned)
        # With neighbours a slice reads the rows of its time in every bucket, so all of them count.
        total = sum(bucket.rows for bucket in events) if use_case.view.neighbours else 0
        tasks = []
        for bucket in missing:
            most = settings.task_rows * bucket.rows // max(total, bucket.rows, 1)
            tasks += _slices(use_case, tables, version, bucket, max(most, 1))
        if ray_carries(engine, sum(bucket.rows for bucket in missing), settings):
            files = _with_ray(job, tasks)
        else:
            files = [job(task) for task in tasks]
        if tables.commit(name, files, "backfill", turn).applied:
            buckets = len(missing)
            break
    table_version = tables.version(name)
    rows = sum(entry.rows for entry in tables.entries(name, table_version) if entry.partition[SOURCE] in wanted)
    view = view_fingerprint(use_case.view, use_case.contract)
    return Backfill(table_version, version, rows, view, buckets, time.monotonic() - begun, pinned)


def training_rows(
    use_case: UseCase,
    tables: Tables,
    events_version: int,
    *,
    dimensions: Mapping[str, int] | None = None,
    table_version: int | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The examples of the use case's present view that were made from one version of the events table.

    ``dimensions`` as in ``backfill``.

    Raises ``NoTrainingRows`` when any of them have not been made in ``table_version`` (None: the newest).
    """
    name, pinned = training_table(use_case), _pinned(use_case, tables, dimensions)
    sources = {bucket.source for bucket in _buckets(use_case, tables, events_version, pinned)}
    lacking = sources - _present(tables, name, table_version) if tables.exists(name) else sources
    if lacking:
        raise NoTrainingRows(
            f"use case {use_case.name!r}: {len(lacking)} of {len(sources)} buckets of events version {events_version} "
            f"have no examples in table {name!r}{'' if table_version is None else f', version {table_version}'}: run "
            f"`python -m pipelines.backfill {use_case.name} --events-version {events_version}`"
        )
    wanted = list(columns) if columns is not None else examples_schema(use_case).names
    return tables.read(name, version=table_version, columns=wanted, partition={SOURCE: sorted(sources)})


@dataclass(frozen=True)
class _Task:
    """A bucket's examples with request times from ``since`` on and before ``until`` (us); None has no bound."""

    bucket: int
    source: str
    since: int | None = None
    until: int | None = None


@dataclass(frozen=True)
class _Job:
    """Makes and writes the examples of a task; picklable, so that any worker can do it."""

    use_case: UseCase
    tables: Tables
    events_version: int
    dimensions: Mapping[str, int]

    def __call__(self, task: _Task) -> DataFile:
        use_case, view = self.use_case, self.use_case.view
        first = None if task.since is None else self._first_events(task.bucket)
        reach = compile_plan(view, use_case.contract).behind_us
        events = self._events(task, reach, partition={BUCKET: [task.bucket]})
        everywhere = None
        if view.neighbours:
            within = microseconds(max(near.within for near in view.neighbours))
            everywhere = self._events(task, within, columns=columns_of(use_case.contract, view.neighbours))
        facts = {
            dimension.name: self.tables.read(
                events_table(use_case.source(dimension)), version=self.dimensions[dimension.name]
            )
            for dimension in view.dimensions
        }
        rows = build_examples(
            use_case, events, since=task.since, until=task.until, first=first, everywhere=everywhere, dimensions=facts
        )
        rows = rows.append_column(BUCKET, pa.repeat(pa.scalar(task.bucket, pa.int32()), rows.num_rows))
        rows = rows.append_column(SOURCE, pa.repeat(pa.scalar(task.source), rows.num_rows))
        name = training_table(use_case)
        return self.tables.write_file(name, rows, partition={BUCKET: task.bucket, SOURCE: task.source})

    def _events(self, task: _Task, reach_us: int, **of: Any) -> pa.Table:
        """The events that requests of the task may see, when they see ``reach_us`` back; all where it has no bounds."""
        needed, at = None, pc.field(self.use_case.contract.time)
        if task.since is not None and task.until is not None:
            horizon = microseconds(self.use_case.model.target.horizon)
            edges = (task.since - reach_us, task.until + horizon)
            since, until = (pa.scalar(edge, pa.int64()).cast(INSTANT) for edge in edges)
            needed = (at >= since) & (at < until)
        return self.tables.read(events_table(self.use_case), version=self.events_version, filter=needed, **of)

    def _first_events(self, bucket: int) -> Mapping[str, int]:
        entity, at = self.use_case.contract.entity, self.use_case.contract.time
        rows = self.tables.read(
            events_table(self.use_case), version=self.events_version, columns=[entity, at], partition={BUCKET: [bucket]}
        )
        found = rows.group_by(entity).aggregate([(at, "min")])
        return dict(zip(found.column(entity).to_pylist(), instants(found, f"{at}_min").tolist(), strict=True))


def _pinned(use_case: UseCase, tables: Tables, chosen: Mapping[str, int] | None) -> dict[str, int]:
    """The versions of the dimensions' tables, by the dimension's name."""
    pinned = {}
    for dimension in use_case.view.dimensions:
        table = events_table(use_case.source(dimension))
        if not tables.exists(table):
            raise NoTrainingRows(
                f"use case {use_case.name!r}: dimension {dimension.name!r} has no table {table!r}: load its rows with "
                f"`python -m pipelines.ingest {use_case.name} --dimension {dimension.name} FILE …`"
            )
        wanted = (chosen or {}).get(dimension.name)
        pinned[dimension.name] = tables.version(table) if wanted is None else wanted
    return pinned


def _buckets(use_case: UseCase, tables: Tables, version: int, dimensions: Mapping[str, int]) -> list[Bucket]:
    """The buckets of one version of the events table, by number; ``source`` is of all that their examples depend on."""
    held = buckets_in(tables, events_table(use_case), version)
    others = [bucket.source for bucket in held] if use_case.view.neighbours else []
    for dimension in use_case.view.dimensions:
        facts = buckets_in(tables, events_table(use_case.source(dimension)), dimensions[dimension.name])
        others += [bucket.source for bucket in facts]
    if not others:
        return held
    return [replace(bucket, source=fingerprint(bucket.number, bucket.source, others)) for bucket in held]


def _present(tables: Tables, name: str, version: int | None = None) -> set[str]:
    return {entry.partition[SOURCE] for entry in tables.entries(name, version)}


def _slices(use_case: UseCase, tables: Tables, version: int, bucket: Bucket, most: int) -> list[_Task]:
    """Tasks of about ``most`` events each, which together make the bucket's examples."""
    whole = _Task(bucket.number, bucket.source)
    if bucket.rows <= most:
        return [whole]
    at = use_case.contract.time
    rows = tables.read(events_table(use_case), version=version, columns=[at], partition={BUCKET: [bucket.number]})
    requests = np.sort(instants(rows, at)) - microseconds(use_case.model.target.horizon)
    edges = [*dict.fromkeys(requests[::most].tolist()), int(requests[-1]) + 1]
    return [_Task(bucket.number, bucket.source, *edge) for edge in pairwise(edges)]


def _schema(use_case: UseCase) -> pa.Schema:
    return pa.schema([*examples_schema(use_case), pa.field(BUCKET, pa.int32()), pa.field(SOURCE, pa.string())])


def _with_ray(job: _Job, tasks: list[_Task]) -> list[DataFile]:
    import ray.data

    def make(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        # Only what a successful attempt returns is committed; files of a killed one are orphans for vacuum.
        return {"files": [json.dumps(asdict(job(tasks[int(place)]))) for place in batch["task"]]}

    items = ray.data.from_items([{"task": place} for place in range(len(tasks))], override_num_blocks=len(tasks))
    made = items.map_batches(make, batch_size=1, num_cpus=1).take_all()
    return sorted((DataFile(**json.loads(row["files"])) for row in made), key=lambda file: file.path)
