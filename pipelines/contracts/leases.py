"""Leases held for the length of a block. One writer at a time to a use case's events table: loads and drains take the
same lease.

Whoever holds it may look for an event id in the table, and commit, without another commit in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.clock import SystemClock
from cluster.database import Database
from pipelines.spec import EventSource

_SECONDS = 30.0


class LeaseLost(OSError):
    """Another process took the lease although this one held it: nothing more may be committed."""


def try_events(database: Database, source: EventSource, holder: str) -> bool:
    """Takes the lease ``drain/<use case>`` for half a minute, or returns False.

    Leases end in real time, also under a replay clock: they guard against processes that died.
    """
    return _take(database, _name(source), holder)


@contextmanager
def events_lease(
    database: Database, source: EventSource, holder: str, *, patience_s: float = 120.0
) -> Iterator[Callable[[], None]]:
    """Holds the lease for the length of a block, however long; yields a check that raises ``LeaseLost``.

    Raises ``TimeoutError`` when others hold it for ``patience_s`` seconds.
    """
    with kept_lease(database, _name(source), holder, patience_s=patience_s) as check:
        yield check


@contextmanager
def kept_lease(
    database: Database, name: str, holder: str, *, patience_s: float = 120.0
) -> Iterator[Callable[[], None]]:
    """``events_lease`` for a lease of any name; one that ``holder`` has taken already is kept on."""
    deadline = time.monotonic() + patience_s
    while not _take(database, name, holder):
        if time.monotonic() > deadline:
            raise TimeoutError(f"others held the lease {name!r} for {patience_s:.0f} s: does one of them hang?")
        time.sleep(0.05)
    ended, lost = threading.Event(), threading.Event()

    def renew() -> None:
        try:
            while not ended.wait(_SECONDS / 3):
                if not _renew(database, name, holder):
                    return
        finally:  # also where the database did not answer
            if not ended.is_set():
                lost.set()

    def check() -> None:
        if lost.is_set() or not _renew(database, name, holder):
            raise LeaseLost(f"{holder} lost the lease {name!r}; run it again")

    keeper = threading.Thread(target=renew, name=f"lease {name}", daemon=True)
    keeper.start()
    try:
        yield check
    finally:
        ended.set()
        keeper.join()
        database.release_lease(name, holder)


def _take(database: Database, name: str, holder: str) -> bool:
    return database.acquire_lease(name, holder, _SECONDS, SystemClock().now())


def _renew(database: Database, name: str, holder: str) -> bool:
    """One that lapsed is no longer had where another has had it since, although it may be free again."""
    return database.renew_lease(name, holder, _SECONDS, SystemClock().now())


def _name(source: EventSource) -> str:
    return f"drain/{source.name}"
