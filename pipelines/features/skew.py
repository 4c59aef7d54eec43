"""The skew audit: recomputes what was served from the events table and compares it to the last bit.

Each logged prediction says which state it read: a generation (rows of one version of the events table) and a
log sequence. From those rows alone its features are made again by the offline side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import INSTANT, SEQUENCE
from pipelines.features import derived
from pipelines.features.offline import fill_dimension, fill_neighbours
from pipelines.features.projection import NO_TABLE, Projection
from pipelines.features.served import Status, inputs_of
from pipelines.features.sweep import Reads, places, sweep
from pipelines.features.windows import Plan, compile_plan, event_columns, instants
from pipelines.spec import Contract, EventSource, UseCase
from pipelines.spec.base import microseconds

_EXAMPLES = 20


@dataclass(frozen=True)
class Difference:
    """One served value that is not the recomputed one."""

    prediction_id: str
    feature: str
    served: float
    recomputed: float


@dataclass(frozen=True)
class FeatureSkew:
    """How one feature differs: in how many values, of which ``missing`` were served as none although there was one,
    and ``extra`` as one although there was none; ``largest`` is the greatest distance of the others.
    """

    differing: int
    missing: int
    extra: int
    largest: float


@dataclass(frozen=True)
class SkewReport:
    """What an audit found. ``mismatched`` counts predictions, ``by_feature`` says how the features differ that do.

    ``imputed`` counts stored values in whose place a fallback put something: the log is the only record of what that
    was, so they are taken from it, and the columns made of them are recomputed like all others.
    ``pending`` predictions read events that are not drained to the table yet, ``foreign`` ones were made by
    another view or model definition than the present page; neither is checked.
    """

    checked: int
    mismatched: int
    pending: int
    foreign: int
    by_feature: dict[str, FeatureSkew] = field(default_factory=dict)
    examples: tuple[Difference, ...] = ()
    imputed: int = 0


def audit(
    use_case: UseCase,
    predictions: pa.Table,
    *,
    tables: Tables,
    states: Sequence[Projection[Any]],
) -> SkewReport:
    """Recomputes stored and numeric columns of ``predictions`` (``SERVED_SCHEMA``) from the events table.

    ``states`` are those that were read: ``OnlineState.states``. NaN equals NaN; anything else must have the same
    bits. The log's JSON has no infinities, so one counts as NaN.
    """
    plan = compile_plan(use_case.view, use_case.contract)
    width = len(use_case.model.numeric)
    mine = pc.and_(
        pc.equal(predictions.column("view"), plan.fingerprint),
        pc.equal(pc.list_value_length(predictions.column("numeric")), width),
    )
    ours = predictions.filter(mine)
    own = _Snapshots.of(use_case, tables)
    facts = [_Snapshots.of(use_case.source(dimension), tables) for dimension in use_case.view.dimensions]
    drained = [own.drained] * (1 + len(use_case.view.neighbours)) + [snapshots.drained for snapshots in facts]
    others = _matrix(ours, "others", 2 * len(states[1:]))
    sequences = np.column_stack([ours.column("sequence").to_numpy(), others[:, 1::2]])
    ready = ours.filter(pa.array((sequences <= drained).all(axis=1)))
    found: dict[str, list[np.ndarray]] = {}
    examples: list[Difference] = []
    mismatched = imputed = 0
    for part in _of_one_snapshot(ready):
        logged = _matrix(part, "stored", len(plan.features))
        put_in = _matrix(part, "status", len(plan.features)) == Status.IMPUTED
        imputed += int(put_in.sum())
        stored = np.where(put_in, logged, _recompute(plan, own, facts, states, part, inputs_of(use_case, part)))
        numeric = _numeric(use_case, stored, part)
        names = (*plan.features, *use_case.model.numeric)
        served = np.column_stack([logged, _matrix(part, "numeric", width)])
        served = np.where(np.isfinite(served), served, np.nan)
        again = np.column_stack([stored, numeric])
        again = np.where(np.isfinite(again), again, np.nan)
        differs = different_bits(served, again)
        mismatched += int(differs.any(axis=1).sum())
        ids = part.column("prediction_id").to_pylist()
        for row, column in np.argwhere(differs).tolist():
            found.setdefault(names[column], []).append(np.array([served[row, column], again[row, column]]))
            if len(examples) < _EXAMPLES:
                examples.append(
                    Difference(ids[row], names[column], float(served[row, column]), float(again[row, column]))
                )
    return SkewReport(
        checked=ready.num_rows,
        mismatched=mismatched,
        pending=ours.num_rows - ready.num_rows,
        foreign=predictions.num_rows - ours.num_rows,
        by_feature={name: _skew_of(np.array(pairs)) for name, pairs in found.items()},
        examples=tuple(examples),
        imputed=imputed,
    )


def _skew_of(pairs: np.ndarray) -> FeatureSkew:
    """What (served, recomputed) float64[n, 2] that differ amount to."""
    missing, extra = np.isnan(pairs[:, 0]), np.isnan(pairs[:, 1])
    apart = np.abs(pairs[:, 0] - pairs[:, 1])[~missing & ~extra]
    return FeatureSkew(len(pairs), int(missing.sum()), int(extra.sum()), float(apart.max(initial=0.0)))


def different_bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where two float64 arrays differ in any bit, NaN being equal to NaN."""
    bits = np.ascontiguousarray(left).view(np.int64) != np.ascontiguousarray(right).view(np.int64)
    differs: np.ndarray = bits & ~(np.isnan(left) & np.isnan(right))
    return differs


