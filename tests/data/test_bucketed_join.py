"""The join with a bucketed table on disk against the naive loop over all its rows, in one process."""

from __future__ import annotations

import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.features.asof import join_latest
from pipelines.features.bucketed_join import join_bucketed
from tests.data.asof_oracle import BASE, BY_KEY, REQUEST, ROW, Row, naive, skewed, stored, tables


@given(
    requests=st.lists(REQUEST, min_size=10, max_size=30),
    loads=st.lists(st.lists(ROW, min_size=10, max_size=30), min_size=1, max_size=2),
    ttl=st.sampled_from([None, 0, 250_000, 750_000]),
    knowledge=st.booleans(),
    ordered=st.booleans(),
    task_rows=st.integers(1, 12),
    random=st.randoms(use_true_random=False),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_every_request_sees_the_row_that_a_loop_over_the_table_finds(
    requests, loads, ttl, knowledge, ordered, task_rows, random
) -> None:
    rows: list[Row] = [row for load in loads for row in load]
    left, right = tables(requests, rows)
    right = right.append_column("order", pa.array(random.sample(range(len(rows)), len(rows)), pa.int64()))
    parts = [right.slice(0, len(loads[0])), right.slice(len(loads[0]))][: len(loads)]
    with tempfile.TemporaryDirectory() as place:
        held = stored(Path(place), *parts)
        joined = join_bucketed(
            left,
            "readings",
            tables=held,
            settings=Settings(home=Path(place), buckets=3, task_rows=task_rows),
            ttl=None if ttl is None else timedelta(microseconds=ttl),
            known_at="known" if knowledge else None,
            order="order" if ordered else None,
            **BY_KEY,
        )
        numbers = held.read("readings").column("number").to_pylist()
    if ordered:
        numbers = sorted(numbers, key=right.column("order").to_pylist().__getitem__)
    found = naive(requests, [rows[number] for number in numbers], ttl, knowledge=knowledge)
    assert joined.select(left.column_names).equals(left)
    assert joined.column("number").to_pylist() == [None if place is None else numbers[place] for place in found]


def test_a_busy_key_is_cut_into_tasks_of_bounded_size(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = tables(*skewed(20, 4_000))
    held = stored(home / "tables", right.sort_by([("key", "ascending"), ("at", "ascending")]))
    read, sizes = Tables.read, Counter[int]()

    def counting(self: Tables, *arguments: object, **options: object) -> pa.Table:
        rows = read(self, *arguments, **options)
        if "number" in rows.column_names:  # not what planning reads
            sizes[rows.num_rows] += 1
        return rows

    monkeypatch.setattr(Tables, "read", counting)
    settings = Settings(home=home, buckets=3, task_rows=500)
    joined = join_bucketed(left, "readings", tables=held, settings=settings, known_at="known", **BY_KEY)
    assert sum(sizes.values()) >= 8
    assert max(sizes) < 2 * settings.task_rows
    whole = held.read("readings")
    assert joined.equals(join_latest(left, whole, known_at="known", **BY_KEY))


def test_a_table_made_with_another_number_of_buckets_is_refused(home: Path) -> None:
    rows = [{"key": name, "at": BASE, "delay": 0} for name in "abcdefgh"]
    left, right = tables(rows, rows)
    held = stored(home / "tables", right, buckets=4)
    for buckets in (2, 3, 8):
        with pytest.raises(ValueError, match=rf"does not fit {buckets} buckets: set TIDEGATE_BUCKETS"):
            join_bucketed(left, "readings", tables=held, settings=Settings(home=home, buckets=buckets), **BY_KEY)


def test_an_older_version_and_requests_by_name(home: Path) -> None:
    left, right = tables(
        [{"key": "a", "at": BASE + 1}, {"key": "z", "at": BASE}], [{"key": "a", "at": BASE, "delay": 0}] * 2
    )
    held = stored(home / "tables", right.slice(0, 1), right.slice(1))
    held.ensure("asked", left.schema)
    held.append("asked", left, "x")
    old = join_bucketed("asked", "readings", tables=held, settings=Settings(home=home, buckets=3), version=1, **BY_KEY)
    assert old.column("mine").to_pylist() == [0, 1]
    assert old.column("number").to_pylist() == [0, None]


def test_what_cannot_be_joined_by_bucket_is_refused(home: Path) -> None:
    left, right = tables([{"key": "a", "at": BASE}], [{"key": "a", "at": BASE, "delay": 0}])
    held, options = stored(home / "tables", right), {"settings": Settings(home=home, buckets=3), "entity": "key"}
    with pytest.raises(ValueError, match=r"rows .* lack \['price'\]"):
        join_bucketed(left, "readings", tables=held, time="at", columns=["price"], **options)
    held.ensure("plain", right.schema)
    held.append("plain", right, "x")
    with pytest.raises(ValueError, match="not partitioned by '_bucket'"):
        join_bucketed(left, "plain", tables=held, time="at", columns=["number"], **options)
