"""Dimensions of the past against the naive look-up; what a page may say of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from pipelines.contracts.events import from_microseconds
from pipelines.features.dimensions import look_up
from pipelines.features.kernels import layout
from pipelines.features.windows import view_fingerprint
from pipelines.spec import Dimension, UseCase
from tests.data.profiles import DAY, KIND, PROFILE, Asked, Fact, expected, made_case, table, worlds
from tests.data.worlds import BASE, same_bits

CASE = made_case()


@given(worlds())
@settings(max_examples=200, deadline=None)
def test_the_look_up_finds_what_looking_at_every_row_finds(world: tuple[list[Fact], list[Asked]]) -> None:
    facts, requests = world
    times, cuts = (np.array([getattr(r, what) for r in requests], np.int64) for what in ("now", "cut"))
    known = np.arange(1, len(facts) + 1)
    found = look_up(PROFILE, table(facts), known, [r.key for r in requests], times, cuts)
    for row, request in enumerate(requests):
        values, since = expected(facts, request)
        assert same_bits(found.values[:, row], values)
        assert found.newest[row] == (layout.EMPTY if since is None else since)


def test_what_is_looked_up_is_part_of_the_view_s_version() -> None:
    changes = [{"columns": ("people",)}, {"name": "other"}, {"key": "sort"}]
    views = [CASE.view.model_copy(update={"dimensions": (PROFILE.model_copy(update=c), KIND)}) for c in changes]
    versions = {view_fingerprint(view, CASE.contract) for view in (*views, CASE.view)}
    assert len(versions) == len(changes) + 1
    older = CASE.view.model_copy(update={"dimensions": (PROFILE.model_copy(update={"ttl": DAY}), KIND)})
    assert view_fingerprint(older, CASE.contract) in versions  # a status is no value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ()}, "must be given, each once"),
        ({"columns": ("people", "people")}, "must be given, each once"),
        ({"columns": ("revision",)}, "column 'revision' must be a number"),
    ],
)
def test_a_dimension_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    parts = {name: getattr(PROFILE, name) for name in Dimension.model_fields}
    with pytest.raises(ValidationError, match=message):
        Dimension(**{**parts, **change})


@pytest.mark.parametrize(
    ("key", "message"), [("colour", "must be the entity or an input"), ("level", "must be a string")]
)
def test_a_page_whose_dimension_does_not_fit_is_refused(key: str, message: str) -> None:
    parts = {name: getattr(CASE, name) for name in UseCase.model_fields}
    odd = PROFILE.model_copy(update={"key": key})
    view = CASE.view.model_copy(update={"dimensions": (odd, KIND), "inputs": ("sort", "level")})
    with pytest.raises(ValidationError, match=message):
        UseCase(**{**parts, "view": view})


def test_of_two_rows_that_hold_from_one_time_the_one_known_later_is_the_correction() -> None:
    at = from_microseconds(BASE)
    told = [{"revision": f"r{i}", "who": "a", "since": at, "people": i, "pipes": None, "open": None} for i in range(9)]
    for order in (range(9), range(8, -1, -1)):
        rows = table([Fact(told[i], BASE + place) for place, i in enumerate(order)])
        now = np.array([BASE + 100] * 2)
        found = look_up(PROFILE, rows, np.arange(1, 10), ["a", "a"], now, np.array([9, 4]))
        assert found.values[0].tolist() == [float(order[8]), float(order[3])]
