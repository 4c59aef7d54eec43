"""The two backends of ingest log and online state, by their place, so that one suite holds both to the same promises.

A place is a directory, for LMDB, or the URL of a Redis server; it can be handed to another process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.log import DurableLog, Log
from cluster.redis_log import RedisLog
from pipelines.features.online import OnlineState
from pipelines.features.views import Views
from pipelines.spec import UseCase

HOUR = 3_600_000_000


def on_redis(place: str) -> bool:
    return "://" in place


def open_log(place: str, name: str = "log", *, remember_us: int = HOUR, **limits: Any) -> Log:
    if on_redis(place):
        return RedisLog(place, name, remember_us=remember_us, **limits)
    return DurableLog(Path(place) / name, remember_us=remember_us, **limits)


def open_state(place: str, use_case: UseCase) -> OnlineState:
    return OnlineState(place if on_redis(place) else Path(place) / "state", use_case)


def open_views(place: str, use_case: UseCase) -> Views:
    return Views(place if on_redis(place) else Path(place) / "state", use_case)
