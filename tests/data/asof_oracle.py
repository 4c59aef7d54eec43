"""What a point-in-time join must find, by a loop over all rows, and small tables full of ties, edges and nulls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from cluster.tables import Tables
from pipelines.contracts.events import BUCKET, INSTANT, bucket_of

BASE = 1_700_000_000_000_000
Row = dict[str, Any]
BY_KEY: dict[str, Any] = {"entity": "key", "time": "at", "columns": ["number"]}

KEYS = st.sampled_from(["a", "b", "c", None])
# Near each other, so that ties, edges of the time to live and later knowledge happen often.
TIMES = st.one_of(st.none(), st.integers(0, 12)).map(lambda t: None if t is None else BASE + t * 250_000)
ROW = st.fixed_dictionaries({"key": KEYS, "at": TIMES, "delay": st.sampled_from([0, 0, 1, 500_000, 3_000_000, None])})
REQUEST = st.fixed_dictionaries({"key": KEYS, "at": TIMES})


def naive(requests: list[Row], rows: list[Row], ttl: int | None, *, knowledge: bool) -> list[int | None]:
    """The number of the row that each request sees, by looking at every row."""
    answer: list[int | None] = []
    for request in requests:
        best: tuple[int, int] | None = None
        for number, row in enumerate(rows):
            if None in (request["key"], request["at"], row["at"]) or row["key"] != request["key"]:
                continue
            if knowledge and (row["delay"] is None or row["at"] + row["delay"] > request["at"]):
                continue
            age = request["at"] - row["at"]
            if age >= 0 and (ttl is None or age <= ttl) and (best is None or (row["at"], number) > best):
                best = (row["at"], number)
        answer.append(None if best is None else best[1])
    return answer


def tables(requests: list[Row], rows: list[Row]) -> tuple[pa.Table, pa.Table]:
    known = [None if None in (r["at"], r["delay"]) else r["at"] + r["delay"] for r in rows]
    return (
        pa.table(
            {
                "key": pa.array([r["key"] for r in requests], pa.string()),
                "at": pa.array([r["at"] for r in requests], pa.int64()).cast(INSTANT),
                "mine": pa.array(range(len(requests)), pa.int64()),
            }
        ),
        pa.table(
            {
                "key": pa.array([r["key"] for r in rows], pa.string()),
                "at": pa.array([r["at"] for r in rows], pa.int64()).cast(INSTANT),
                "known": pa.array(known, pa.int64()).cast(INSTANT),
                "number": pa.array(range(len(rows)), pa.int64()),
            }
        ),
    )


def stored(home: Path, *loads: pa.Table, buckets: int = 3) -> Tables:
    """Tables of which ``readings`` holds the loads by bucket; each is committed by itself, in files of its own."""
    made = Tables(home.as_uri())
    for number, load in enumerate(loads):
        # Rows without a key lie in the first bucket.
        numbers = [0 if key is None else bucket_of(key, buckets) for key in load.column("key").to_pylist()]
        held = load.append_column(BUCKET, pa.array(numbers, pa.int32()))
        made.ensure("readings", held.schema, partition_by=[BUCKET])
        made.append("readings", held, f"load/{number}")
    return made


def skewed(keys: int, count: int) -> tuple[list[Row], list[Row]]:
    """Requests and rows of which nine of ten are of one key; rows of all keys at every moment, some known later."""
    rng = np.random.default_rng(3)
    names = np.where(
        rng.random(2 * count) < 0.9, "busy", np.char.add("k", rng.integers(0, keys, 2 * count).astype(str))
    )
    times = BASE + rng.integers(0, 1_000, 2 * count) * 250_000
    both = [{"key": str(k), "at": int(t), "delay": int(t) % 3 * 40_000_000} for k, t in zip(names, times, strict=True)]
    return both[:count], both[count:]
