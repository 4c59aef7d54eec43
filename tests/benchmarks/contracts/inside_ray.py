"""Ten million rows in Ray Data: read and judged against read and passed on, one after the other in every round."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.contracts.ray_data import RULES, judged
from tests.benchmarks.contracts.data import CONTRACT, NOW_US, ROWS, table
from tests.benchmarks.harness import Incomparable, say

FILES, ROUNDS, BAD = 10, 5, 0.015


def figures() -> dict[str, float]:
    """What the contract adds to the pipeline, as a fraction."""
    import ray

    with tempfile.TemporaryDirectory() as place:
        bad = 0
        for i in range(FILES):
            rows, broken = table(ROWS, BAD, seed=i)
            bad += int(broken.sum())
            pq.write_table(rows, Path(place) / f"{i}.parquet")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        try:
            took: dict[str, list[float]] = {"judged": [], "passed on": []}
            for turn in range(ROUNDS + 1):
                for name in took:
                    begun = time.perf_counter()
                    data = ray.data.read_parquet(place)
                    data = judged(data, CONTRACT, NOW_US) if name == "judged" else _passed_on(data)
                    counts = data.map_batches(_count, batch_format="pyarrow", batch_size=None).take_all()
                    if turn:
                        took[name].append(time.perf_counter() - begun)
                    expected = (FILES * ROWS, bad if name == "judged" else 0)
                    if (sum(c["rows"] for c in counts), sum(c["refused"] for c in counts)) != expected:
                        raise Incomparable(f"{name}: {counts}")
        finally:
            ray.shutdown()
    median = {name: statistics.median(values) for name, values in took.items()}
    for name, one in median.items():
        say(f"  {FILES * ROWS:,} rows {name}: {one:.2f} s")
    return {"ray_overhead": median["judged"] / median["passed on"] - 1}


def _passed_on(data: object) -> object:
    return data.map_batches(lambda batch: batch, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)  # type: ignore[attr-defined]


def _count(batch: pa.Table) -> pa.Table:
    refused = 0
    if RULES in batch.column_names:
        refused = pc.sum(pc.greater(pc.list_value_length(batch.column(RULES)), 0)).as_py() or 0
    return pa.table({"rows": [batch.num_rows], "refused": [refused]})
