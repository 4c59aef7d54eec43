"""Features of the past, for training and audits: each row sees only what was known at its own request time.

The kernels are those of entity state, so a value made here equals the served one bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings import Settings
from cluster.tables import DataFile, Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import BUCKET, EVENT_ID, INSTANT, contract_schema
from pipelines.features.localtime import covered
from pipelines.features.sweep import Reads, places, sweep
from pipelines.features.windows import compile_plan, event_columns, view_fingerprint
from pipelines.spec import UseCase
from pipelines.spec.base import fingerprint, microseconds

TIME, LABEL, STATUS = "_time", "_label", "_status"
EVENTS_VERSION, VIEW = "_events_version", "_view"
_FORMAT = 1  # of the training table: raise it when the same events give other rows


@dataclass(frozen=True)
class Backfill:
    """A training table's content: the rows of ``view_fingerprint`` made from ``events_version``."""

    table_version: int
    events_version: int
    rows: int
    view_fingerprint: str
    seconds: float


def training_table(use_case: UseCase) -> str:
    """The name of the Delta table of examples of the present view and target.

    Another view has other columns, and another target other rows, so each pair has a table of its own.
    """
    target = use_case.model.target
    parts = (
        _FORMAT,
        view_fingerprint(use_case.view, use_case.contract),
        target.field,
        microseconds(target.horizon),
    )
    return f"{use_case.name}/training-{fingerprint(*parts)}"


def examples_schema(use_case: UseCase) -> pa.Schema:
    """The schema of ``build_examples``."""
    view, fields = use_case.view, contract_schema(use_case.contract)
    return pa.schema(
        [
            (TIME, INSTANT),
            (LABEL, pa.float64()),
            (EVENT_ID, pa.string()),
            (use_case.contract.entity, pa.string()),
            *((name, fields.field(name).type) for name in view.inputs),
            *((name, pa.float64()) for name in view.stored),
            (STATUS, pa.list_(pa.uint8())),
        ]
    )


def build_examples(use_case: UseCase, events: pa.Table) -> pa.Table:
    """One training row per event with a target, as the request for it would have seen the world.

    The request time is the event's time less the target's horizon; label and inputs come from the event,
    stored features from the events known at the request time. Left out are rows whose request precedes their
    entity's first event, whose event was already known at its own request, or whose time no calendar covers.
    Sorted by request time and entity.
    """
    plan = compile_plan(use_case.view, use_case.contract)
    target = use_case.model.target
    schema = examples_schema(use_case)
    columns = event_columns(plan, events)
    request = columns.times - microseconds(target.horizon)
    label = pc.fill_null(events.column(target.field).cast(pa.float64()), np.nan).to_numpy()
    usable = ~np.isnan(label) & (columns.known_at > request) & covered(use_case.view.calendar, request)
    first = np.full(len(columns.names), np.iinfo(np.int64).max)
    np.minimum.at(first, columns.entities, columns.times)
    chosen = np.flatnonzero(usable & (request >= first[columns.entities]))
    chosen = chosen[np.lexsort((columns.orders[chosen], columns.entities[chosen], request[chosen]))]
    if not len(chosen):
        return schema.empty_table()
    swept = sweep(plan, columns, columns.known_at, Reads(columns.entities[chosen], request[chosen], request[chosen]))
    source = events.take(pa.array(chosen))
    answer: dict[str, Any] = {
        TIME: pa.array(request[chosen]).cast(INSTANT),
        LABEL: pa.array(label[chosen]),
        EVENT_ID: source.column(EVENT_ID),
        use_case.contract.entity: source.column(use_case.contract.entity),
        **{name: source.column(name) for name in use_case.view.inputs},
        **{name: pa.array(swept.values[:, i]) for i, name in enumerate(plan.features)},
        STATUS: _lists(swept.status),
    }
    return pa.table(answer).select(schema.names).cast(schema)


def silenced(
    use_case: UseCase, events: pa.Table, entities: np.ndarray, moments: np.ndarray, silence_us: int
) -> np.ndarray:
    """What state would give at ``moments`` had each entity's events stopped ``silence_us`` before: float64[n, s].

    entities object[n], moments int64[n] (us), ``events`` rows of the events table. Row i is made of the events known
    by ``moments[i] - silence_us`` and read at ``moments[i]``, as for a sensor that fell silent.
    """
    plan = compile_plan(use_case.view, use_case.contract)
    columns = event_columns(plan, events)
    reads = Reads(places(columns, entities), moments, moments - silence_us)
    return sweep(plan, columns, columns.known_at, reads).values


