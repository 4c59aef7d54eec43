"""Two versions on the same instances: the difference of their losses by day, once outcomes have matured.

The loss is the absolute error in units of the champion's interval half-width, so that districts, areas or homes of
very different size count alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.features.served import outcomes_table, predictions_table
from pipelines.spec import UseCase
from pipelines.spec.base import DAY_US, microseconds

_COLUMNS = [
    "prediction_id", "_time", "model_version", "value", "lower", "upper",
    "other_version", "other_value", "other_lower", "other_upper",
]  # fmt: skip


@dataclass(frozen=True)
class PairedDay:
    """A complete UTC day (days since 1970): over how many instances, and the mean of the challenger's loss less the
    champion's. ``missed`` is the share of outcomes outside the challenger's interval less that of the champion's; 0 in
    journals from before it was measured.
    """

    day: int
    instances: int
    difference: float
    missed: float = 0.0


def paired_days(
    use_case: UseCase, tables: Tables, *, champion: str, challenger: str, since_us: int, now_us: int, grace_us: int
) -> tuple[PairedDay, ...]:
    """Every complete day after ``since_us`` on which both versions answered instances whose outcomes are known.

    A day is complete when it is ``grace_us`` past the time at which its last outcome was due, by ``now_us`` and by the
    newest outcome in the table as well: what was not moved there yet cannot be counted. The first day counts from
    ``since_us`` on. Moments in microseconds.
    """
    names = predictions_table(use_case), outcomes_table(use_case)
    if not all(tables.exists(name) for name in names):
        return ()
    outcomes = tables.read(
        names[1], columns=["prediction_id", "value", "at"], filter=pc.field("at") >= _instant(since_us)
    )
    newest = pc.max(outcomes.column("at").cast(pa.int64())).as_py() or 0
    last = complete_days(use_case, min(now_us, newest), grace_us)
    if since_us >= last * DAY_US:
        return ()
    window = (pc.field("_time") >= _instant(since_us)) & (pc.field("_time") < _instant(last * DAY_US))
    logged = tables.read(names[0], columns=_COLUMNS, filter=window & pc.field("other_value").is_valid())
    return compare(logged, outcomes, champion=champion, challenger=challenger)


def compare(logged: pa.Table, outcomes: pa.Table, *, champion: str, challenger: str) -> tuple[PairedDay, ...]:
    """``paired_days`` of tables in memory; see ``served.SERVED_SCHEMA`` and ``OUTCOME_SCHEMA``."""
    place = pc.index_in(logged.column("prediction_id"), value_set=outcomes.column("prediction_id").combine_chunks())
    logged = logged.filter(pc.is_valid(place))
    actual = outcomes.column("value").take(pc.drop_null(place)).to_numpy()
    champions = _pair(logged, champion, challenger)
    challengers = _pair(logged, challenger, champion)
    value, its, lower, upper, other_lower, other_upper = (
        logged.column(name).to_numpy()
        for name in ("value", "other_value", "lower", "upper", "other_lower", "other_upper")
    )
    sign = np.select([champions, challengers], [1.0, -1.0], 0.0)
    half = np.where(champions, upper - lower, other_upper - other_lower) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = sign * (np.abs(its - actual) - np.abs(value - actual)) / half
        outside = ((actual < lower) | (actual > upper)).astype(np.float64)
        other_outside = ((actual < other_lower) | (actual > other_upper)).astype(np.float64)
    missed = sign * (other_outside - outside)
    day = logged.column("_time").cast(pa.int64()).to_numpy() // DAY_US
    keep = (sign != 0) & np.isfinite(difference)
    difference, missed, day = difference[keep], missed[keep], day[keep]
    return tuple(
        PairedDay(int(one), int(here.sum()), float(difference[here].mean()), float(missed[here].mean()))
        for one in np.unique(day)
        if (here := day == one).any()
    )


def complete_days(use_case: UseCase, now_us: int, grace_us: int) -> int:
    """The first UTC day (days since 1970) whose outcomes were not all due ``grace_us`` before ``now_us``."""
    return (now_us - microseconds(use_case.model.target.horizon) - grace_us) // DAY_US


def _pair(logged: pa.Table, answered: str, other: str) -> np.ndarray:
    """bool [n]: where ``answered`` answered and ``other`` did not."""
    both = pc.and_(pc.equal(logged.column("model_version"), answered), pc.equal(logged.column("other_version"), other))
    found: np.ndarray = pc.fill_null(both, False).to_numpy()
    return found


def _instant(moment_us: int) -> pa.Scalar:
    return pa.scalar(moment_us, pa.timestamp("us", tz="UTC"))
