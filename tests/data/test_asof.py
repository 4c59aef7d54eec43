"""The point-in-time join against a naive loop over all rows."""

from __future__ import annotations

from datetime import timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.asof import join_latest
from tests.data.asof_oracle import BASE, BY_KEY, REQUEST, ROW, naive, tables


@given(
    st.lists(REQUEST, max_size=12),
    st.lists(ROW, max_size=25),
    st.sampled_from([None, 0, 250_000, 750_000]),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_every_request_sees_the_row_that_a_loop_over_all_rows_finds(requests, rows, ttl, knowledge) -> None:
    left, right = tables(requests, rows)
    joined = join_latest(
        left,
        right,
        entity="key",
        time="at",
        columns=["number"],
        ttl=None if ttl is None else timedelta(microseconds=ttl),
        known_at="known" if knowledge else None,
    )
    assert joined.column("mine").to_pylist() == list(range(len(requests)))
    assert joined.column("number").to_pylist() == naive(requests, rows, ttl, knowledge=knowledge)


def test_among_rows_of_one_time_the_greatest_order_is_seen() -> None:
    left, right = tables([{"key": "a", "at": BASE}], [{"key": "a", "at": BASE, "delay": 0}] * 3)
    right = right.append_column("order", pa.array([5, 9, 7]))
    assert (
        join_latest(left, right, entity="key", time="at", columns=["number"], order="order")["number"][0].as_py() == 1
    )


def test_times_may_have_other_units_and_zones() -> None:
    left, right = tables([{"key": "a", "at": BASE + 250_000}], [{"key": "a", "at": BASE, "delay": 0}])
    rome = right.set_column(1, "at", right.column("at").cast(pa.timestamp("ms", "Europe/Rome")))
    plain = left.set_column(1, "at", left.column("at").cast(pa.timestamp("ns", "UTC")).cast(pa.timestamp("ns")))
    assert join_latest(plain, rome, entity="key", time="at", columns=["number"])["number"].to_pylist() == [0]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"columns": ["price"]}, r"rows .* lack \['price'\]"),
        ({"time": "when"}, r"requests .* lack \['when'\]"),
        ({"columns": ["key"]}, r"both have \['key'\]"),
        ({"time": "mine"}, "lack"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changed: dict, complaint: str) -> None:
    left, right = tables([{"key": "a", "at": BASE}], [{"key": "a", "at": BASE, "delay": 0}])
    with pytest.raises(ValueError, match=complaint):
        join_latest(left, right, **{"entity": "key", "time": "at", "columns": ["number"]} | changed)
    numbers = left.set_column(0, "key", pa.array([1]))
    with pytest.raises(ValueError, match="int64 in the requests"):
        join_latest(numbers, right, entity="key", time="at", columns=["number"])


def test_when_the_clocks_go_back_the_same_wall_clock_is_two_moments() -> None:
    rome = pa.timestamp("us", "Europe/Rome")
    # 2024-10-27 02:30 in Rome, in summer time and an hour later in winter time.
    summer, winter = 1_729_989_000_000_000, 1_729_992_600_000_000
    rows = pa.table({"key": ["a", "a"], "at": pa.array([summer, winter]).cast(rome), "number": [1, 2]})
    asked = [summer - 1, summer, winter - 1, winter]
    requests = pa.table({"key": ["a"] * 4, "at": pa.array(asked).cast(rome)})
    found = join_latest(requests, rows, **BY_KEY)
    assert found.column("number").to_pylist() == [None, 1, 1, 2]
    hour = join_latest(requests.slice(2), rows.slice(0, 1), ttl=timedelta(hours=1), **BY_KEY)
    assert hour.column("number").to_pylist() == [1, 1]
    less = join_latest(requests.slice(2), rows.slice(0, 1), ttl=timedelta(minutes=59), **BY_KEY)
    assert less.column("number").to_pylist() == [None, None]
