"""Small worlds of sales on a map, and the naive search for a place's neighbours that the kernel is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from pipelines.contracts.events import decode_events, encode_event, event_id, event_order, from_microseconds
from pipelines.spec import (
    Contract,
    FeatureView,
    Field,
    FieldType,
    Fold,
    ModelSpec,
    Neighbours,
    Split,
    Target,
    UseCase,
    Window,
)
from pipelines.spec.base import microseconds

DAY = timedelta(days=1)
DAY_US = microseconds(DAY)
BASE = 1_700_000_000_000_000

CONTRACT = Contract(
    name="sales",
    version="1.0.0",
    owner="tests",
    fields=(
        Field(name="sale", type=FieldType.STRING),
        Field(name="area", type=FieldType.STRING),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="price", type=FieldType.FLOAT, nullable=True),
        Field(name="size", type=FieldType.FLOAT, nullable=True),
        Field(name="kind", type=FieldType.STRING, nullable=True),
        Field(name="longitude", type=FieldType.FLOAT, nullable=True, minimum=-180, maximum=180),
        Field(name="latitude", type=FieldType.FLOAT, nullable=True, minimum=-85, maximum=85),
    ),
    entity="area",
    time="at",
    key=("sale",),
    lateness=5 * DAY,
    future=timedelta(hours=1),
)
NEAR = Neighbours(
    name="near", k=3, within=20 * DAY, radius=5_000, match=("kind",), similar=(("size", 1.5),),
    fields=("price", "size"), folds=(Fold.MEAN, Fold.STD, Fold.MAX),
)  # fmt: skip
ANY = Neighbours(name="anything", k=100, within=7 * DAY, radius=30_000)
VIEW = FeatureView(
    name="comparables",
    windows=(Window(field="price", length=20 * DAY, hop=DAY, folds=(Fold.MEAN,)),),
    neighbours=(NEAR, ANY),
    inputs=("size", "kind", "longitude", "latitude"),
    ttl=10 * DAY,
)
CASE = UseCase(
    name="sales",
    title="Sales",
    contract=CONTRACT.model_copy(update={"delay": timedelta(minutes=1)}),
    view=VIEW,
    model=ModelSpec(
        name="sales",
        target=Target(field="price"),
        numeric=("near_price_mean", "anything_count", "price_mean_20d"),
        split=Split(calibration=DAY, test=DAY),
    ),
    gates=(),
)


@dataclass(frozen=True)
class Sale:
    """A sale and when it became known (us)."""

    record: dict[str, Any]
    known_at: int

    @property
    def time(self) -> int:
        return round(self.record["at"].timestamp() * 1e6)


@dataclass(frozen=True)
class Asked:
    """A request at ``now`` (us) after the first ``cut`` sales."""

    cut: int
    now: int
    inputs: dict[str, Any]


# Close together, on both sides of the date line, and as far north as a contract may go.
_CENTRES = ((-122.3, 47.6), (179.99, 10.0), (-179.98, 10.0), (10.0, 84.95))


@st.composite
def places(draw: st.DrawFn) -> tuple[float | None, float | None]:
    longitude, latitude = draw(st.sampled_from(_CENTRES))
    step = draw(st.sampled_from([0.0, 0.01, 0.02, -0.03, 0.1, -0.25]))
    other = draw(st.sampled_from([0.0, 0.01, -0.02, 0.04, -0.2]))
    if draw(st.integers(0, 15)) == 0:
        return None, latitude
    longitude += step
    return (longitude + 540.0) % 360.0 - 180.0, min(latitude + other, 85.0)


@st.composite
def worlds(draw: st.DrawFn, *, most: int = 40) -> tuple[list[Sale], list[Asked]]:
    """Sales in the order they became known, late and too late ones, ties, nulls; and requests between them."""
    known, sales, requests = BASE, [], []

    def compared() -> dict[str, Any]:
        longitude, latitude = draw(places())
        return {
            "size": draw(st.sampled_from([100.0, 100.0, 120.0, 150.0, 151.0, 0.0, None])),
            "kind": draw(st.sampled_from(["house", "house", "flat", None])),
            "longitude": longitude,
            "latitude": latitude,
        }

    for number in range(draw(st.integers(0, most))):
        known += draw(st.sampled_from([0, 1, 3_600_000_000, DAY_US, 3 * DAY_US]))
        late = draw(st.sampled_from([0, 0, 0, DAY_US, 5 * DAY_US, 5 * DAY_US + 1, -3_600_000_000]))
        price = draw(st.one_of(st.none(), st.floats(1.0, 1e6)))
        area = draw(st.sampled_from(["a", "b"]))
        record = {"sale": f"s{number}", "area": area, "at": from_microseconds(known - late), "price": price}
        sales.append(Sale({**record, **compared()}, known))
        if draw(st.integers(0, 2)) == 0:
            ahead = draw(st.sampled_from([0, 0, 1, -1, DAY_US, 20 * DAY_US]))
            requests.append(Asked(len(sales), known + ahead, compared()))
    requests.append(Asked(len(sales), known, compared()))
    return sales, requests


def table(sales: list[Sale], sequences: list[int] | None = None) -> pa.Table:
    """Rows of the events table."""
    blobs = [encode_event(CONTRACT, sale.record) for sale in sales]
    known = [sale.known_at for sale in sales]
    return decode_events(CONTRACT, blobs, known, sequences or [0] * len(sales), load_id="bulk", buckets=4)


def neighbours(near: Neighbours, sales: list[Sale], request: Asked) -> list[tuple[float, Sale]]:
    """The naive search: every sale known to the request is looked at. Distances in metres, nearest first."""
    mine, found = request.inputs, []
    if mine["longitude"] is None or mine["latitude"] is None:
        return []
    for sale in sales[: request.cut]:
        other, age = sale.record, request.now - sale.time
        if sale.known_at - sale.time > microseconds(CONTRACT.lateness) or not 0 <= age < microseconds(near.within):
            continue
        if other["longitude"] is None or other["latitude"] is None:
            continue
        if any(mine[name] is None or mine[name] != other[name] for name in near.match):
            continue
        if not all(_similar(mine[name], other[name], times) for name, times in near.similar):
            continue
        east = (other["longitude"] - mine["longitude"] + 540.0) % 360.0 - 180.0
        east *= math.cos(math.radians(mine["latitude"]))
        north = other["latitude"] - mine["latitude"]
        metres = math.hypot(east, north) * 111_195.08
        if metres <= near.radius:
            order = int(event_order([event_id(CONTRACT, other)])[0])
            found.append((round(metres, 6), -sale.time, order, sale))
    found.sort(key=lambda entry: entry[:3])
    return [(metres, sale) for metres, _, _, sale in found[: near.k]]


def _similar(mine: float | None, other: float | None, times: float) -> bool:
    return bool(mine and other and 1 / times <= other / mine * (1 + 1e-12) and other / mine <= times * (1 + 1e-12))


def expected(near: Neighbours, sales: list[Sale], request: Asked) -> np.ndarray:
    """The features of ``near`` by their definitions."""
    found = neighbours(near, sales, request)
    values = [float(len(found)), float(np.mean([metres for metres, _ in found])) if found else np.nan]
    for field in near.fields:
        given = np.array([s.record[field] for _, s in found if s.record[field] is not None], np.float64)
        for fold in near.folds:
            if fold is Fold.STD:
                values.append(given.std(ddof=1) if len(given) > 1 else np.nan)
            else:
                values.append({Fold.MEAN: np.mean, Fold.MAX: np.max}[fold](given) if len(given) else np.nan)
    return np.array(values)
