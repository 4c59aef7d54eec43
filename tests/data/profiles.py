"""Small worlds of a slowly changing dimension, and the naive look-up that state and tables are held to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from pipelines.contracts.events import decode_events, encode_event, event_id, event_order, from_microseconds
from pipelines.spec import Contract, Dimension, Field, FieldType, UseCase
from pipelines.spec.base import microseconds
from tests.data.worlds import BASE, CONTRACT, VIEW
from tests.pipeline.test_online_state import use_case

DAY = timedelta(days=1)
DAY_US = microseconds(DAY)

PROFILE = Dimension(
    name="profile",
    contract=Contract(
        name="profiles",
        version="1.0.0",
        owner="tests",
        fields=(
            Field(name="revision", type=FieldType.STRING),
            Field(name="who", type=FieldType.STRING),
            Field(name="since", type=FieldType.TIMESTAMP),
            Field(name="people", type=FieldType.INTEGER, nullable=True, minimum=0),
            Field(name="pipes", type=FieldType.FLOAT, nullable=True),
            Field(name="open", type=FieldType.BOOLEAN, nullable=True),
        ),
        entity="who",
        time="since",
        key=("revision",),
        delay=timedelta(0),
        future=30 * DAY,
    ),
    key="meter",
    columns=("people", "pipes", "open"),
    ttl=10 * DAY,
)
KIND = PROFILE.model_copy(update={"name": "kind", "key": "sort", "columns": ("pipes",), "ttl": None})
SORT = Field(name="sort", type=FieldType.STRING, nullable=True)


def made_case() -> UseCase:
    """Meters with a profile each, and of a sort that has one too."""
    contract = CONTRACT.model_copy(update={"fields": (*CONTRACT.fields, SORT)})
    case, view = use_case(VIEW), VIEW.model_copy(update={"dimensions": (PROFILE, KIND), "inputs": ("sort",)})
    parts = {name: getattr(case, name) for name in UseCase.model_fields} | {"contract": contract, "view": view}
    model = case.model.model_copy(update={"numeric": ("flow_mean_1m", "profile_people", "kind_pipes")})
    return UseCase(**{**parts, "model": model})


@dataclass(frozen=True)
class Fact:
    """A row of the dimension and when it became known (us)."""

    record: dict[str, Any]
    known_at: int

    @property
    def time(self) -> int:
        return round(self.record["since"].timestamp() * 1e6)


@dataclass(frozen=True)
class Asked:
    """A request at ``now`` (us) after the first ``cut`` rows."""

    cut: int
    now: int
    key: str | None


@st.composite
def worlds(draw: st.DrawFn, *, most: int = 20) -> tuple[list[Fact], list[Asked]]:
    """Rows in the order they became known: of the past, of now, to come, tied, with nulls; and requests between."""
    known, facts, requests = BASE, [], []
    keys = st.sampled_from(["a", "b", "", "never", None])
    for number in range(draw(st.integers(0, most))):
        known += draw(st.sampled_from([0, 1, DAY_US]))
        since = known + draw(st.sampled_from([0, 0, -1, -DAY_US, -400 * DAY_US, 1, 2 * DAY_US]))
        record = {
            "revision": f"r{number}",
            "who": draw(st.sampled_from(["a", "a", "b", ""])),
            "since": from_microseconds(since),
            "people": draw(st.sampled_from([None, 0, 7, 2**53])),
            "pipes": draw(st.one_of(st.none(), st.floats(-1e9, 1e9))),
            "open": draw(st.sampled_from([None, True, False])),
        }
        facts.append(Fact(record, known))
        if draw(st.booleans()):
            ahead = draw(st.sampled_from([0, 0, 1, -1, -DAY_US, 2 * DAY_US, 300 * DAY_US]))
            requests.append(Asked(len(facts), known + ahead, draw(keys)))
    requests.append(Asked(len(facts), known, draw(keys)))
    return facts, requests


def table(facts: list[Fact], sequences: list[int] | None = None) -> pa.Table:
    """Rows of the dimension's table."""
    blobs = [encode_event(PROFILE.contract, fact.record) for fact in facts]
    known = [fact.known_at for fact in facts]
    return decode_events(PROFILE.contract, blobs, known, sequences or [0] * len(facts), load_id="bulk", buckets=4)


def expected(facts: list[Fact], request: Asked) -> tuple[np.ndarray, int | None]:
    """The columns that a request sees, NaN for none, and since when they hold."""
    held = [
        (fact.time, fact.known_at, int(event_order([event_id(PROFILE.contract, fact.record)])[0]), fact.record)
        for fact in facts[: request.cut]
        if fact.record["who"] == request.key and fact.time <= request.now
    ]
    if not held:
        return np.full(3, np.nan), None
    since, _, _, record = max(held, key=lambda entry: entry[:3])
    return np.array([np.nan if record[c] is None else float(record[c]) for c in PROFILE.columns]), since
