"""One record at a time, as over HTTP: microseconds that 99 of 100 records stay below."""

from __future__ import annotations

import time

import numpy as np

from pipelines.contracts.requests import check_record, compile_model
from tests.benchmarks.contracts.data import CONTRACT, NOW_US, table
from tests.benchmarks.harness import Incomparable, say

RECORDS, BAD = 100_000, 0.1


def figures() -> dict[str, float]:
    """Of records of which a tenth breaks a rule or two and gets every one of them explained."""
    rows, broken = table(RECORDS, BAD)
    times = [moment.isoformat() for moment in rows.column("at").to_pylist()]
    records = [{**record, "at": at} for record, at in zip(rows.to_pylist(), times, strict=True)]
    model, took, refused = compile_model(CONTRACT), np.empty(RECORDS), np.empty(RECORDS, dtype=bool)
    for _ in range(2):  # the first time is not counted
        for i, record in enumerate(records):
            begun = time.perf_counter_ns()
            typed, _problems = check_record(model, record, NOW_US)
            took[i] = time.perf_counter_ns() - begun
            refused[i] = typed is None
    if not np.array_equal(refused, broken):
        raise Incomparable(f"{refused.sum()} records were refused of {broken.sum()}")
    fine, bad = np.percentile(took[~broken], (50, 99)) / 1e3, np.percentile(took[broken], (50, 99)) / 1e3
    say(
        f"  a record that is fine: {fine[0]:.1f} us, p99 {fine[1]:.1f}; one that is not: {bad[0]:.1f}, p99 {bad[1]:.1f}"
    )
    return {"request_us_p99": float(np.percentile(took, 99)) / 1e3}
