"""What is made of a field: by the page alone, against what a view computes when only that field is another."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines import usecases
from pipelines.contracts.lineage import lineage
from pipelines.features import derived
from pipelines.features.windows import pages
from pipelines.spec import FieldType


@pytest.mark.parametrize("name", ["aqua", "prop"])
def test_a_derived_column_is_used_exactly_where_it_changes_with_the_field(name) -> None:
    """Stored columns of a field and its input are changed together; what then differs is what is made of it."""
    page = usecases.load(name)
    view, contract = page.view, page.contract
    uses = {use.field: use.columns for use in lineage(page) if use.view == next(iter(pages(page)))}
    rng, time_us = np.random.default_rng(5), np.full(50, 1_700_000_000_000_000)
    numbers = [n for n in view.inputs if contract.field(n).type is not FieldType.STRING]
    stored = rng.uniform(1.0, 9.0, (50, len(view.stored)))
    inputs = {n: rng.uniform(1.0, 9.0, 50) for n in numbers}
    before = derived.columns(view, stored, inputs, time_us)
    made = {found.name for found in view.derived}
    for field in contract.fields:
        if field.name in (contract.entity, contract.time):
            continue
        columns = set(uses.get(field.name, ()))
        mine = [place for place, column in enumerate(view.stored) if column in columns]
        other = stored.copy()
        other[:, mine] += rng.uniform(1.0, 2.0, (50, len(mine)))
        changed = {n: values + (1.5 if n == field.name else 0.0) for n, values in inputs.items()}
        after = derived.columns(view, other, changed, time_us)
        differs = {n for n in made if not np.array_equal(before[n], after[n], equal_nan=True)}
        assert differs == columns & made, field.name


def test_every_stored_column_but_those_of_others_is_made_of_a_field_and_of_the_time() -> None:
    for name in usecases.names():
        page = usecases.load(name)
        uses = [use for use in lineage(page) if use.view == next(iter(pages(page)))]
        by_field = {use.field: set(use.columns) for use in uses}
        for role in (page.contract.entity, page.contract.time):
            assert set(page.view.stored) <= by_field[role]
        plain = {f: c for f, c in by_field.items() if f not in (page.contract.entity, page.contract.time)}
        assert set(page.view.stored) <= set().union(*plain.values())
        for near in page.view.neighbours:
            for field in near.asked:
                assert set(near.features) <= plain[field], "it says who is a neighbour"
        target = page.model.target.field
        assert f"target {target}" in by_field[target]


def test_columns_come_in_the_order_of_the_view_and_a_field_that_nobody_uses_has_none() -> None:
    page = usecases.load("aqua")
    (view,) = {use.view for use in lineage(page)}
    assert view == next(iter(pages(page)))
    order = [*page.view.stored, *page.view.inputs, *page.view.calendar_columns, *(d.name for d in page.view.derived)]
    for use in lineage(page):
        places = [order.index(column) for column in use.columns if column in order]
        assert places == sorted(places)
    assert "humidity" not in {use.field for use in lineage(page)}
