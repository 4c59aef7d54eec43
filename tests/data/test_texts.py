"""The distinct short texts of a column are those that a loop finds, wherever they lie in its buffers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import rows, texts
from pipelines.contracts.texts import distinct_texts
from pipelines.spec import Contract, Field, FieldType

SHORT = st.text(max_size=7).filter(lambda text: len(text.encode()) <= 7)
VALUES = st.lists(
    st.none()
    | st.sampled_from(["a", "a\0", "", "\0", "\x7f\x7f\x7f\x7f\x7f\x7f\x7f", "é", "abcdef", "abcdefg"])
    | SHORT,
    max_size=30,
)


@pytest.fixture(autouse=True)
def always(monkeypatch) -> None:
    monkeypatch.setattr(texts, "LEAST_ROWS", 1)


@given(VALUES, st.integers(0, 5), st.integers(0, 5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_codes_stand_for_the_values_that_were_there(values, before, after, padded) -> None:
    column = pa.array([*(["before"] * before), *values, *(["later"] * after)], pa.string())
    if not padded:  # a buffer that ends with its last text
        valid, offsets, data = column.buffers()
        size = np.frombuffer(offsets, np.int32)[len(column)]
        column = pa.Array.from_buffers(
            pa.string(), len(column), [valid, offsets, pa.py_buffer(bytes(data or b"")[:size])]
        )
    column = column.slice(before, len(values))
    found = distinct_texts(column)
    if found is None:
        assert not values or column.buffers()[2].size < 8
        return
    codes, distinct = found
    assert len(set(distinct)) == len(distinct)
    shown = [distinct[code] for code in codes.tolist()]
    assert [text for text, value in zip(shown, values, strict=True) if value is not None] == [
        value for value in values if value is not None
    ]


def test_bytes_under_a_null_are_those_of_whoever_has_them_as_well() -> None:
    parts = pa.StructArray.from_arrays([pa.array(["abc", "abc", "xyz", "zzz"] * 3)], ["s"])
    masked = pa.StructArray.from_buffers(
        parts.type, 12, [pa.array([False, True, True, True] * 3).buffers()[1]], children=[parts.field(0)]
    )
    column = masked.flatten()[0]
    assert column.null_count == 3
    found = distinct_texts(column)
    assert found is not None
    codes, distinct = found
    there = zip(codes.tolist(), column.is_valid().to_pylist(), strict=True)
    assert [distinct[code] for code, valid in there if valid] == ["abc", "xyz", "zzz"] * 3


def test_many_empty_texts_at_the_end_cost_no_more_than_others() -> None:
    column = pa.array(["abcdefg", "hi"] + [""] * 100_000 + [None] * 100_000)
    found = distinct_texts(column)
    assert found is not None
    assert set(found[1]) == {"abcdefg", "hi", ""}


def test_longer_texts_and_too_many_different_ones_are_left_to_arrow(monkeypatch) -> None:
    assert distinct_texts(pa.array(["short", "rather l"])) is None
    many = pa.array([f"{i:07d}" for i in range(70_000)])
    assert distinct_texts(many) is None
    assert distinct_texts(many.slice(0, 60_000)) is not None
    monkeypatch.setattr(texts, "LEAST_ROWS", 100)
    assert distinct_texts(pa.array(["a"] * 99)) is None


def test_many_rows_are_judged_like_few(monkeypatch) -> None:
    contract = Contract(
        name="c", version="1.0.0", owner="o", entity="who", time="at", key=("who", "at"),
        fields=(
            Field(name="who", type=FieldType.STRING, pattern="m[0-9]+", min_length=3),
            Field(name="at", type=FieldType.TIMESTAMP),
            Field(name="f", type=FieldType.FLOAT, nullable=True, minimum=-1, maximum=1),
            Field(name="n", type=FieldType.INTEGER, nullable=True, maximum=90),
        ),
    )  # fmt: skip
    draw, count = np.random.default_rng(1), 5_000
    f = draw.normal(size=count)
    f[draw.random(count) < 0.05] = np.nan
    f[draw.random(count) < 0.05] = np.inf
    gone = draw.random(count) < 0.3
    table = pa.table({
        "who": pa.array([f"m{i}" for i in draw.integers(0, 50, count)]),
        "at": pa.array(np.arange(count)).cast(pa.timestamp("us", "UTC")),
        "f": pa.array(f, mask=gone),
        "n": pa.array(draw.integers(0, 100, count), mask=gone),
    })  # fmt: skip
    monkeypatch.setattr(rows, "_THREADED_ROWS", 1_000)
    whole = rows.check(contract, rows.from_arrow(contract, table), count)
    monkeypatch.setattr(texts, "LEAST_ROWS", 10_000)
    at = 0
    for size in (1, 999, 1_500, 2_500):
        part = rows.check(contract, rows.from_arrow(contract, table.slice(at, size)), count)
        assert [whole.rules_of(at + i) for i in range(size)] == [part.rules_of(i) for i in range(size)]
        at += size
    assert {broken.rule for broken in whole.broken} == {
        "who.min_length",
        "f.finite",
        "f.minimum",
        "f.maximum",
        "n.maximum",
    }
