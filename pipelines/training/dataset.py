"""Training examples of one pinned snapshot as plain arrays, and their split in time.

Columns are made by ``pipelines.features.derived.columns``, as in serving. No part of the split has a row
whose outcome became known after the next part began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.contracts.events import EVENT_ID
from pipelines.features.derived import columns
from pipelines.features.offline import LABEL, TIME
from pipelines.features.training_table import training_rows
from pipelines.features.windows import view_fingerprint
from pipelines.spec import FieldType, ModelSpec, UseCase
from pipelines.spec.base import microseconds


@dataclass(frozen=True)
class Frame:
    """n examples ordered by request time, entity and event id.

    ``time_us`` int64 [n] are request times, ``label`` float64 [n] outcomes, ``entity`` object [n];
    ``columns`` the numeric columns of the view, float64 [n] each, ``strings`` the entity and the string
    inputs, object [n] each.
    """

    time_us: np.ndarray
    label: np.ndarray
    entity: np.ndarray
    columns: dict[str, np.ndarray]
    strings: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.time_us)

    def take(self, rows: np.ndarray) -> Frame:
        """The examples at ``rows``, a mask or positions."""
        return Frame(
            self.time_us[rows],
            self.label[rows],
            self.entity[rows],
            {name: values[rows] for name, values in self.columns.items()},
            {name: values[rows] for name, values in self.strings.items()},
        )


@dataclass(frozen=True)
class Parts:
    """A split of a frame; ``left_out`` rows lie in the gaps of one horizon between the parts."""

    train: Frame
    calibration: Frame
    test: Frame
    left_out: int


def load_examples(
    use_case: UseCase,
    tables: Tables,
    *,
    training_version: int,
    events_version: int,
    view: str,
    dimensions: Mapping[str, int],
) -> Frame:
    """The examples of (``view``, ``events_version``, ``dimensions``) in version ``training_version`` of the training
    table.

    Raises ``ValueError`` when ``view`` is not the fingerprint of the use case's present view (columns could
    not be made as they were then), or when there are no rows.
    """
    present = view_fingerprint(use_case.view, use_case.contract)
    if view != present:
        raise ValueError(
            f"use case {use_case.name!r}: the snapshot holds features of view {view}, "
            f"this code computes {present}; run its backfill, or train with the code that made it"
        )
    table = training_rows(use_case, tables, events_version, dimensions=dimensions, table_version=training_version)
    if not table.num_rows:
        raise ValueError(
            f"use case {use_case.name!r}: version {training_version} of its training table has no rows "
            f"of events version {events_version}: run `python -m pipelines.backfill {use_case.name}`"
        )
    return frame_of(use_case, table)


def frame_of(use_case: UseCase, examples: pa.Table) -> Frame:
    """The frame of rows that ``pipelines.features.offline.build_examples`` made."""
    entity = use_case.contract.entity
    # Files come back in any order; training must not depend on it.
    table = examples.sort_by([(TIME, "ascending"), (entity, "ascending"), (EVENT_ID, "ascending")])
    time_us = pc.cast(table.column(TIME), pa.int64()).to_numpy()
    strings = {entity: _objects(table.column(entity))}
    inputs: dict[str, np.ndarray] = {}
    for name in use_case.view.inputs:
        if use_case.contract.field(name).type is FieldType.STRING:
            strings[name] = inputs[name] = _objects(table.column(name))
        else:
            inputs[name] = pc.fill_null(table.column(name).cast(pa.float64()), np.nan).to_numpy()
    stored = np.empty((table.num_rows, len(use_case.view.stored)))
    for place, name in enumerate(use_case.view.stored):
        stored[:, place] = table.column(name).to_numpy()
    made = columns(use_case.view, stored, inputs, time_us)
    return Frame(time_us, table.column(LABEL).to_numpy(), strings[entity], made, strings)


def split(frame: Frame, model: ModelSpec) -> Parts:
    """Train, calibration and test by request time, backwards from the last; see ``spec.Split``.

    A row of an earlier part whose label time (request time plus horizon) is later than the first request time
    of the next part is left out. Raises ``ValueError`` naming a part that is empty.
    """
    horizon = microseconds(model.target.horizon)
    time = frame.time_us
    if not len(time):
        raise ValueError("there are no examples to split")
    test_from = int(time.max()) - microseconds(model.split.test)
    calibration_from = test_from - microseconds(model.split.calibration)
    test = time > test_from
    later = (time > calibration_from) & ~test
    calibration = later & (time + horizon <= _first(time, test, test_from))
    train = (time <= calibration_from) & (time + horizon <= _first(time, later, calibration_from))
    for name, rows in (("train", train), ("calibration", calibration), ("test", test)):
        if not rows.any():
            days = (time.max() - time.min()) / 86_400e6
            raise ValueError(
                f"the {name} part of the split is empty: the examples span {days:.1f} days, "
                f"split.calibration is {model.split.calibration}, split.test {model.split.test} "
                f"and the horizon {model.target.horizon}; load more history or shorten the split"
            )
    used = int(train.sum() + calibration.sum() + test.sum())
    return Parts(frame.take(train), frame.take(calibration), frame.take(test), len(time) - used)


def _first(time: np.ndarray, rows: np.ndarray, otherwise: int) -> int:
    return int(time[rows].min()) if rows.any() else otherwise


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=object)
