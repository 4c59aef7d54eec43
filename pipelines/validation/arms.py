"""The arms of an A/B test: what units that were assigned to each version made of it, once outcomes are known.

A unit counts in the arm it was assigned to, also where the champion had to answer in a variant's place: taking those
out would compare a version on its good days with another on all days.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.features.served import outcomes_table, predictions_table
from pipelines.spec import ABTest, Measure, UseCase
from pipelines.statistics.asymptotic import Sample

_COLUMNS = ["prediction_id", "unit", "assigned", "value"]
# Beyond it sums of squares would overflow, and one outcome without any sense would be the end of a test.
_LARGEST = 1e100


@dataclass(frozen=True)
class Arm:
    """What is known of the units that were assigned to a version; their ``predictions`` have outcomes."""

    version: str
    predictions: int
    sample: Sample


def read_arms(use_case: UseCase, tables: Tables, test: ABTest, number: int, since_us: int) -> tuple[Arm, ...]:
    """The arms of the test of that ``number``, which began at ``since_us``, with the outcomes in the table by now."""
    names = predictions_table(use_case), outcomes_table(use_case)
    if not all(tables.exists(name) for name in names) or "unit" not in tables.schema(names[0]).names:
        return ()
    since = pa.scalar(since_us, pa.timestamp("us", tz="UTC"))
    logged = tables.read(names[0], columns=_COLUMNS, filter=(pc.field("_time") >= since) & (pc.field("test") == number))
    outcomes = tables.read(names[1], columns=["prediction_id", "value", "at"], filter=pc.field("at") >= since)
    return summarise(logged, outcomes, test)


def summarise(logged: pa.Table, outcomes: pa.Table, test: ABTest) -> tuple[Arm, ...]:
    """The arms that have any outcome, by version; tables as ``served.SERVED_SCHEMA`` and ``OUTCOME_SCHEMA`` say.

    Of several outcomes of a prediction the first one counts, and a unit counts by the mean of its predictions, which
    may be those of a request that was repeated. A prediction without an answer says nothing, nor does an outcome that
    is no number, or one of more than 1e100.
    """
    reported = outcomes.sort_by("at").group_by("prediction_id", use_threads=False)
    first = reported.aggregate([("value", "first", pc.ScalarAggregateOptions(skip_nulls=False))])
    place = pc.index_in(logged.column("prediction_id"), value_set=first.column("prediction_id").combine_chunks())
    logged = logged.filter(pc.is_valid(place))
    measured = first.column("value_first").take(pc.drop_null(place)).to_numpy().astype(np.float64)
    if test.measure is Measure.LOSS:
        with np.errstate(invalid="ignore", over="ignore"):
            measured = np.abs(logged.column("value").to_numpy() - measured)
    kept = logged.column("assigned").is_valid().to_numpy() & (np.abs(measured) <= _LARGEST)
    rows = pa.table({"version": logged.column("assigned"), "unit": logged.column("unit"), "measured": measured})
    rows = rows.filter(pa.array(kept))
    units = rows.group_by(["version", "unit"]).aggregate([("measured", "mean"), ("measured", "count")])
    found = []
    for version in sorted(pc.unique(units["version"]).to_pylist()):
        own = units.filter(pc.equal(units["version"], version))
        means = own["measured_mean"].to_numpy()
        variance = float(means.var(ddof=1)) if len(means) > 1 else 0.0
        found.append(
            Arm(version, pc.sum(own["measured_count"]).as_py(), Sample(len(means), float(means.mean()), variance))
        )
    return tuple(found)
