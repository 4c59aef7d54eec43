"""How a version comes to answer: the first one whose gates passed becomes champion, and the journal says why.

Replacing a champion needs the rollout (shadow, canary, rollback), which is not built yet: asking for it is refused.
"""

from __future__ import annotations

import os
import socket

from cluster.clock import Clock, SystemClock
from cluster.database import Database
from serving import routing
from serving.routing import RoutingTable

_LEASE_S = 60.0


class ReleaseError(RuntimeError):
    """A release cannot go on; the message says why and what to do."""


def adopt_first(usecase: str, database: Database, clock: Clock) -> RoutingTable:
    """The table in force, or one with the oldest requested version as the first champion.

    A release request exists only for a version whose gates passed. Raises ``ReleaseError`` when there is neither
    champion nor request.
    """
    table = routing.read(database, usecase)
    if table is not None:
        return table
    holder = f"{socket.gethostname()}:{os.getpid()}"
    # Leases end in real time, also under a replay clock: they guard against processes that died.
    request = database.claim_release(usecase, holder, _LEASE_S, SystemClock().now())
    if request is None:
        raise ReleaseError(
            f"{usecase!r} has no champion and no release request: run `python -m pipelines.train {usecase}` and see "
            "whether the version's gates passed"
        )
    database.append_journal(usecase, "champion_adopted", {"version": request.version, **request.payload}, clock.now())
    table = routing.publish(database, usecase, None, champion=request.version)
    database.finish_release(usecase, request.version, "promoted")
    return table
