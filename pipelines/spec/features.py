"""The feature view: what is computed for an entity at a moment. Engines are in ``pipelines.features``."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec, check_zone, duration_label, microseconds
from pipelines.spec.contract import NUMBERS, Contract


class Fold(StrEnum):
    """The folds a window can compute over the non-null values of one field, in canonical order.

    Of no value, COUNT, SUM and DISTINCT are 0 and all others NaN. STD is the sample's and needs two values; DELTA is
    last less first; SLOPE is the least-squares slope in units per second and needs two different times; EWM is the
    exponentially weighted mean with the window's ``half_life``; DISTINCT is exact below 64 different values and then
    an estimate (standard error 13 %); MISSING is the share of events whose value is null; SINCE is the seconds since
    the last value. Numbers and booleans take every fold, strings COUNT, DISTINCT, MISSING and SINCE.
    """

    COUNT = "count"
    SUM = "sum"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    STD = "std"
    FIRST = "first"
    LAST = "last"
    DELTA = "delta"
    SLOPE = "slope"
    EWM = "ewm"
    DISTINCT = "distinct"
    MISSING = "missing"
    SINCE = "since"


FOLDS_OF_STRINGS = frozenset({Fold.COUNT, Fold.DISTINCT, Fold.MISSING, Fold.SINCE})


MOST_TILES = 20_000
"""Tiles of a window at most: an entity's state holds each of them, and is read and written whole."""


class Window(Spec):
    """Folds of ``field`` over a sawtooth window: its head is exact to the event, its tail moves by ``hop``.

    At time t the window holds the events of the ``length / hop`` closed tiles before the tile of t,
    and those of that open tile up to and including t. Tiles are aligned to the Unix epoch.
    """

    field: str
    length: timedelta
    hop: timedelta
    folds: tuple[Fold, ...]
    half_life: timedelta | None = None

    @model_validator(mode="after")
    def _folds_are_complete(self) -> Self:
        if not self.folds or len(set(self.folds)) < len(self.folds):
            raise ValueError(f"window on {self.field!r}: folds {list(map(str, self.folds))} must be given, each once")
        if (Fold.EWM in self.folds) != (self.half_life is not None):
            raise ValueError(f"window on {self.field!r}: the fold 'ewm' and a half_life belong together; give both")
        if self.half_life is not None and self.half_life <= timedelta(0):
            raise ValueError(f"window on {self.field!r}: half_life {self.half_life} must be positive")
        return self

    @model_validator(mode="after")
    def _tiles_are_whole(self) -> Self:
        if self.hop <= timedelta(0) or self.length <= timedelta(0) or self.length % self.hop:
            raise ValueError(
                f"window on {self.field!r}: length {self.length} must be a positive multiple of hop {self.hop}"
            )
        if self.tiles > MOST_TILES:
            raise ValueError(
                f"window on {self.field!r}: {self.tiles:,} tiles of {self.hop} in the state of every entity exceed "
                f"{MOST_TILES:,}: choose a longer hop, at least {self.length / MOST_TILES}"
            )
        return self

    @property
    def tiles(self) -> int:
        """How many closed tiles the window holds."""
        return self.length // self.hop

    def feature(self, fold: Fold) -> str:
        """The name of one of its features, such as ``inflow_mean_7d``."""
        return f"{self.field}_{fold}_{duration_label(self.length)}"


class Lag(Spec):
    """The last non-null value of ``field`` in the closed tile ``offset / hop`` tiles before the open one."""

    field: str
    offset: timedelta
    hop: timedelta

    @model_validator(mode="after")
    def _tiles_are_whole(self) -> Self:
        if self.hop <= timedelta(0) or self.offset <= timedelta(0) or self.offset % self.hop:
            raise ValueError(
                f"lag on {self.field!r}: offset {self.offset} must be a positive multiple of hop {self.hop}"
            )
        return self

    @property
    def feature(self) -> str:
        """Its name, such as ``inflow_lag_7d``."""
        return f"{self.field}_lag_{duration_label(self.offset)}"


NEIGHBOUR_FOLDS = frozenset({Fold.SUM, Fold.MEAN, Fold.MIN, Fold.MAX, Fold.STD})


class Neighbours(Spec):
    """The ``k`` nearest comparable events of any entity in the past ``within``, as of the request.

    ``longitude`` and ``latitude`` (degrees), ``match`` and ``similar`` are contract fields that events carry and that a
    request gives as inputs of the view. An event is comparable when it lies at most ``radius`` metres away, when all
    fields of ``match`` are equal, and when each field of ``similar``, whose values are positive, is at most that many
    times larger or smaller. A place or a field without a value compares with nothing. The features are the folds of
    ``fields`` over the values of the chosen events, how many events were chosen, and their mean distance in metres.
    """

    name: str = PydanticField(pattern=r"^[a-z][a-z0-9_]*$")
    k: int = PydanticField(ge=1, le=100)
    within: timedelta
    radius: float = PydanticField(ge=1, le=100_000)
    longitude: str = "longitude"
    latitude: str = "latitude"
    match: tuple[str, ...] = ()
    similar: tuple[tuple[str, float], ...] = ()
    fields: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = (Fold.MEAN,)

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.within <= timedelta(0):
            raise ValueError(f"neighbours {self.name!r}: within {self.within} must be positive")
        if odd := sorted(set(self.folds) - NEIGHBOUR_FOLDS):
            raise ValueError(f"neighbours {self.name!r} have no folds {odd}; there are {sorted(NEIGHBOUR_FOLDS)}")
        if low := [name for name, times in self.similar if not 1 <= times < math.inf]:
            raise ValueError(f"neighbours {self.name!r}: {low} must be similar within a finite factor of at least 1")
        for what, names in (("match", self.match), ("similar", [n for n, _ in self.similar]), ("fields", self.fields)):
            if len(set(names)) < len(names):
                raise ValueError(f"neighbours {self.name!r} name one of {what} twice: {list(names)}")
        return self

    @property
    def asked(self) -> tuple[str, ...]:
        """The inputs that a request is compared by: longitude, latitude, ``match``, ``similar``."""
        return (self.longitude, self.latitude, *self.match, *(name for name, _ in self.similar))

    @property
    def features(self) -> tuple[str, ...]:
        """Its names, such as ``near_count``, ``near_distance``, ``near_price_mean``."""
        folded = (f"{self.name}_{field}_{fold}" for field in self.fields for fold in self.folds)
        return (f"{self.name}_count", f"{self.name}_distance", *folded)


