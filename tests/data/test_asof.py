"""The point-in-time join against a naive loop over all rows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts.events import INSTANT
from pipelines.features.asof import join_latest

BASE = 1_700_000_000_000_000
Row = dict[str, Any]

_KEYS = st.sampled_from(["a", "b", "c", None])
# Near each other, so that ties, edges of the time to live and later knowledge happen often.
_TIMES = st.one_of(st.none(), st.integers(0, 12)).map(lambda t: None if t is None else BASE + t * 250_000)
_ROWS = st.lists(
    st.fixed_dictionaries({"key": _KEYS, "at": _TIMES, "delay": st.sampled_from([0, 0, 1, 500_000, 3_000_000, None])}),
    max_size=25,
)
_REQUESTS = st.lists(st.fixed_dictionaries({"key": _KEYS, "at": _TIMES}), max_size=12)


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


@given(_REQUESTS, _ROWS, st.sampled_from([None, 0, 250_000, 750_000]), st.booleans())
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
