"""Two versions on the same instances: the difference of their losses by day, once outcomes have matured.

The loss is the absolute error in units of the half-width of the interval that was answered, so that districts, areas
or homes of very different size count alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.features.served import outcomes_table, predictions_table
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds

_DAY_US = 86_400_000_000
_COLUMNS = ["prediction_id", "_time", "model_version", "value", "lower", "upper", "other_version", "other_value"]


@dataclass(frozen=True)
class PairedDay:
    """A complete UTC day (days since 1970): over how many instances, and the mean of the challenger's loss less the
    champion's.
    """

    day: int
    instances: int
    difference: float


def paired_days(
    use_case: UseCase, tables: Tables, *, champion: str, challenger: str, since_us: int, now_us: int, grace_us: int
) -> tuple[PairedDay, ...]:
    """Every complete day after ``since_us`` on which both versions answered instances whose outcomes are known.

    A day is complete when ``now_us`` is ``grace_us`` past the time at which its last outcome was due. The first day
    counts from ``since_us`` on. Moments in microseconds.
    """
    last = (now_us - microseconds(use_case.model.target.horizon) - grace_us) // _DAY_US  # the first incomplete day
    names = predictions_table(use_case), outcomes_table(use_case)
    if since_us >= last * _DAY_US or not all(tables.exists(name) for name in names):
        return ()
    window = (pc.field("_time") >= _instant(since_us)) & (pc.field("_time") < _instant(last * _DAY_US))
    logged = tables.read(names[0], columns=_COLUMNS, filter=window & pc.field("other_value").is_valid())
    outcomes = tables.read(names[1], columns=["prediction_id", "value"])
    return compare(logged, outcomes, champion=champion, challenger=challenger)


def compare(logged: pa.Table, outcomes: pa.Table, *, champion: str, challenger: str) -> tuple[PairedDay, ...]:
    """``paired_days`` of tables in memory; see ``served.SERVED_SCHEMA`` and ``OUTCOME_SCHEMA``."""
    place = pc.index_in(logged.column("prediction_id"), value_set=outcomes.column("prediction_id").combine_chunks())
    logged = logged.filter(pc.is_valid(place))
    actual = outcomes.column("value").take(pc.drop_null(place)).to_numpy()
    version = np.array(logged.column("model_version").to_pylist(), dtype=object)
    other = np.array(logged.column("other_version").to_pylist(), dtype=object)
    value, its = logged.column("value").to_numpy(), logged.column("other_value").to_numpy()
    half = (logged.column("upper").to_numpy() - logged.column("lower").to_numpy()) / 2
    sign = np.select(
        [(version == champion) & (other == challenger), (version == challenger) & (other == champion)], [1.0, -1.0], 0.0
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = sign * (np.abs(its - actual) - np.abs(value - actual)) / half
    day = logged.column("_time").cast(pa.int64()).to_numpy() // _DAY_US
    keep = (sign != 0) & np.isfinite(difference)
    difference, day = difference[keep], day[keep]
    return tuple(
        PairedDay(int(one), int((day == one).sum()), float(difference[day == one].mean())) for one in np.unique(day)
    )


def _instant(moment_us: int) -> pa.Scalar:
    return pa.scalar(moment_us, pa.timestamp("us", tz="UTC"))
