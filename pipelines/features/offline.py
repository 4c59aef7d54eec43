"""Features of the past, for training and audits: each row sees only what was known at its own request time.

The kernels are those of entity state, so a value made here equals the served one bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.events import EVENT_ID, INSTANT, KNOWN_AT, contract_schema
from pipelines.features.dimensions import look_up, ttl_of
from pipelines.features.found import mark
from pipelines.features.localtime import covered
from pipelines.features.neighbours import asked_of, points_of, search_past, searcher
from pipelines.features.sweep import Reads, Swept, places, sweep
from pipelines.features.windows import Plan, compile_plan, event_columns, instants
from pipelines.spec import Dimension, Neighbours, UseCase
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
    everywhere: pa.Table | None = None,
    dimensions: Mapping[str, pa.Table] | None = None,
) -> pa.Table:
    """One training row per event with a target, as the request for it would have seen the world.

    The request time is the event's time less the target's horizon; label and inputs come from the event,
    stored features from the events known at the request time. Left out are rows whose request precedes their
    entity's first event, whose event was already known at its own request, or whose time no calendar covers.
    Sorted by request time and entity.

    With ``since`` and ``until`` (us) only request times from the one on and before the other are made; ``events`` may
    then lack those that no window of theirs reaches, and ``first`` has the time (us) of each entity's first event.
    Where ``events`` lack entities, neighbours are searched for in ``everywhere``, the rows of all. ``dimensions`` are
    the rows of each dimension of the view.
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
    reads = Reads(columns.entities[chosen], request[chosen], request[chosen])
    swept = sweep(plan, columns, columns.known_at, reads)
    source = events.take(pa.array(chosen))
    world = events if everywhere is None else everywhere
    for near in use_case.view.neighbours:
        inputs = {name: source.column(name) for name in near.asked}
        fill_neighbours(plan, swept, near, world, instants(world, KNOWN_AT), inputs, reads)
    for dimension in use_case.view.dimensions:
        facts = (dimensions or {})[dimension.name]
        keys = source.column(dimension.key).to_pylist()
        fill_dimension(plan, swept, dimension, facts, instants(facts, KNOWN_AT), keys, reads)
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


def fill_neighbours(
    plan: Plan,
    swept: Swept,
    near: Neighbours,
    events: pa.Table,
    known: np.ndarray,
    inputs: Mapping[str, Sequence[Any] | pa.ChunkedArray],
    reads: Reads,
) -> None:
    """Writes the features of ``near`` among ``events``, rows of all entities, into what was ``swept`` for ``reads``.

    ``known`` int64 is each row's number in the order in which events became known; ``inputs`` those of the requests.
    """
    find, place = searcher(near, plan.contract), dict(plan.view.beside)[near]
    points = points_of(find, plan.contract, events)
    past = search_past(find, points, known, asked_of(near, inputs), reads.moments, reads.bounds)
    swept.values[:, place] = past.values.T
    mark(past, reads.moments, microseconds(plan.view.ttl), swept.status[:, place])


def fill_dimension(
    plan: Plan,
    swept: Swept,
    dimension: Dimension,
    rows: pa.Table,
    known: np.ndarray,
    keys: Sequence[str | None],
    reads: Reads,
) -> None:
    """Writes what held for ``keys`` in ``dimension``, whose table has ``rows``, into what was ``swept`` for ``reads``.

    ``known`` int64 is each row's number in the order in which rows became known.
    """
    place = dict(plan.view.beside)[dimension]
    past = look_up(dimension, rows, known, keys, reads.moments, reads.bounds)
    swept.values[:, place] = past.values.T
    mark(past, reads.moments, ttl_of(dimension), swept.status[:, place])


def silenced(
    use_case: UseCase, events: pa.Table, entities: np.ndarray, moments: np.ndarray, silence_us: int
) -> np.ndarray:
    """What state would give at ``moments`` had each entity's events stopped ``silence_us`` before: float64[n, e].

    entities object[n], moments int64[n] (us), ``events`` rows of the events table. Row i is made of the events known
    by ``moments[i] - silence_us`` and read at ``moments[i]``, as for a sensor that fell silent. The features are those
    of ``view.of_entity``: no sensor's silence changes what others sold for.
    """
    plan = compile_plan(use_case.view, use_case.contract)
    columns = event_columns(plan, events)
    reads = Reads(places(columns, entities), moments, moments - silence_us)
    return sweep(plan, columns, columns.known_at, reads).values[:, : len(use_case.view.of_entity)]


def _lists(matrix: np.ndarray) -> pa.ListArray:
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.reshape(-1)))
