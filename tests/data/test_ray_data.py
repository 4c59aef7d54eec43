"""A contract on blocks of a Ray Data pipeline: every row keeps its place and gets all the rules that it breaks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts.events import contract_schema
from pipelines.contracts.ray_data import RULES, Judge, judged
from tests.data import contract_oracle as oracle


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_block_gets_the_rules_of_each_of_its_rows(data) -> None:
    contract = data.draw(oracle.contracts())
    records = [
        {f.name: oracle.typed(f, record.get(f.name)) for f in contract.fields}
        for record in data.draw(st.lists(oracle.records(contract), max_size=8))
        if isinstance(record, dict)
    ]
    table = pa.Table.from_pylist(records, schema=contract_schema(contract))
    found = Judge(contract, oracle.NOW_US)(table)
    assert found.column(RULES).to_pylist() == [oracle.record_rules(contract, record) for record in records]
    assert found.drop_columns([RULES]).equals(table)


@pytest.mark.timeout(180)
def test_no_row_is_lost_on_the_way_through_ray_data(ray_cluster) -> None:
    import ray

    contract = oracle.contract_of(oracle.Field(name="f", type=oracle.FieldType.FLOAT, minimum=0))
    values = np.random.default_rng(0).normal(size=10_000)
    times = pa.array([oracle.NOW_US] * len(values)).cast(pa.timestamp("us", "UTC"))
    rows = pa.table({"who": ["a"] * len(values), "at": times, "f": values})
    data = ray.data.from_arrow([rows.slice(0, 1), rows.slice(1, 6_000), rows.slice(6_001)])
    found = judged(data, contract, oracle.NOW_US).to_pandas()
    assert sorted(found["f"]) == sorted(values)
    assert [list(broken) for broken in found[RULES]] == [["f.minimum"] if f < 0 else [] for f in found["f"]]
