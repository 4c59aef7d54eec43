"""Six folds over rolling windows, read at every event, against polars' rolling aggregations in the same process.

Both sides get their columns in memory, in order, and return new columns; throughput is events per second of processor
time. Tidegate's window advances its tail by its hop and also writes a status for every value, polars' is exact and has
none. At an event that begins a tile both hold the same events, and with a hop of one minute at every event: there
they are compared.
"""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import polars as pl

from pipelines.features.sweep import Reads, Swept, sweep
from pipelines.features.windows import EventColumns, compile_plan
from pipelines.spec import Fold
from pipelines.spec.base import microseconds
from tests.benchmarks.features.worlds import BASE, CONTRACT, DAY, HOUR, MINUTE, MINUTE_US, readings, view
from tests.benchmarks.harness import Incomparable, in_turn, say

FOLDS = (Fold.COUNT, Fold.SUM, Fold.MEAN, Fold.MIN, Fold.MAX, Fold.STD)


def figures(rows: int = 10_000_000, sensors: int = 100, rounds: int = 7) -> dict[str, float]:
    """``windows_vs_polars_per_core`` and the like: how many times polars' throughput per core."""
    dense = readings(sensors, rows // sensors, MINUTE_US)
    hour, hour_rate = _against_polars("1 h, one a minute", dense, HOUR, 5 * MINUTE, rounds)
    day, day_rate = _against_polars("24 h, one a minute", dense, DAY, HOUR, rounds)
    exact, _ = _against_polars("1 h, one a minute, tail exact too", dense, HOUR, MINUTE, rounds)
    del dense
    sparse = readings(sensors, rows // sensors, 10 * MINUTE_US)
    seldom, _ = _against_polars("24 h, one in ten minutes", sparse, DAY, HOUR, rounds)
    return {
        "windows_vs_polars_per_core": hour,
        "windows_sparse_vs_polars_per_core": seldom,
        "windows_24h_vs_polars_per_core": day,
        "windows_exact_vs_polars_per_core": exact,
        "windows_rows_per_s": hour_rate,
        "window_24h_vs_1h": day_rate / hour_rate,
    }


def _against_polars(
    title: str, events: EventColumns, length: timedelta, hop: timedelta, rounds: int
) -> tuple[float, float]:
    plan = compile_plan(view((length, hop), folds=FOLDS), CONTRACT)
    reads = Reads(events.entities, events.times, events.times)
    frame = pl.DataFrame(
        {
            "sensor": events.entities.astype(np.int32),
            "at": events.times.astype("datetime64[us]"),
            "flow": events.values[:, 0],
        }
    )

    def ours() -> Swept:
        return sweep(plan, events, events.times, reads)

    def theirs() -> pl.DataFrame:
        flow = pl.col("flow")
        return frame.rolling("at", period=length, closed="both", group_by="sensor").agg(
            pl.len().alias("count"),
            flow.sum().alias("sum"),
            flow.mean().alias("mean"),
            flow.min().alias("min"),
            flow.max().alias("max"),
            flow.std().alias("std"),
        )

    same = (events.times - BASE) % microseconds(hop) == 0
    _compare(title, ours().values[same], theirs().select(list(map(str, FOLDS))).to_numpy()[same])
    spent = in_turn({"tidegate": ours, "polars": theirs}, rounds)
    rates = {name: len(events.times) / took.cpu_s for name, took in spent.items()}
    say(f"{title}: " + ", ".join(f"{name} {rate / 1e6:.1f} M rows/s a core" for name, rate in rates.items()))
    return rates["tidegate"] / rates["polars"], rates["tidegate"]


def _compare(title: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    far = np.abs(ours - theirs) > 1e-9 * np.maximum(np.abs(theirs), 1.0)
    wrong = (np.isnan(ours) != np.isnan(theirs)) | (far & ~np.isnan(ours))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise Incomparable(f"{title}: {FOLDS[column]} is {ours[row, column]} here and {theirs[row, column]} in polars")
