"""What the rollout controller acts on, as it sees it. ``serving.rollout.serve_world`` is the real one."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

from cluster.database import ReleaseRequest
from serving.routing import RoutingTable


class Standing(StrEnum):
    """Where a challenger's application stands."""

    ABSENT = "absent"
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"


class World(Protocol):
    """What the controller acts on. Nothing here waits for long; every call may be repeated."""

    def table(self) -> RoutingTable | None:
        """The routing table in force."""
        ...

    def publish(self, expected: RoutingTable | None, document: dict[str, Any]) -> RoutingTable:
        """Puts a table in force; raises ``StaleEpoch``."""
        ...

    def deploy(self, version: str) -> None:
        """Has the challenger's application started."""
        ...

    def withdraw(self, version: str) -> None:
        """Has it removed."""
        ...

    def standing(self, version: str) -> tuple[Standing, str]:
        """Where it stands, and why."""
        ...

    def lacking(self, champion: str, version: str) -> str | None:
        """Why the state that ``version`` answers from is not as far as the champion's; None when it is."""
        ...

    def close(self, version: str, outcome: str, request: int | None) -> None:
        """Writes the outcome into that release request of the version."""
        ...

    def tell(self, alerts: dict[str, str]) -> None:
        """Has these alerts open, by name and detail, and no other of the rollout's."""
        ...

    def ask(self, version: str, by: str, reason: str, *, forced: bool) -> None:
        """Has the release of a version asked for, unless it is already and has not begun; ``forced`` past its gates."""
        ...

    def next_request(self) -> ReleaseRequest | None:
        """The oldest release request, claimed."""
        ...

    def asked_after(self, request: int) -> str | None:
        """A version whose release was asked for after that request and has not begun; None when there is none."""
        ...

    def gateways(self) -> list[str]:
        """The gateways that hold a lease."""
        ...
