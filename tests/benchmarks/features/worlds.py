"""Made-up sensors for the benchmarks of features."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa

from pipelines.contracts.events import INSTANT, buckets_of, event_ids, events_schema
from pipelines.features.windows import EventColumns
from pipelines.spec import Contract, FeatureView, Field, FieldType, Fold, ModelSpec, Split, Target, UseCase, Window

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
MINUTE_US = 60_000_000
# A midnight, so that the tiles of any hop of the benchmarks begin there.
BASE = 1_700_006_400_000_000

CONTRACT = Contract(
    name="readings",
    version="1.0.0",
    owner="benchmarks",
    fields=(
        Field(name="sensor", type=FieldType.STRING),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="flow", type=FieldType.FLOAT, nullable=True, minimum=-1e6, maximum=1e6),
    ),
    entity="sensor",
    time="at",
    key=("sensor", "at"),
)


def view(*windows: tuple[timedelta, timedelta], folds: tuple[Fold, ...]) -> FeatureView:
    """A view with ``folds`` of the flow over windows of (length, hop)."""
    made = (Window(field="flow", length=length, hop=hop, folds=folds) for length, hop in windows)
    return FeatureView(name="sensor", windows=tuple(made), ttl=DAY)


def readings(sensors: int, each: int, every_us: int, seed: int = 1) -> EventColumns:
    """``each`` readings of every sensor, ``every_us`` apart, known at once, in canonical order."""
    times = np.tile(BASE + np.arange(each) * every_us, sensors)
    flow = np.random.default_rng(seed).normal(10.0, 3.0, len(times))
    return EventColumns(
        names=tuple(f"sensor{place:05d}" for place in range(sensors)),
        entities=np.repeat(np.arange(sensors), each),
        times=times,
        orders=np.zeros(len(times), np.int64),
        known_at=times,
        sequences=np.zeros(len(times), np.int64),
        values=flow.reshape(-1, 1),
    )


def use_case(made: FeatureView, contract: Contract = CONTRACT) -> UseCase:
    """A page with this view; its model, which nobody trains, predicts the first number of the contract."""
    target = next(field.name for field in contract.fields if field.type is FieldType.FLOAT)
    model = ModelSpec(
        name="bench",
        target=Target(field=target, horizon=HOUR),
        numeric=made.stored[:1],
        split=Split(calibration=DAY, test=DAY),
    )
    return UseCase(name="bench", title="Benchmark", contract=contract, view=made, model=model, gates=())


def events(contract: Contract, rows: pa.Table, buckets: int = 8) -> pa.Table:
    """Rows of the contract's fields as rows of its events table, loaded in bulk and known at their time."""
    count, entities = rows.num_rows, rows.column(contract.entity)
    ids = event_ids(contract, rows)
    sequences, load = pa.repeat(pa.scalar(0, pa.int64()), count), pa.repeat("benchmark", count)
    system = [ids, rows.column(contract.time), sequences, load, buckets_of(entities, buckets)]
    schema = events_schema(contract)
    fields = [rows.column(field.name) for field in contract.fields]
    return pa.Table.from_arrays([*fields, *system], names=schema.names).cast(schema)


def rows_of(made: EventColumns) -> pa.Table:
    """The readings as a table of the contract's fields."""
    names = pa.array(made.names).take(pa.array(made.entities))
    return pa.table({"sensor": names, "at": pa.array(made.times).cast(INSTANT), "flow": made.values[:, 0]})
