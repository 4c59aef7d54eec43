"""The skew audit: recomputes what was served from the events table and compares it to the last bit.

Each logged prediction says which state it read: a generation (rows of one version of the events table) and a
log sequence. From those rows alone its features are made again by the offline side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.contracts.enforce import events_table
from pipelines.contracts.events import EVENT_ID, INSTANT, KNOWN_AT, SEQUENCE
from pipelines.features import derived
from pipelines.features.neighbours import columns_of
from pipelines.features.offline import fill_dimension, fill_neighbours
from pipelines.features.online import OnlineState
from pipelines.features.projection import NO_TABLE, Projection
from pipelines.features.served import Status, inputs_of
from pipelines.features.sweep import Reads, places, sweep
from pipelines.features.windows import Plan, compile_plan, event_columns, instants, pages
from pipelines.spec import Contract, Dimension, EventSource, UseCase
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
    ``pending`` predictions read events that are not drained to the table yet, ``foreign`` ones were answered from a
    view that is not on the page, or from a state that was lost since; neither is checked. Of ``stored_only`` of the
    checked ones the stored features were compared and nothing else, because the numeric columns of their model version
    are not known here.
    """

    checked: int
    mismatched: int
    pending: int
    foreign: int
    by_feature: dict[str, FeatureSkew] = field(default_factory=dict)
    examples: tuple[Difference, ...] = ()
    imputed: int = 0
    stored_only: int = 0


def columns_of_the_page(version: str) -> None:
    """Knows no version: numeric columns are then compared where they are the page's."""


def audit(
    use_case: UseCase,
    predictions: pa.Table,
    *,
    tables: Tables,
    states: Mapping[str, OnlineState],
    columns: Callable[[str], Sequence[str] | None] = columns_of_the_page,
) -> SkewReport:
    """Recomputes stored and numeric columns of ``predictions`` (``SERVED_SCHEMA``) from the events table.

    Each is recomputed under the view that it was answered from. ``states`` are those that were read, by view
    (``Views.states``), ``columns`` the numeric columns of a model version, None for one that is not known: the
    present view's have the page's then, if they are as many. NaN equals NaN; anything else must have the same bits. The
    log's JSON has no infinities, so one counts as NaN.
    """
    own, facts = _Snapshots.of(use_case, tables), _Facts(use_case, tables)
    found = _Found()
    ours = forgotten = 0
    for view, page in pages(use_case).items():
        mine = predictions.filter(pc.equal(predictions.column("view"), view))
        if not mine.num_rows:
            continue
        ours += mine.num_rows
        plan, read = compile_plan(page.view, page.contract), states[view].states
        told = [facts.of(dimension) for dimension in page.view.dimensions]
        drained = [own.drained] * (1 + len(page.view.neighbours)) + [snapshots.drained for snapshots in told]
        others = _matrix(mine, "others", 2 * len(page.view.beside))
        sequences = np.column_stack([mine.column("sequence").to_numpy(), others[:, 1::2]])
        for part in _of_one_snapshot(mine.filter(pa.array((sequences <= drained).all(axis=1)))):
            if not all(state.remembers(made) for state, made in zip(read, _generations(part)[0], strict=True)):
                forgotten += part.num_rows
                continue
            known = _models(part, columns, use_case.model.numeric if page is use_case else None)
            found.add(page, part, _recompute(plan, own, told, read, part, inputs_of(page, part)), known)
    return SkewReport(
        checked=found.checked,
        mismatched=found.mismatched,
        pending=ours - found.checked - forgotten,
        foreign=predictions.num_rows - ours + forgotten,
        by_feature={name: _skew_of(np.array(pairs)) for name, pairs in found.pairs.items()},
        examples=tuple(found.examples),
        imputed=found.imputed,
        stored_only=found.stored_only,
    )


@dataclass
class _Found:
    """What is gathered for a report."""

    checked: int = 0
    mismatched: int = 0
    imputed: int = 0
    stored_only: int = 0
    pairs: dict[str, list[np.ndarray]] = field(default_factory=dict)
    examples: list[Difference] = field(default_factory=list)

    def add(
        self, page: UseCase, part: pa.Table, again: np.ndarray, models: Iterable[tuple[Sequence[str], np.ndarray]]
    ) -> None:
        """Compares answers of one view: ``again`` are their stored features, ``models`` as ``_models`` gives them."""
        names = page.view.stored
        logged = _matrix(part, "stored", len(names))
        put_in = _matrix(part, "status", len(names)) == Status.IMPUTED
        stored = np.where(put_in, logged, again)
        wrong = self._compare(part, names, logged, stored)
        told = np.zeros(part.num_rows, np.bool_)
        for numeric, rows in models:
            group = part.take(pa.array(rows))
            made = _numeric(page, numeric, stored[rows], group)
            wrong[rows[self._compare(group, numeric, _matrix(group, "numeric", len(numeric)), made)]] = True
            told[rows] = True
        self.checked += part.num_rows
        self.mismatched += int(wrong.sum())
        self.imputed += int(put_in.sum())
        self.stored_only += int((~told).sum())

    def _compare(self, part: pa.Table, names: Sequence[str], served: np.ndarray, again: np.ndarray) -> np.ndarray:
        """bool[n]: in which rows of ``part`` a column of ``names`` is not what it was made again."""
        served, again = (np.where(np.isfinite(values), values, np.nan) for values in (served, again))
        differs = different_bits(served, again)
        ids = part.column("prediction_id")
        for row, column in np.argwhere(differs).tolist():
            pair = np.array([served[row, column], again[row, column]])
            self.pairs.setdefault(names[column], []).append(pair)
            if len(self.examples) < _EXAMPLES:
                self.examples.append(Difference(ids[row].as_py(), names[column], float(pair[0]), float(pair[1])))
        wrong: np.ndarray = np.any(differs, axis=1)
        return wrong


