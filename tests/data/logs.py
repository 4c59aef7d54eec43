"""What the tests of the log share: a small log, a clock that ticks."""

from __future__ import annotations

from cluster.log import Log, Record
from tests.backends import on_redis, open_log

REMEMBER = 100


def small(place: str) -> tuple[Log, list[Record]]:
    """A log, and records that are too much for it."""
    if on_redis(place):
        return open_log(place, remember_us=REMEMBER, most_pending=2), [Record(None, b"x")] * 3
    return open_log(place, remember_us=REMEMBER, map_bytes=1 << 20), [Record(None, b"x" * (1 << 21))]


class Ticking:
    def __init__(self):
        self.time = 0

    def now(self):
        self.time += 1
        return self.time