def backfill(
    use_case: UseCase,
    *,
    tables: Tables,
    settings: Settings,
    events_version: int | None = None,
    engine: Literal["auto", "arrow", "ray"] = "auto",
) -> Backfill:
    """Makes the training table's rows of this view from one version of the events table, once.

    Buckets are independent, because an entity lies in one. With ``auto`` Ray Data carries them when there are
    more than ``settings.ray_rows`` events and a Ray cluster is connected, and a plain loop otherwise. Rows of
    (view, events version) that are there already are left as they are.
    """
    begun = time.monotonic()
    source, name = events_table(use_case), training_table(use_case)
    version = tables.version(source) if events_version is None else events_version
    view = view_fingerprint(use_case.view, use_case.contract)
    tables.ensure(name, _training_schema(use_case), partition_by=[BUCKET])
    app_id = f"backfill/{view}/{version}"
    if tables.marker(name, app_id) is None:
        held = tables.read(source, version=version, columns=[BUCKET]).column(BUCKET)
        buckets = sorted(held.unique().to_pylist())
        job = _BucketJob(use_case, tables, version, view)
        if _ray_carries(engine, len(held), settings):
            files = _with_ray(job, buckets)
        else:
            files = [file for bucket in buckets for file in job(bucket)]
        tables.commit(name, files, app_id)
    table_version = tables.version(name)
    rows = training_rows(use_case, tables, version, table_version=table_version, columns=[LABEL]).num_rows
    return Backfill(table_version, version, rows, view, time.monotonic() - begun)


def training_rows(
    use_case: UseCase,
    tables: Tables,
    events_version: int,
    *,
    table_version: int | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The training table's rows of the use case's present view and one version of the events table."""
    view = view_fingerprint(use_case.view, use_case.contract)
    wanted = (pc.field(VIEW) == view) & (pc.field(EVENTS_VERSION) == events_version)
    return tables.read(
        training_table(use_case),
        version=table_version,
        columns=list(columns) if columns is not None else None,
        filter=wanted,
    )


@dataclass(frozen=True)
class _BucketJob:
    """Makes and writes the examples of one bucket; picklable, so that any worker can do it."""

    use_case: UseCase
    tables: Tables
    events_version: int
    view: str

    def __call__(self, bucket: int) -> list[DataFile]:
        source, name = events_table(self.use_case), training_table(self.use_case)
        events = self.tables.read(source, version=self.events_version, partition={BUCKET: [bucket]})
        rows = build_examples(self.use_case, events)
        if not rows.num_rows:
            return []
        for column, value, kind in (
            (EVENTS_VERSION, self.events_version, pa.int64()),
            (VIEW, self.view, pa.string()),
            (BUCKET, bucket, pa.int32()),
        ):
            rows = rows.append_column(column, pa.repeat(pa.scalar(value, kind), rows.num_rows))
        return [self.tables.write_file(name, rows, partition={BUCKET: bucket})]


def _training_schema(use_case: UseCase) -> pa.Schema:
    extra = [(EVENTS_VERSION, pa.int64()), (VIEW, pa.string()), (BUCKET, pa.int32())]
    return pa.schema([*examples_schema(use_case), *(pa.field(n, t) for n, t in extra)])


def _ray_carries(engine: str, rows: int, settings: Settings) -> bool:
    if engine == "arrow" or (engine == "auto" and rows <= settings.ray_rows):
        return False
    import ray

    connected = bool(ray.is_initialized())
    if engine == "ray" and not connected:
        raise RuntimeError("the backfill's Ray engine needs a Ray cluster: connect first, or use engine='arrow'")
    return connected


def _with_ray(job: _BucketJob, buckets: list[int]) -> list[DataFile]:
    import ray.data

    def make(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        # Only what a successful attempt returns is committed; files of a killed one are orphans for vacuum.
        return {"files": [json.dumps([asdict(file) for file in job(int(bucket))]) for bucket in batch["bucket"]]}

    items = ray.data.from_items([{"bucket": bucket} for bucket in buckets], override_num_blocks=len(buckets))
    made = items.map_batches(make, batch_size=1, num_cpus=1).take_all()
    files = [DataFile(**file) for row in made for file in json.loads(row["files"])]
    return sorted(files, key=lambda file: file.path)


def _lists(matrix: np.ndarray) -> pa.ListArray:
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.reshape(-1)))
