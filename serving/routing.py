"""The routing table, and how an instance finds its version by it.

The table lives in the database under an epoch that only rises. It is a projection of the rollout's journal: whoever
has lost it makes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.database import Database


class Challenger(BaseModel):
    """A version that is being tried, and how gateways try it; see ``ReleasePolicy`` for the limits.

    It answers ``weight`` of the instances and gets copies of ``shadow`` of the requests. In a ``watch`` it is the
    version that was champion before, and what is found is held against the one that answers. ``salt`` belongs to the
    rollout, so that no two rollouts try themselves on the same instances.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    rollout: int
    watch: bool = False
    salt: str
    by_entity: bool = False
    weight: float = Field(ge=0, le=1)
    shadow: float = Field(ge=0, le=1)
    deadline_ms: float
    slow_factor: float
    slow_floor_ms: float
    budget_ms: float | None = None
    harm_cap: int


class Share(BaseModel):
    """A version of an A/B test has the units whose place lies between the ``upto`` before it, or 0, and its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    upto: float = Field(gt=0, lt=1)


class Split(BaseModel):
    """An A/B test, and how gateways go about it; see ``ABTest`` for the limits.

    The champion has the units whose place lies above every ``upto``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    test: int
    salt: str
    by_entity: bool
    shares: tuple[Share, ...]
    deadline_ms: float
    harm_cap: int


class RoutingTable(BaseModel):
    """What every gateway of a use case follows. ``epoch`` orders tables; an older one is never applied.

    ``previous`` is kept warm. ``prepare`` is to be loaded and warmed, because it will be champion next: in the gateway
    ``prepare_in`` alone, if one is named, and then in all. There is never both a ``challenger`` and a ``split``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    champion: str
    previous: str | None = None
    prepare: str | None = None
    prepare_in: str | None = None
    challenger: Challenger | None = None
    split: Split | None = None

    @property
    def tried(self) -> tuple[str, ...]:
        """The versions that are tried beside the champion."""
        if self.split is not None:
            return tuple(share.version for share in self.split.shares)
        return (self.challenger.version,) if self.challenger is not None else ()

    @property
    def number(self) -> int | None:
        """The number of the rollout or A/B test that is under way."""
        if self.split is not None:
            return self.split.test
        return self.challenger.rollout if self.challenger is not None else None

    def versions(self, gateway: str) -> frozenset[str]:
        """The versions that a gateway keeps loaded."""
        next_one = self.prepare if self.prepare_in in (None, gateway) else None
        return frozenset(v for v in (self.champion, self.previous, next_one) if v is not None)


class UnknownTable(RuntimeError):
    """A table that other code wrote, with what this code does not know; the message says what."""


def parse(document: Mapping[str, Any]) -> RoutingTable:
    """The table of a document; raises ``UnknownTable``."""
    try:
        return RoutingTable.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UnknownTable(
            f"the routing table of epoch {document.get('epoch')} is not one of this code: {where}: {first['msg']}; "
            "deploy the code that wrote it"
        ) from error


def read(database: Database, usecase: str) -> RoutingTable | None:
    """The newest table, or None before the first champion; raises ``UnknownTable``."""
    stored = database.routing(usecase)
    return None if stored is None else parse({**stored.document, "epoch": stored.epoch})


def publish(database: Database, usecase: str, expected: RoutingTable | None, document: dict[str, Any]) -> RoutingTable:
    """Writes the successor of ``expected`` with the given fields; the same fields again are written only once.

    Fields that say nothing are left out, so that code which does not know them yet can read the table. Raises
    ``StaleEpoch`` when somebody else wrote first.
    """
    table = RoutingTable(epoch=0, **document)  # refuse a malformed table before it is written
    fields = table.model_dump(mode="json", exclude={"epoch"}, exclude_none=True)
    if expected is not None and fields == expected.model_dump(mode="json", exclude={"epoch"}, exclude_none=True):
        return expected
    epoch = database.put_routing(usecase, expected.epoch if expected else None, fields)
    return table.model_copy(update={"epoch": epoch})


def place(key: str, salt: str) -> float:
    """Where an instance stands in [0, 1), by its idempotency key: it is the challenger's while weight exceeds that.

    Raising the weight therefore never takes an instance away from the challenger, and a repeated request finds the
    version it had.
    """
    return xxhash.xxh3_64_intdigest(f"{salt}\x00{key}".encode()) / 2.0**64


def digest(entity: str, salt: str) -> int:
    """A name for an entity in reports, of 53 bits: whole numbers up to there are the same in every reader of JSON."""
    return xxhash.xxh3_64_intdigest(f"{salt}/unit\x00{entity}".encode()) >> 11
