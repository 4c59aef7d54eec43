"""Neighbours of the past against the naive search; what a page may say of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.contracts.events import event_order, from_microseconds
from pipelines.features.kernels import nearest
from pipelines.features.neighbours import asked_of, points_of, search_past, searcher
from pipelines.features.windows import view_fingerprint
from pipelines.spec import FeatureView, Field, FieldType, Fold, Neighbours, UseCase
from tests.data.sales import ANY, BASE, CASE, CONTRACT, DAY, NEAR, VIEW, Asked, Sale, expected, table, worlds


def found(near: Neighbours, sales: list[Sale], requests: list[Asked]) -> np.ndarray:
    """Features of each request, [q, features], each seeing the first ``cut`` sales."""
    find = searcher(near, CONTRACT)
    points = points_of(find, CONTRACT, table(sales))
    asked = asked_of(near, {name: [r.inputs[name] for r in requests] for name in near.asked})
    times, cuts = (np.array([getattr(r, what) for r in requests], np.int64) for what in ("now", "cut"))
    return search_past(find, points, np.arange(1, len(sales) + 1), asked, times, cuts).values.T


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_the_search_finds_what_looking_at_every_sale_finds(world: tuple[list[Sale], list[Asked]]) -> None:
    sales, requests = world
    for near in (NEAR, ANY):
        made = found(near, sales, requests)
        wanted = np.array([expected(near, sales, request) for request in requests])
        np.testing.assert_allclose(made, wanted, rtol=1e-9, atol=1e-4)
        assert (made[:, 0] == wanted[:, 0]).all()


@given(st.floats(-180, 180), st.floats(-85, 85), st.floats(0, 2 * math.pi), st.floats(0, 1), st.floats(1, 100_000))
@settings(max_examples=500, deadline=None)
def test_every_place_within_the_radius_lies_in_a_cell_that_is_looked_at(
    longitude: float, latitude: float, bearing: float, share: float, radius: float
) -> None:
    step = radius / nearest.DEGREE_M
    north = latitude + math.sin(bearing) * share * step
    east = longitude + math.cos(bearing) * share * step / math.cos(math.radians(latitude))
    east = (east + 540.0) % 360.0 - 180.0
    cells = np.empty(nearest.MOST_CELLS, np.int64)
    count = nearest.around(longitude, latitude, step, cells)
    named = cells[:count].tolist()
    assert len(set(named)) == count
    assert nearest.cell(east, north, step) in named


def test_distances_are_those_on_the_earth() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        latitude, longitude = rng.uniform(-60, 60), rng.uniform(-180, 180)
        north, east = latitude + rng.normal(0, 0.05), (longitude + rng.normal(0, 0.05) + 540) % 360 - 180
        told = {"size": 1.0, "kind": "house"}
        sale = Sale(
            {
                "sale": "s",
                "area": "a",
                "at": from_microseconds(BASE),
                "price": 1.0,
                "longitude": east,
                "latitude": north,
                **told,
            },
            BASE,
        )
        request = Asked(1, BASE, {"longitude": longitude, "latitude": latitude, **told})
        (count, metres) = found(ANY, [sale], [request])[0]
        a, b, c = (math.radians(x) for x in (latitude, north, east - longitude))
        haversine = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(c / 2) ** 2
        assert count == 1
        assert metres == pytest.approx(2 * 6_371_008.8 * math.asin(math.sqrt(haversine)), rel=5e-3)


def view_of(**changes: object) -> FeatureView:
    return VIEW.model_copy(update={"neighbours": (NEAR.model_copy(update=changes), ANY)})


def test_what_is_searched_for_is_part_of_the_view_s_version() -> None:
    base = view_fingerprint(VIEW, CONTRACT)
    changes = [
        {"k": 4}, {"within": 21 * DAY}, {"radius": 5_001.0}, {"match": ()}, {"similar": (("size", 1.6),)},
        {"fields": ("price",)}, {"folds": (Fold.MEAN,)},
    ]  # fmt: skip
    versions = {view_fingerprint(view_of(**change), CONTRACT) for change in changes}
    assert len(versions | {base}) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"match": ("colour",)}, r"\['colour'\] must be inputs of the view"),
        ({"similar": (("kind", 2.0),)}, "'kind' must be a number"),
        ({"fields": ("kind",)}, "'kind' must be a number"),
    ],
)
def test_a_page_whose_neighbours_do_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    parts = {name: getattr(CASE, name) for name in UseCase.model_fields}
    with pytest.raises(ValidationError, match=message):
        UseCase(**{**parts, "view": view_of(**change)})


def test_a_contract_that_lets_places_lie_near_a_pole_is_refused() -> None:
    fields = tuple(f if f.name != "latitude" else Field(name="latitude", type=FieldType.FLOAT) for f in CONTRACT.fields)
    parts = {name: getattr(CASE, name) for name in UseCase.model_fields}
    with pytest.raises(ValidationError, match="keep 'latitude' between -85 and 85 degrees"):
        UseCase(**{**parts, "contract": CASE.contract.model_copy(update={"fields": fields})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": (Fold.SLOPE,)}, "have no folds"),
        ({"within": -DAY}, "must be positive"),
        ({"similar": (("size", 0.5),)}, "finite factor of at least 1"),
        ({"match": ("kind", "kind")}, "name one of match twice"),
    ],
)
def test_neighbours_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Neighbours(**{**NEAR.model_dump(), **change})


def test_of_sales_at_one_distance_the_latest_are_chosen_and_of_one_time_the_first_in_order() -> None:
    place = {"longitude": 10.0, "latitude": 50.0, "size": 100.0, "kind": "house"}
    times = [BASE - 5, BASE - 1, BASE - 3, BASE - 3, BASE - 3]
    told = [
        {"sale": f"s{i}", "area": "a", "at": from_microseconds(time), "price": float(i), **place}
        for i, time in enumerate(times)
    ]
    sales = [Sale(record, BASE) for record in told]
    least = min((2, 3, 4), key=lambda i: int(event_order([f"s{i}"])[0]))
    two = NEAR.model_copy(update={"k": 2, "fields": ("price",)})
    for order in (sales, sales[::-1]):
        made = found(two, order, [Asked(5, BASE, place)])[0]
        assert made[2] == (1.0 + least) / 2