@dataclass(frozen=True)
class _Snapshots:
    """What a state could see of a source's events table: ``version`` of it holds the log through ``drained``."""

    contract: Contract
    tables: Tables
    table: str
    version: int
    drained: int

    @staticmethod
    def of(source: EventSource, tables: Tables) -> _Snapshots:
        """The newest version, for everything that follows."""
        table = events_table(source)
        version = tables.version(table)
        held = pc.max(tables.read(table, version=version, columns=[SEQUENCE]).column(SEQUENCE)).as_py() or 0
        # A drained duplicate leaves no row, so the drain's own marker may be further on.
        return _Snapshots(source.contract, tables, table, version, max(held, tables.marker(table, "drain/events") or 0))

    def visible(self, base: int, wanted: pc.Expression) -> tuple[pa.Table, np.ndarray]:
        """Rows of the table version ``base`` and the log's after it, with their ranks int64: 0, or the sequence."""
        newest = self.tables.read(self.table, version=self.version, filter=wanted)
        if base == NO_TABLE:
            rows, before = newest.slice(0, 0), 0
        else:
            rows = self.tables.read(self.table, version=base, filter=wanted)
            held = self.tables.read(self.table, version=base, columns=[SEQUENCE]).column(SEQUENCE)
            before = pc.max(held).as_py() or 0
        later = newest.filter(pc.greater(newest.column(SEQUENCE), before))
        ranks = np.concatenate([np.zeros(rows.num_rows, np.int64), later.column(SEQUENCE).to_numpy()])
        return pa.concat_tables([rows, later]), ranks


def _of_one_snapshot(predictions: pa.Table) -> Iterator[pa.Table]:
    """The predictions by the generations that they were made from."""
    generations = [
        (own, *others[::2])
        for own, others in zip(
            predictions.column("generation").to_pylist(), predictions.column("others").to_pylist(), strict=True
        )
    ]
    for wanted in sorted(set(generations)):
        yield predictions.filter(pa.array([found == wanted for found in generations]))


def _recompute(
    plan: Plan,
    own: _Snapshots,
    facts: Sequence[_Snapshots],
    states: Sequence[Projection[Any]],
    part: pa.Table,
    inputs: Mapping[str, list[Any]],
) -> np.ndarray:
    """Stored features of every row of ``part``, all of one generation of each state, float64[n, s].

    ``own`` are the use case's events and ``facts`` those of the view's dimensions.
    """
    view, times, entities = plan.view, instants(part, "_time"), part.column("entity").to_pylist()
    of_them = pc.field(plan.contract.entity).isin(part.column("entity").unique())
    table, ranks = own.visible(states[0].generation(part.column("generation")[0].as_py()), of_them)
    columns = event_columns(plan, table)
    asked = places(columns, np.array(entities, dtype=object))
    swept = sweep(plan, columns, ranks, Reads(asked, times, part.column("sequence").to_numpy()))
    positions = iter(_matrix(part, "others", 2 * len(view.beside)).astype(np.int64).T)
    bases = iter(states[1:])

    def seen(snapshots: _Snapshots, wanted: pc.Expression) -> tuple[pa.Table, np.ndarray, Reads]:
        generations, sequences = next(positions), next(positions)
        table, ranks = snapshots.visible(next(bases).generation(int(generations[0])), wanted)
        return table, ranks, Reads(asked, times, sequences)

    for near in view.neighbours:
        since = pa.scalar(int(times.min()) - microseconds(near.within), pa.int64()).cast(INSTANT)
        table, ranks, reads = seen(own, pc.field(plan.contract.time) > since)
        fill_neighbours(plan, swept, near, table, ranks, inputs, reads)
    for dimension, snapshots in zip(view.dimensions, facts, strict=True):
        keys = entities if dimension.key == plan.contract.entity else inputs[dimension.key]
        wanted = pc.field(dimension.contract.entity).isin(pa.array(keys, pa.string()).unique())
        table, ranks, reads = seen(snapshots, wanted)
        fill_dimension(plan, swept, dimension, table, ranks, keys, reads)
    return swept.values


def _numeric(use_case: UseCase, stored: np.ndarray, part: pa.Table) -> np.ndarray:
    """The model's numeric columns of every row, float64[n, columns]."""
    moments = instants(part, "_time")
    columns = derived.columns(use_case.view, stored, inputs_of(use_case, part), moments)
    return np.column_stack([columns[name] for name in use_case.model.numeric])


def _matrix(part: pa.Table, name: str, width: int) -> np.ndarray:
    """A list column of equal lengths as [n, width]; a null in a list becomes NaN."""
    flat: np.ndarray = part.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(part.num_rows, width)
