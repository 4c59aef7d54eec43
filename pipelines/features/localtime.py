"""Calendar columns on the local clock of a zone, exact to the microsecond and the same for one row and many.

A table of the zone's offset changes between 1950 and 2100 is made once per process; after that a local time
is one binary search.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np

from pipelines.spec import Calendar
from pipelines.spec.base import DAY_US, microseconds

_FIRST, _LAST = datetime(1950, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_STEP = timedelta(days=1)
# The days since 1970-01-01 on which years begin.
_YEARS = np.arange(_FIRST.year - 1, _LAST.year + 2).astype(str).astype("datetime64[D]").astype(np.int64)


@lru_cache(maxsize=16)
def transitions(zone: str) -> tuple[np.ndarray, np.ndarray]:
    """(moments int64[m], offsets int64[m]) in microseconds: from ``moments[i]`` on, local time is UTC +
    ``offsets[i]``.
    """
    clock = ZoneInfo(zone)

    def offset(moment: datetime) -> timedelta:
        found = moment.astimezone(clock).utcoffset()
        assert found is not None  # an aware datetime always has one
        return found

    moments, offsets = [_FIRST], [offset(_FIRST)]
    moment = _FIRST
    while moment < _LAST:
        after = moment + _STEP
        if offset(after) != offsets[-1]:
            early, late = moment, after
            while late - early > timedelta(seconds=1):  # zones change on whole seconds
                middle = early + (late - early) // 2
                middle -= timedelta(microseconds=middle.microsecond)
                early, late = (middle, late) if offset(middle) == offsets[-1] else (early, middle)
            moments.append(late)
            offsets.append(offset(late))
            moment = late
        else:
            moment = after
    return (
        np.array([microseconds(m - _EPOCH) for m in moments], dtype=np.int64),
        np.array([microseconds(o) for o in offsets], dtype=np.int64),
    )


def covered(calendar: Calendar | None, time_us: np.ndarray) -> np.ndarray:
    """bool[n]: the times for which ``calendar_columns`` has an answer; without a calendar all of them."""
    ahead = microseconds(calendar.ahead) if calendar else 0
    first, last = (microseconds(end - _EPOCH) - ahead for end in (_FIRST, _LAST))
    inside: np.ndarray = (time_us >= first) & (time_us < last)
    return inside if calendar else np.ones(len(time_us), dtype=bool)


def local_microseconds(zone: str, time_us: np.ndarray) -> np.ndarray:
    """What the zone's wall clock shows at ``time_us`` (int64[n]), as microseconds since 1970-01-01 on that
    clock.

    Raises ``ValueError`` outside 1950 to 2099.
    """
    moments, offsets = transitions(zone)
    if len(time_us) and not (moments[0] <= time_us.min() and time_us.max() < microseconds(_LAST - _EPOCH)):
        raise ValueError(
            f"calendar of zone {zone!r} covers 1950 to 2099; got times from {time_us.min()} to {time_us.max()} us"
        )
    local: np.ndarray = time_us + offsets[np.searchsorted(moments, time_us, side="right") - 1]
    return local


def calendar_columns(calendar: Calendar, time_us: np.ndarray) -> dict[str, np.ndarray]:
    """The calendar's parts at ``time_us + ahead``, float64[n] each, in its order."""
    local = local_microseconds(calendar.zone, np.asarray(time_us, dtype=np.int64) + microseconds(calendar.ahead))
    day = local // DAY_US
    answer: dict[str, np.ndarray] = {}
    for part in calendar.parts:
        if part == "hour":
            answer[part] = (local - day * DAY_US) / 3_600_000_000.0
        elif part == "weekday":
            answer[part] = ((day + 3) % 7).astype(np.float64)  # 1970-01-01 was a Thursday
        elif part == "yearday":
            answer[part] = (day - _YEARS[np.searchsorted(_YEARS, day, side="right") - 1]).astype(np.float64)
        else:
            answer[part] = local / float(DAY_US)
    return answer