def _models(
    part: pa.Table, columns: Callable[[str], Sequence[str] | None], otherwise: Sequence[str] | None
) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    """The numeric columns of every model version in ``part`` of which they are known, and its rows."""
    versions = np.array(part.column("model_version").to_pylist(), dtype=object)
    widths = pc.list_value_length(part.column("numeric")).to_numpy()
    for version in dict.fromkeys(versions.tolist()):
        names = columns(version) or otherwise
        if names is not None:
            rows = np.flatnonzero((versions == version) & (widths == len(names)))
            yield names, rows


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
        # A drained duplicate leaves no row, so the drain's own marker may be further on. It is read first: a drain that
        # commits meanwhile must not have rows expected that this version does not hold.
        marker = tables.marker(table, "drain/events") or 0
        version = tables.version(table)
        held = pc.max(tables.read(table, version=version, columns=[SEQUENCE]).column(SEQUENCE)).as_py() or 0
        return _Snapshots(source.contract, tables, table, version, max(held, marker))

    def visible(
        self, base: int, wanted: pc.Expression, columns: list[str] | None = None
    ) -> tuple[pa.Table, np.ndarray]:
        """Rows of the table version ``base`` and the log's after it, with their ranks int64: 0, or the sequence."""
        newest = self.tables.read(self.table, version=self.version, filter=wanted, columns=columns)
        if base == NO_TABLE:
            rows, before = newest.slice(0, 0), 0
        else:
            rows = self.tables.read(self.table, version=base, filter=wanted, columns=columns)
            held = self.tables.read(self.table, version=base, columns=[SEQUENCE]).column(SEQUENCE)
            before = pc.max(held).as_py() or 0
        later = newest.filter(pc.greater(newest.column(SEQUENCE), before))
        ranks = np.concatenate([np.zeros(rows.num_rows, np.int64), later.column(SEQUENCE).to_numpy()])
        return pa.concat_tables([rows, later]), ranks


class _Facts:
    """The snapshots of dimensions, one of each although several views may have it."""

    def __init__(self, use_case: UseCase, tables: Tables) -> None:
        self._use_case, self._tables = use_case, tables
        self._seen: dict[str, _Snapshots] = {}

    def of(self, dimension: Dimension) -> _Snapshots:
        if dimension.name not in self._seen:
            self._seen[dimension.name] = _Snapshots.of(self._use_case.source(dimension), self._tables)
        return self._seen[dimension.name]


def _of_one_snapshot(predictions: pa.Table) -> Iterator[pa.Table]:
    """The predictions by the generations that they were made from."""
    generations = _generations(predictions)
    for wanted in sorted(set(generations)):
        yield predictions.filter(pa.array([found == wanted for found in generations]))


def _generations(predictions: pa.Table) -> list[tuple[int, ...]]:
    """Of every prediction those of the states that it was made from."""
    own, others = (predictions.column(name).to_pylist() for name in ("generation", "others"))
    return [(made, *beside[::2]) for made, beside in zip(own, others, strict=True)]


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
    of_them &= pc.field(plan.contract.time) >= _instant(int(times.min()) - plan.behind_us)
    named = list(dict.fromkeys([plan.contract.entity, plan.contract.time, *plan.fields, EVENT_ID, KNOWN_AT, SEQUENCE]))
    table, ranks = own.visible(states[0].generation(part.column("generation")[0].as_py()), of_them, named)
    columns = event_columns(plan, table)
    asked = places(columns, np.array(entities, dtype=object))
    swept = sweep(plan, columns, ranks, Reads(asked, times, part.column("sequence").to_numpy()))
    positions = iter(_matrix(part, "others", 2 * len(view.beside)).astype(np.int64).T)
    bases = iter(states[1:])

    def seen(
        snapshots: _Snapshots, wanted: pc.Expression, columns: list[str] | None = None
    ) -> tuple[pa.Table, np.ndarray, Reads]:
        generations, sequences = next(positions), next(positions)
        table, ranks = snapshots.visible(next(bases).generation(int(generations[0])), wanted, columns)
        return table, ranks, Reads(asked, times, sequences)

    for near in view.neighbours:
        recent = pc.field(plan.contract.time) > _instant(int(times.min()) - microseconds(near.within))
        table, ranks, reads = seen(own, recent, columns_of(plan.contract, [near]))
        fill_neighbours(plan, swept, near, table, ranks, inputs, reads)
    for dimension, snapshots in zip(view.dimensions, facts, strict=True):
        keys = entities if dimension.key == plan.contract.entity else inputs[dimension.key]
        wanted = pc.field(dimension.contract.entity).isin(pa.array(keys, pa.string()).unique())
        table, ranks, reads = seen(snapshots, wanted)
        fill_dimension(plan, swept, dimension, table, ranks, keys, reads)
    return swept.values


def _instant(at_us: int) -> pa.Scalar:
    return pa.scalar(at_us, pa.int64()).cast(INSTANT)


def _numeric(use_case: UseCase, names: Sequence[str], stored: np.ndarray, part: pa.Table) -> np.ndarray:
    """The numeric columns ``names`` of every row, float64[n, columns]."""
    moments = instants(part, "_time")
    columns = derived.columns(use_case.view, stored, inputs_of(use_case, part), moments)
    return np.stack([columns[name] for name in names], axis=1)


def _matrix(part: pa.Table, name: str, width: int) -> np.ndarray:
    """A list column of equal lengths as [n, width]; a null in a list becomes NaN."""
    flat: np.ndarray = part.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(part.num_rows, width)
