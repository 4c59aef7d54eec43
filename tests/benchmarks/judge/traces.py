"""Requests of a canary, made up: what each version would have done with each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE = 100.0
"""Requests a second, for judges that look by the clock."""
ERRORS, SLOW, WORSE = 0.005, 0.01, 0.05
"""Usual shares of requests that fail and that are slow, and the share of a bad version."""
_USERS, _SESSION = 2_000, 20
_OUTAGES, _OUTAGE_S = 4, 400
_OUTAGE_ERRORS, _OUTAGE_SLOW = 0.3, 0.5


@dataclass(frozen=True)
class Trace:
    """n requests in their order: the share ``weight`` float64[n] at which each was assigned, whether it was the
    ``challenger``'s, and whether the version that it was given to ``failed`` or was ``slow``, all bool[n]. ``user``
    int[n] is whose it was, where users are assigned.
    """

    weight: np.ndarray
    challenger: np.ndarray
    failed: np.ndarray
    slow: np.ndarray
    user: np.ndarray | None = None

    def counted(self, happened: np.ndarray) -> np.ndarray:
        """bool [n]: where what ``happened`` is evidence. Of a user who is assigned only the first time is."""
        if self.user is None:
            return happened
        at = np.flatnonzero(happened)
        _, first = np.unique(self.user[at], return_index=True)
        counted = np.zeros(len(happened), dtype=bool)
        counted[at[first]] = True
        return counted


def null(rng: np.random.Generator, count: int, *, sticky: bool) -> Trace:
    """A version as good as its champion, through everything that must not be held against it.

    Users come in sessions and some of them fail far more often than others; outages hit both versions; the weight
    rises, falls and rises again. ``sticky``: all requests of a user go to the same version, else each is assigned.
    """
    weight = np.repeat([0.1, 0.5, 0.1, 0.2], [count * 3 // 10, count * 2 // 10, count * 3 // 10, count * 2 // 10])
    weight = np.concatenate([weight, np.full(count - len(weight), 0.2)])
    prone = rng.gamma(0.2, 5.0, _USERS)  # of mean one; a few users have most of the errors
    users = np.repeat(rng.integers(_USERS, size=count // _SESSION + 1), _SESSION)[:count]
    failing, slowing = np.minimum(ERRORS * prone[users], 1.0), np.full(count, SLOW)
    for begin in rng.integers(count, size=_OUTAGES):
        span = slice(int(begin), int(begin) + int(_OUTAGE_S * RATE))
        failing[span], slowing[span] = _OUTAGE_ERRORS, _OUTAGE_SLOW
    place = rng.random(_USERS)[users] if sticky else rng.random(count)
    failed, slow = rng.random(count) < failing, rng.random(count) < slowing
    return Trace(weight, place < weight, failed, slow, users if sticky else None)


def worse(rng: np.random.Generator, count: int, *, errors: float = ERRORS, slow: float = SLOW) -> Trace:
    """A challenger at weight 0.1 that fails or is slow in these shares of its requests."""
    weight = np.full(count, 0.1)
    challenger = rng.random(count) < weight
    failed = rng.random(count) < np.where(challenger, errors, ERRORS)
    return Trace(weight, challenger, failed, rng.random(count) < np.where(challenger, slow, SLOW))
