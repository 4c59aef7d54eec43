"""The world that the rollout controller acts on: database, Serve applications, and MLflow's aliases."""

from __future__ import annotations

import os
import socket
from typing import Any

from ray.serve.schema import ApplicationStatus

from cluster.clock import SystemClock
from cluster.database import Database, ReleaseRequest
from cluster.settings import Settings
from pipelines.spec import UseCase
from pipelines.training.registry import Registry
from serving import routing
from serving.challenger import Applications
from serving.rollout.controller import Standing
from serving.routing import RoutingTable

_CLAIM_S = 30.0
_STANDING = {
    ApplicationStatus.RUNNING: Standing.RUNNING,
    ApplicationStatus.DEPLOY_FAILED: Standing.FAILED,
    ApplicationStatus.UNHEALTHY: Standing.FAILED,
}


class ServeWorld:
    """The real one."""

    def __init__(self, use_case: UseCase, database: Database, settings: Settings) -> None:
        self._usecase = use_case.name
        self._database = database
        self._applications = Applications(use_case.name)
        self._registry = Registry(settings)
        self._holder = f"{socket.gethostname()}:{os.getpid()}"

    def table(self) -> RoutingTable | None:
        """The routing table in force."""
        return routing.read(self._database, self._usecase)

    def publish(self, expected: RoutingTable | None, document: dict[str, Any]) -> RoutingTable:
        """Puts a table in force; raises ``StaleEpoch``."""
        return routing.publish(self._database, self._usecase, expected, document)

    def deploy(self, version: str) -> None:
        """Has the challenger's application started."""
        self._applications.deploy(version)

    def withdraw(self, version: str) -> None:
        """Has it removed."""
        self._applications.withdraw(version)

    def standing(self, version: str) -> tuple[Standing, str]:
        """Where it stands, and why."""
        status, message = self._applications.status(version)
        if status is None:
            return Standing.ABSENT, message
        return _STANDING.get(status, Standing.STARTING), message

    def close(self, version: str, outcome: str) -> None:
        """Writes the outcome into the release request."""
        self._database.finish_release(self._usecase, version, outcome)

    def show(self, aliases: dict[str, str]) -> None:
        """Shows the versions as MLflow's aliases."""
        self._registry.show_aliases(self._usecase, aliases)

    def next_request(self) -> ReleaseRequest | None:
        """The oldest release request, claimed; claims end in real time, for they guard against dead processes."""
        return self._database.claim_release(self._usecase, self._holder, _CLAIM_S, SystemClock().now())

    def gateways(self) -> list[str]:
        """The gateways that hold a lease."""
        return self._database.live_leases(gateway_lease(self._usecase, ""), SystemClock().now())


def gateway_lease(usecase: str, gateway: str) -> str:
    """The name of a gateway's lease."""
    return f"gateway/{usecase}/{gateway}"
