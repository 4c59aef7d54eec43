"""What a version that is tried said differently: the distribution of the differences, and the worst cases by name.

They come from the log of predictions, which keeps what both versions said of every instance that both were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.features.served import predictions_table
from pipelines.spec import UseCase

QUANTILES = (0.5, 0.9, 0.99, 1.0)
_COLUMNS = ["prediction_id", "_time", "entity", "model_version", "value", "other_version", "other_value"]


@dataclass(frozen=True)
class Case:
    """One instance that both versions answered, as of ``at_us``: the version that is tried, and the other one."""

    prediction_id: str
    entity: str
    at_us: int
    tried: float
    other: float


@dataclass(frozen=True)
class Differences:
    """Of ``instances`` that both answered, the version that is tried less the other one, in the target's unit: the
    ``mean``, the ``quantiles`` of the absolute difference, and the cases in which it is largest, the worst first.
    """

    instances: int
    mean: float
    quantiles: dict[float, float]
    worst: tuple[Case, ...]


def read_differences(
    use_case: UseCase, tables: Tables, version: str, since_us: int, *, most: int = 10
) -> Differences | None:
    """The differences of ``version`` from ``since_us`` on, with at most ``most`` cases; None while there are none."""
    name = predictions_table(use_case)
    if not tables.exists(name):
        return None
    since = pa.scalar(since_us, pa.timestamp("us", tz="UTC"))
    mine = (pc.field("model_version") == version) | (pc.field("other_version") == version)
    both = pc.field("other_value").is_valid()
    return compare(
        tables.read(name, columns=_COLUMNS, filter=(pc.field("_time") >= since) & mine & both), version, most
    )


def compare(logged: pa.Table, version: str, most: int) -> Differences | None:
    """``read_differences`` of rows in memory (``served.SERVED_SCHEMA``), each of which ``version`` answered too."""
    answered = pc.equal(logged.column("model_version"), version).to_numpy()
    value, other_value = (logged.column(name).to_numpy().astype(np.float64) for name in ("value", "other_value"))
    tried, other = np.where(answered, value, other_value), np.where(answered, other_value, value)
    with np.errstate(invalid="ignore"):
        difference = tried - other
    kept = np.flatnonzero(np.isfinite(difference))
    if not len(kept):
        return None
    difference = difference[kept]
    size = np.abs(difference)
    worst = kept[np.argsort(-size, kind="stable")[:most]]
    rows = logged.select(["prediction_id", "entity", "_time"]).take(pa.array(worst))
    named = zip(
        rows.column("prediction_id").to_pylist(),
        rows.column("entity").to_pylist(),
        rows.column("_time").cast(pa.int64()).to_pylist(),
        tried[worst].tolist(),
        other[worst].tolist(),
        strict=True,
    )
    quantiles = np.quantile(size, QUANTILES).tolist()
    return Differences(
        len(kept),
        float(difference.mean()),
        dict(zip(QUANTILES, quantiles, strict=True)),
        tuple(Case(*case) for case in named),
    )
