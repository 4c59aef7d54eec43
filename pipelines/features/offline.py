"""Features of the past, for training and audits: each row sees only what was known at its own request time.

The kernels are those of entity state, so a value made here equals the served one bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.events import EVENT_ID, INSTANT, contract_schema
from pipelines.features.localtime import covered
from pipelines.features.sweep import Reads, places, sweep
from pipelines.features.windows import compile_plan, event_columns
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds

TIME, LABEL, STATUS = "_time", "_label", "_status"


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


def build_examples(
    use_case: UseCase,
    events: pa.Table,
    *,
    since: int | None = None,
    until: int | None = None,
    first: Mapping[str, int] | None = None,
) -> pa.Table:
    """One training row per event with a target, as the request for it would have seen the world.

    The request time is the event's time less the target's horizon; label and inputs come from the event,
    stored features from the events known at the request time. Left out are rows whose request precedes their
    entity's first event, whose event was already known at its own request, or whose time no calendar covers.
    Sorted by request time and entity.

    With ``since`` and ``until`` (us) only request times from the one on and before the other are made; ``events`` may
    then lack those that no window of theirs reaches, and ``first`` has the time (us) of each entity's first event.
    """
    plan = compile_plan(use_case.view, use_case.contract)
    target = use_case.model.target
    schema = examples_schema(use_case)
    columns = event_columns(plan, events)
    request = columns.times - microseconds(target.horizon)
    label = pc.fill_null(events.column(target.field).cast(pa.float64()), np.nan).to_numpy()
    usable = ~np.isnan(label) & (columns.known_at > request) & covered(use_case.view.calendar, request)
    if since is not None:
        usable &= request >= since
    if until is not None:
        usable &= request < until
    if first is None:
        begin = np.full(len(columns.names), np.iinfo(np.int64).max)
        np.minimum.at(begin, columns.entities, columns.times)
    else:
        begin = np.array([first[name] for name in columns.names], np.int64)
    chosen = np.flatnonzero(usable & (request >= begin[columns.entities]))
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


def _lists(matrix: np.ndarray) -> pa.ListArray:
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.reshape(-1)))
