"""The differences of two versions against a naive list of them."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.validation.differences import QUANTILES, Case, compare

numbers = st.sampled_from([0.0, 1.0, 2.5, -3.0, 100.0, math.nan, math.inf])


def table(rows: list[tuple[str, float, float]]) -> pa.Table:
    """Rows by who answered; the other one of versions 1 and 2 said the other value."""
    return pa.table(
        {
            "prediction_id": [f"p{i}" for i in range(len(rows))],
            "entity": [f"e{i % 3}" for i in range(len(rows))],
            "_time": pa.array(range(len(rows)), pa.timestamp("us", "UTC")),
            "model_version": pa.array([row[0] for row in rows], pa.string()),
            "value": pa.array([row[1] for row in rows], pa.float64()),
            "other_version": pa.array(["1" if row[0] == "2" else "2" for row in rows], pa.string()),
            "other_value": pa.array([row[2] for row in rows], pa.float64()),
        }
    )


@given(st.lists(st.tuples(st.sampled_from(["1", "2"]), numbers, numbers), max_size=12), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_differences_are_those_of_a_list(rows, most) -> None:
    found = compare(table(rows), "2", most)
    wanted = []
    for place, (who, value, other) in enumerate(rows):
        tried, held = (value, other) if who == "2" else (other, value)
        if math.isfinite(tried - held):
            wanted.append(Case(f"p{place}", f"e{place % 3}", place, tried, held))
    if not wanted:
        assert found is None
        return
    assert found is not None
    sizes = [abs(case.tried - case.other) for case in wanted]
    assert found.instances == len(wanted)
    assert found.mean == pytest.approx(sum(case.tried - case.other for case in wanted) / len(wanted))
    assert found.quantiles == dict(zip(QUANTILES, np.quantile(sizes, QUANTILES).tolist(), strict=True))
    assert found.worst == tuple(sorted(wanted, key=lambda case: -abs(case.tried - case.other))[:most])
