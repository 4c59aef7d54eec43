"""Small worlds of events for property tests: a view with every fold, and interleavings of late, tied and null
events.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from hypothesis import strategies as st

from pipelines.features.windows import Plan, compile_plan
from pipelines.spec import Contract, FeatureView, Field, FieldType, Fold, Lag, Window
from pipelines.spec.base import microseconds
from tests.data.oracle import Event, features

SECOND = timedelta(seconds=1)
BASE = 1_700_000_000_000_000  # an instant, in microseconds

CONTRACT = Contract(
    name="readings",
    version="1.0.0",
    owner="tests",
    fields=(
        Field(name="meter", type=FieldType.STRING),
        Field(name="at", type=FieldType.TIMESTAMP),
        Field(name="flow", type=FieldType.FLOAT, nullable=True),
        Field(name="level", type=FieldType.FLOAT, nullable=True),
    ),
    entity="meter",
    time="at",
    key=("meter", "at"),
    lateness=90 * SECOND,
    future=20 * SECOND,
)
VIEW = FeatureView(
    name="meter_state",
    windows=(
        Window(field="flow", length=60 * SECOND, hop=20 * SECOND, folds=tuple(Fold), half_life=15 * SECOND),
        Window(field="flow", length=300 * SECOND, hop=60 * SECOND, folds=(Fold.SLOPE, Fold.MEAN, Fold.STD, Fold.SUM)),
        Window(field="level", length=40 * SECOND, hop=40 * SECOND, folds=(Fold.LAST, Fold.MIN)),
        Window(field="level", length=60 * SECOND, hop=20 * SECOND, folds=(Fold.LAST,)),
        Window(field="level", length=420 * SECOND, hop=20 * SECOND,
               folds=(Fold.EWM, Fold.STD, Fold.DISTINCT, Fold.COUNT, Fold.MAX), half_life=timedelta(days=1)),
    ),
    lags=(
        Lag(field="flow", offset=60 * SECOND, hop=20 * SECOND),
        Lag(field="level", offset=300 * SECOND, hop=60 * SECOND),
    ),
    ttl=50 * SECOND,
)  # fmt: skip
PLAN = compile_plan(VIEW, CONTRACT)


@dataclass(frozen=True)
class Read:
    """A read at ``now`` (us) after the first ``cut`` events."""

    cut: int
    now: int


@dataclass(frozen=True)
class World:
    """Events of one entity in the order they became known, and reads in between."""

    events: tuple[Event, ...]
    reads: tuple[Read, ...]


# Values whose sums depend on association, so that a wrong order of operations shows in the last bit.
_VALUES = st.one_of(
    st.none(),
    st.just(float("nan")),
    st.sampled_from([0.1, 0.2, 0.3, 0.7, 1e-3, 1e6, -0.0, 0.0, 3.0, -2.5]),
    st.floats(min_value=-1e9, max_value=1e9, allow_nan=False),
)


@st.composite
def worlds(draw: st.DrawFn, *, most: int = 60) -> World:
    """Up to ``most`` events: in order, late, too late, ahead of the clock, tied; with reads near the
    present.
    """
    lateness, future = microseconds(CONTRACT.lateness), microseconds(CONTRACT.future)
    known, events, reads, taken = BASE, [], [], set()
    for _ in range(draw(st.integers(0, most))):
        known += draw(st.sampled_from([0, 0, 1, 500_000, 5_000_000, 30_000_000, 200_000_000]))
        late = draw(
            st.one_of(
                st.sampled_from([0, 0, 0, 1, 20_000_000, lateness, lateness + 1, -future]),
                st.integers(-future, 2 * lateness),
            )
        )
        time, order = known - late, draw(st.integers(-3, 3))
        if draw(st.booleans()):
            time -= time % 20_000_000  # on the edge of a tile
            time = min(time, known + future)
        if (time, order) not in taken:
            taken.add((time, order))
            values = {"flow": draw(_VALUES), "level": draw(_VALUES)}
            events.append(Event(time, order, known, values))
        for _ in range(draw(st.integers(0, 1))):
            ahead = draw(st.sampled_from([0, 0, 0, 1, 7_000_000, 60_000_000, -1_000_000, -60_000_000]))
            reads.append(Read(len(events), known + ahead))
    reads.append(Read(len(events), known))
    return World(tuple(events), tuple(reads))


def counted(plan: Plan, events: tuple[Event, ...]) -> list[Event]:
    """Those known within the contract's lateness."""
    return [event for event in events if event.known_at - event.time <= plan.lateness_us]


def arrays(plan: Plan, events: list[Event] | tuple[Event, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """times, orders int64[m] and values float64[m, fields] of events."""
    values = [[np.nan if e.values.get(f) is None else e.values[f] for f in plan.fields] for e in events]
    return (
        np.array([e.time for e in events], np.int64),
        np.array([e.order for e in events], np.int64),
        np.array(values, np.float64).reshape(len(events), len(plan.fields)),
    )


def expected(world: World, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's values and newest contributing times (-1 for none) at a read."""
    answer = features(VIEW, CONTRACT, world.events[: read.cut], read.now)
    return np.array([v for v, _ in answer]), np.array([-1 if t is None else t for _, t in answer])


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two float64 arrays are equal to the last bit; any NaN equals any NaN."""
    nan = np.isnan(left) & np.isnan(right)
    a, b = np.ascontiguousarray(left), np.ascontiguousarray(right)
    return a.shape == b.shape and bool(np.all(nan | (a.view(np.int64) == b.view(np.int64))))
