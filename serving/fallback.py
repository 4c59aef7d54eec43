"""The ladder from a fresh value to a refusal: what an answer is made of when a sensor has fallen silent.

Pure: the state's vector, the version's normals and the clock's time come in, and what goes into the model comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.features import derived
from pipelines.features.online import Read
from pipelines.features.served import Status
from pipelines.spec import UseCase
from pipelines.spec.base import microseconds
from pipelines.training.artifact import Artifact, Level
from pipelines.training.normals import Normals

UNKNOWN_ENTITY, NO_NORMAL = "unknown_entity", "no_normal"
"""Why a row is refused: nothing was ever heard of its entity, or it has been silent too long and has no normal."""


@dataclass(frozen=True, slots=True)
class Filled:
    """n rows of stored features after the ladder: values float64[n, s], status uint8[n, s], level uint8[n].

    ``level`` is each row's ``artifact.Level``. ``refused`` gives the reason by row: such a row has no answer, and its
    values are those that were read wherever there is no normal. ``values`` and ``status`` are the arrays that were
    read, when nothing had to be replaced.
    """

    values: np.ndarray
    status: np.ndarray
    level: np.ndarray
    refused: dict[int, str]


@dataclass(frozen=True, eq=False)
class _Field:
    """Places of one field's features in the stored vector, and whether the model needs any of its windows."""

    windows: np.ndarray
    lags: np.ndarray
    needs_window: bool


@dataclass(frozen=True, eq=False)
class Ladder:
    """The ladder of one model version of one use case; made by ``ladder_of``.

    A field *reports* while any of its windows is FRESH. Then all its features are used as they are: a lag that falls
    into an old gap, or a deviation of a single value, is nothing that training has not seen. Of a field that does not
    report, windows that are STALE and at most ``hold_s`` seconds old are *held*: used as they are. All its other
    windows, and when there are any, its MISSING lags, give way to the season's normal. A lag that has a value keeps it:
    it is as old as it is meant to be. A field without windows cannot be seen to report, so its MISSING lags give way.
    """

    hold_s: float
    windows: int
    fields: tuple[_Field, ...]
    needed: np.ndarray
    blind: bool
    normals: Normals | None

    def fill(self, read: Read, entities: Sequence[str], now_us: int) -> Filled:
        """What the model is to be given for ``read``, the stored features of ``entities`` at ``now_us``."""
        status, rows = read.status, len(entities)
        if not status[:, : self.windows].any() and not self.blind:
            return Filled(read.values, status, np.zeros(rows, np.uint8), {})
        replaced = np.zeros(status.shape, np.bool_)
        held = np.zeros(rows, np.bool_)
        for field in self.fields:
            missing = status[:, field.lags] == Status.MISSING
            if not len(field.windows):
                replaced[:, field.lags] = missing
                continue
            mine = status[:, field.windows]
            silent = (mine != Status.FRESH).all(axis=1)
            if not silent.any():
                continue
            holds = (mine == Status.STALE) & (read.age_s[:, field.windows] <= self.hold_s)
            lost = ~holds & silent[:, None]
            replaced[:, field.windows] = lost
            replaced[:, field.lags] = missing & lost.any(axis=1)[:, None]
            if field.needs_window:
                held |= silent
        below = (replaced & self.needed).any(axis=1)
        level = np.where(below, Level.NORMAL, np.where(held, Level.HELD, Level.FRESH)).astype(np.uint8)
        if not replaced.any():
            return Filled(read.values, status, level, {})
        usual = np.full(status.shape, np.nan)
        if self.normals is not None:
            some = np.flatnonzero(replaced.any(axis=1)).tolist()
            times = np.full(len(some), now_us, np.int64)
            usual[some] = self.normals.at([entities[row] for row in some], times)
        filled = replaced & ~np.isnan(usual)
        refused = {
            int(row): NO_NORMAL if read.known[row] else UNKNOWN_ENTITY
            for row in np.flatnonzero((replaced & ~filled & self.needed).any(axis=1))
        }
        return Filled(
            np.where(filled, usual, read.values),
            np.where(filled, np.uint8(Status.IMPUTED), status),
            level,
            refused,
        )


def ladder_of(use_case: UseCase, artifact: Artifact, normals: Normals | None) -> Ladder | None:
    """The ladder of a version (``Runner.artifact``, ``Runner.normals``); None when the page has no fallback.

    Raises ``ValueError`` when ``normals`` are of other features than the view stores.
    """
    policy, view = use_case.fallback, use_case.view
    if policy is None:
        return None
    if normals is not None and normals.features != view.stored:
        raise ValueError(
            f"the normals of a version of {use_case.name!r} are of {normals.features}, but its view stores "
            f"{view.stored}: train the version again"
        )
    windowed = [window.field for window in view.windows for _ in window.folds]
    lagged = [lag.field for lag in view.lags]
    needed = _needed(use_case, artifact)
    fields = []
    for name in dict.fromkeys((*windowed, *lagged)):
        windows = np.array([place for place, field in enumerate(windowed) if field == name], np.int64)
        lags = np.array([len(windowed) + place for place, field in enumerate(lagged) if field == name], np.int64)
        fields.append(_Field(windows, lags, bool(needed[windows].any())))
    blind = any(not len(field.windows) for field in fields)
    return Ladder(microseconds(policy.hold) / 1e6, len(windowed), tuple(fields), needed, blind, normals)


def _needed(use_case: UseCase, artifact: Artifact) -> np.ndarray:
    """bool[s]: the stored features that some column of the model is made of, directly or through derived ones."""
    traces = derived.traces(use_case.view)
    open_names = [name for name in (*artifact.numeric, artifact.anchor, artifact.scale) if name]
    seen: set[str] = set()
    while open_names:
        name = open_names.pop()
        if name not in seen:
            seen.add(name)
            open_names += traces[name].arguments if name in traces else ()
    return np.array([name in seen for name in use_case.view.stored])
