"""The routing table: which model version answers. It lives in the database under an epoch that only rises."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.database import Database


class RoutingTable(BaseModel):
    """What every gateway of a use case follows. ``epoch`` orders tables; an older one is never applied."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    champion: str


def read(database: Database, usecase: str) -> RoutingTable | None:
    """The newest table, or None before the first champion."""
    stored = database.routing(usecase)
    return None if stored is None else RoutingTable(epoch=stored.epoch, **stored.document)


def publish(database: Database, usecase: str, expected: RoutingTable | None, **changes: Any) -> RoutingTable:
    """Writes the successor of ``expected``; raises ``StaleEpoch`` when somebody else wrote first."""
    document = {**(expected.model_dump(exclude={"epoch"}) if expected else {}), **changes}
    RoutingTable(epoch=0, **document)  # refuse a malformed table before it is written
    epoch = database.put_routing(usecase, expected.epoch if expected else None, document)
    return RoutingTable(epoch=epoch, **document)
