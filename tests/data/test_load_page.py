"""The page of a load is drawn whatever the numbers, names and records are."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from pipelines.contracts.events import contract_schema
from pipelines.contracts.page import load_page
from pipelines.spec import Contract, Field, FieldType


def contract(**field: Any) -> Contract:
    fields = (
        Field(name="who", type=FieldType.STRING),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="n", nullable=True, **{"type": FieldType.FLOAT, "unit": "$\\frac$", **field}),
    )
    return Contract(name="c", version="1.0.0", owner="o", fields=fields, entity="who", time="at", key=("who", "at"))


INTEGER, EXACT = {"type": FieldType.INTEGER}, {"type": FieldType.DECIMAL, "precision": 38, "scale": 0}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ({}, [1.7e308, -1.7e308, 0.0]),
        ({}, [1.0, 1.0 + 2.3e-16, 1.0]),
        ({}, [0.0, 0.0, -0.0]),
        ({}, [5e-324, 0.0, 1e-320]),
        ({}, [None, None, None]),
        (INTEGER, [10**17] * 3),
        (INTEGER, [1_700_000_000_000_000_000 + i for i in range(3)]),
        (INTEGER, [-(2**63), 2**63 - 1, 0]),
        (EXACT, [Decimal("9" * 38), Decimal(0), None]),
    ],
)
def test_numbers_of_any_size_are_drawn(field, values) -> None:
    given = contract(**field)
    schema = contract_schema(given)
    times = pa.array([0, -(10**13), 10**15]).cast(schema.field("at").type)
    table = pa.table([pa.array(["a"] * 3), times, pa.array(values, schema.field("n").type)], schema=schema)
    report = {
        "load_id": "<b>", "status": "published", "rows_in": 9, "accepted": 3, "quarantined": 6,
        "by_rule": {"price_in_$_or_$.unknown": 3, "$\\foo$.unknown": 2, "x" * 60 + "1": 1, "x" * 60 + "2": 1},
        "by_source": {"<i>.csv": {"rows_in": 9, "accepted": 3, "quarantined": 6}},
    }  # fmt: skip
    refused = [{"rules": ["<u>"], "source": "<i>.csv", "position": 1, "record": "</code><script>" + "y" * 999}]
    text = load_page(given, report, 0, table, refused)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<svg") == 3 - (values == [None] * 3 or values[0] == 1.7e308)
