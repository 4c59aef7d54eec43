"""What every specification shares: frozen, closed to unknown keys, and a stable fingerprint."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen pydantic model that refuses unknown keys, so a misspelt option is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


DAY_US = 86_400_000_000
"""A day of 24 hours, in microseconds."""
_UNITS = (("d", DAY_US), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000))


def check_zone(name: str) -> None:
    """Raises ``ValueError`` when there is no time zone of that name (``ZoneInfo`` itself raises much else)."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"there is no time zone {name!r}: give one such as Europe/Rome") from error


def microseconds(duration: timedelta) -> int:
    """The duration in whole microseconds, exactly (``total_seconds`` would round long ones)."""
    return (duration.days * 86_400 + duration.seconds) * 1_000_000 + duration.microseconds


def duration_label(duration: timedelta) -> str:
    """The shortest exact label of a duration: ``7d``, ``36h``, ``15m``, ``10s``, ``250us``.

    It is part of feature names, so it must never change for a given duration.
    """
    total = microseconds(duration)
    for unit, size in _UNITS:
        if total and total % size == 0:
            return f"{total // size}{unit}"
    return f"{total}us"


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that identify the text of ``parts`` (BLAKE2b, 64 bits)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\x00")
    return digest.hexdigest()