class Dimension(Spec):
    """Slowly changing facts about ``key``, the entity or an input, as of the request.

    Rows come under a contract of their own, whose entity is the key's value and whose time is when the row begins to
    hold; a time ahead, as of a tariff that is announced, needs a ``future`` there. A request sees of the rows of its
    key that were known by then the latest that holds, however late it became known, and of two that hold from one time
    the one known later; a null in it is a missing value. So a correction is another row, whose key must say so.
    ``columns`` are numbers. ``ttl`` is the age above which a value is STALE (None: never).
    """

    name: str = PydanticField(pattern=r"^[a-z][a-z0-9_]*$")
    contract: Contract
    key: str
    columns: tuple[str, ...]
    ttl: timedelta | None = None

    @model_validator(mode="after")
    def _columns_are_numbers(self) -> Self:
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"dimension {self.name!r}: columns {list(self.columns)} must be given, each once")
        for column in self.columns:
            if self.contract.field(column).type not in NUMBERS:
                raise ValueError(f"dimension {self.name!r}: column {column!r} must be a number")
        return self

    @property
    def features(self) -> tuple[str, ...]:
        """Its names, such as ``profile_population``."""
        return tuple(f"{self.name}_{column}" for column in self.columns)


class Calendar(Spec):
    """Calendar columns of the request time plus ``ahead``, in ``zone`` (daylight saving included).

    ``hour`` is 0–24 with its fraction, ``weekday`` 0 (Monday)–6, ``yearday`` 0–365, ``days`` the days since
    1970-01-01 with their fraction: all on the local clock.
    """

    zone: str
    ahead: timedelta = timedelta(0)
    parts: tuple[Literal["hour", "weekday", "yearday", "days"], ...]

    @model_validator(mode="after")
    def _zone_exists(self) -> Self:
        check_zone(self.zone)
        return self


class Derived(Spec):
    """A feature computed from other columns by ``function``, whose argument names are those columns.

    Only elementwise NumPy operations are allowed, because reductions and matrix products may differ in
    the last bit between one row and many; ``pipelines.features.derived`` checks it by tracing.
    """

    name: str = PydanticField(pattern=r"^[a-z][a-z0-9_]*$")
    function: Callable[..., Any]


class FeatureView(Spec):
    """Everything a model may see of ``entity`` at a moment.

    ``inputs`` are contract fields that the caller gives with the request (a weather forecast, the size of
    the house); in training they are read from the event that carries the target. ``ttl`` is the age above
    which a value is STALE.
    """

    name: str
    windows: tuple[Window, ...] = ()
    lags: tuple[Lag, ...] = ()
    neighbours: tuple[Neighbours, ...] = ()
    dimensions: tuple[Dimension, ...] = ()
    inputs: tuple[str, ...] = ()
    calendar: Calendar | None = None
    derived: tuple[Derived, ...] = ()
    ttl: timedelta

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [*self.stored, *self.inputs, *self.calendar_columns, *(d.name for d in self.derived)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"feature view {self.name!r} defines {twice} more than once")
        return self

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the features that are made of events, in the order of every stored vector."""
        return (*self.of_entity, *(name for part, _ in self.beside for name in part.features))

    @property
    def of_entity(self) -> tuple[str, ...]:
        """Those of ``stored`` that are made of the entity's own events: its first ones."""
        windowed = (window.feature(fold) for window in self.windows for fold in window.folds)
        return (*windowed, *(lag.feature for lag in self.lags))

    @property
    def beside(self) -> tuple[tuple[Neighbours | Dimension, slice], ...]:
        """The neighbours, then the dimensions, and where in every stored vector their features are."""
        parts: tuple[Neighbours | Dimension, ...] = (*self.neighbours, *self.dimensions)
        at = len(self.of_entity)
        return tuple((part, slice(at, at := at + len(part.features))) for part in parts)

    @property
    def calendar_columns(self) -> tuple[str, ...]:
        """Names of the calendar columns."""
        return self.calendar.parts if self.calendar else ()

    @property
    def hops(self) -> tuple[int, ...]:
        """The distinct hops in microseconds, ascending."""
        hops = [*(window.hop for window in self.windows), *(lag.hop for lag in self.lags)]
        return tuple(sorted({microseconds(hop) for hop in hops}))
