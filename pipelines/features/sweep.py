"""Stored features of the past: what a state would have answered, made from the events table alone.

The folds are those of entity state and so is the order in which they are merged, so a value made here equals the
served one bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.contracts.events import from_microseconds
from pipelines.features.kernels import checks, rolling
from pipelines.features.state import StateError
from pipelines.features.windows import EventColumns, Plan, canonical, eligible, take
from pipelines.spec.base import microseconds


@dataclass(frozen=True)
class Reads:
    """Reads of stored features, one per row, in any order.

    entities int64[q] are places in ``EventColumns.names`` (-1: no event is known of it), moments int64[q] (us) when
    features are taken; a read sees the events whose ``known`` number is at most its bound, int64[q].
    """

    entities: np.ndarray
    moments: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class Swept:
    """Stored features of reads, in their order: values float64[q, s], status uint8[q, s], ages (s) if asked for."""

    values: np.ndarray
    status: np.ndarray
    age_s: np.ndarray | None


def places(columns: EventColumns, entities: np.ndarray) -> np.ndarray:
    """Where in ``columns.names`` each of ``entities`` (object[n] of str) is, int64[n], -1 for none."""
    index = {name: place for place, name in enumerate(columns.names)}
    return np.fromiter((index.get(name, -1) for name in entities.tolist()), np.int64, len(entities))


def sweep(plan: Plan, columns: EventColumns, known: np.ndarray, reads: Reads, *, ages: bool = False) -> Swept:
    """The stored features of ``reads``, from those of the events ``columns`` that count for features.

    ``known`` int64[n] is an event's number in the order in which events became known: its ``known_at``, or a log
    sequence. Raises ``StateError`` when an event lies further ahead of when it became known than the contract's
    ``future`` allows: state would have refused reads until then.
    """
    future_us = microseconds(plan.contract.future)
    in_order, late, ahead, first = checks.survey(
        columns.entities, columns.times, columns.orders, columns.known_at, plan.lateness_us, future_us
    )
    if ahead:
        raise StateError(
            f"{ahead} events are further ahead of when they became known than contract.future "
            f"({plan.contract.future}) allows; the first is of {columns.names[columns.entities[first]]!r} at "
            f"{from_microseconds(int(columns.times[first]))}. The events table was not written through the contract: "
            "remove these rows"
        )
    if late:
        counts = eligible(plan, columns)
        columns, known = take(columns, np.flatnonzero(counts)), known[counts]
    if not in_order:
        order = canonical(columns)
        columns, known = take(columns, order), known[order]
    asked = reads.entities
    if np.any(asked < 0):
        asked = np.where(asked < 0, len(columns.names), asked)
    rows = None if checks.ascending(asked, reads.moments) else np.lexsort((reads.moments, asked))
    moments, bounds = reads.moments, reads.bounds
    if rows is not None:
        asked, moments, bounds = asked[rows], moments[rows], bounds[rows]
    numbers = np.arange(len(columns.names) + 2)
    shape = (len(plan.features), len(asked))
    # From Arrow's pool, which keeps freed pages: to get them anew from the system costs more than to fill them.
    values = np.frombuffer(pa.allocate_buffer(8 * shape[0] * shape[1]), np.float64).reshape(shape)
    status = np.frombuffer(pa.allocate_buffer(shape[0] * shape[1]), np.uint8).reshape(shape[::-1])
    age = np.empty(shape) if ages else None
    rolling.roll(
        plan.program, plan.mixed, columns.times, np.ascontiguousarray(columns.values.T), known,
        np.searchsorted(columns.entities, numbers), moments, bounds, np.searchsorted(asked, numbers),
        values, status, age,
    )  # fmt: skip
    if rows is None:
        return Swept(values.T, status, None if age is None else age.T)
    back = np.empty(len(rows), np.int64)
    back[rows] = np.arange(len(rows))
    return Swept(values[:, back].T, status[back], None if age is None else age[:, back].T)
