"""The cluster's one clock: the system's, or a replay clock that a simulation advances.

Everything that reads a time reads it here, in whole microseconds since the Unix epoch, UTC.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cluster.settings import Settings

_SIZE = 8


class Clock(Protocol):
    """Anything that tells the time."""

    def now(self) -> int:
        """Microseconds since the Unix epoch, UTC."""
        ...


class SystemClock:
    """The time of the operating system."""

    def now(self) -> int:
        """Microseconds since the Unix epoch, UTC."""
        return time.time_ns() // 1000


class ReplayClock:
    """A time that only ``set`` moves, shared by all processes of a node that open the same file.

    The file holds one signed 64-bit integer in the machine's byte order. It is mapped at a page
    boundary and read and stored as one aligned word, so a reader sees the old time or the new one and
    never a mixture. Setters exclude each other with a file lock.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._file).st_size
            if size == 0:
                os.ftruncate(self._file, _SIZE)
            elif size != _SIZE:
                raise ValueError(f"{self.path} has {size} bytes, so it is not a replay clock: remove it")
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._word = memoryview(mmap.mmap(self._file, _SIZE)).cast("q")

    def now(self) -> int:
        """Microseconds since the Unix epoch; ``RuntimeError`` as long as nobody has set the clock."""
        value = self._word[0]
        if value == 0:
            raise RuntimeError(f"the replay clock {self.path} has never been set: call ReplayClock.set first")
        return value

    def set(self, moment_us: int) -> None:
        """Move the clock to ``moment_us``; ``ValueError`` if that is before 1970 or before its time."""
        if moment_us <= 0:
            raise ValueError(f"a replay clock starts after 1970-01-01, not at {moment_us} us")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            if moment_us < self._word[0]:
                raise ValueError(f"the replay clock is at {self._word[0]} us and cannot go back to {moment_us}")
            self._word[0] = moment_us
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def __reduce__(self) -> tuple[Callable[[str], ReplayClock], tuple[str]]:
        return ReplayClock, (str(self.path),)


def open_clock(settings: Settings) -> Clock:
    """The clock that ``settings.clock`` names."""
    return ReplayClock(settings.clock_file) if settings.clock == "replay" else SystemClock()
