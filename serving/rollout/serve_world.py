"""The real world of the rollout controller: database, alerts and Serve applications."""

from __future__ import annotations

import os
import secrets
import socket
from typing import Any

from ray.serve.schema import ApplicationStatus

from cluster import processes
from cluster.alerts import Alerts
from cluster.clock import Clock, SystemClock
from cluster.database import Database, ReleaseRequest
from cluster.settings import Settings
from pipelines.features.state import StateError
from pipelines.features.views import Views, open_views
from pipelines.spec import UseCase
from pipelines.training.artifact import ArtifactError, load
from pipelines.training.registry import fetched
from serving import routing
from serving.challenger import Applications
from serving.rollout.projections import ALERTS
from serving.rollout.world import Standing
from serving.routing import RoutingTable

_CLAIM_S = 30.0
_STANDING = {
    ApplicationStatus.RUNNING: Standing.RUNNING,
    ApplicationStatus.DEPLOY_FAILED: Standing.FAILED,
    ApplicationStatus.UNHEALTHY: Standing.FAILED,
}


class ServeWorld:
    """``World`` as it is."""

    def __init__(self, use_case: UseCase, settings: Settings, database: Database, alerts: Alerts, clock: Clock) -> None:
        self._use_case, self._settings, self._clock = use_case, settings, clock
        self._usecase = use_case.name
        self._views: Views | None = None
        self._view_of: dict[str, str] = {}
        self._database = database
        self._alerts = alerts
        self._applications = Applications(use_case.name)
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

    def lacking(self, champion: str, version: str) -> str | None:
        """Why the state that ``version`` answers from is not as far as the champion's; None when it is."""
        if not self._use_case.kept:
            return None  # both answer from the page's only view
        try:
            self._views = self._views or open_views(self._settings, self._use_case)
            ahead, view = self._view(champion, self._views), self._view(version, self._views)
            return None if view == ahead else self._views.behind(view, ahead)
        except (ArtifactError, StateError, LookupError) as error:
            return str(error.args[0])

    def _view(self, version: str, views: Views) -> str:
        """The view that the version was trained on; ``LookupError`` while that cannot be told or is not on the page."""
        if version not in self._view_of:
            directory = fetched(self._usecase, version, self._settings.cache_dir / "models")
            if directory is None:
                raise LookupError(f"version {version} has not come from the registry to this node yet")
            view = load(directory).view
            if view not in views.states:
                raise LookupError(f"version {version} was trained on view {view}, which the controller's page has not")
            self._view_of[version] = view
        return self._view_of[version]

    def close(self, version: str, outcome: str, request: int | None) -> None:
        """Writes the outcome into that release request; a champion that was taken over has none."""
        if request is not None:
            self._database.finish_release(self._usecase, version, outcome, request)

    def tell(self, alerts: dict[str, str]) -> None:
        """Has these alerts open, and no other of the rollout's."""
        for name in ALERTS:
            if name in alerts:
                self._alerts.open(name, self._usecase, alerts[name])
            else:
                self._alerts.resolve(name, self._usecase, "the release has moved on")

    def ask(self, version: str, by: str, reason: str, *, forced: bool) -> None:
        """Has the release of a version asked for, unless it is already and has not begun; ``forced`` past its gates."""
        payload = {"requested_by": by, "reason": reason, "forced": forced, "policy": None}
        self._database.request_release(self._usecase, version, payload, self._clock.now(), again=True)

    def next_request(self) -> ReleaseRequest | None:
        """The oldest release request, claimed; claims end in real time, for they guard against dead processes."""
        return self._database.claim_release(self._usecase, self._holder, _CLAIM_S, SystemClock().now())

    def asked_after(self, request: int) -> str | None:
        """The newest version whose release was asked for after that request; None when there is none."""
        return self._database.newest_release(self._usecase, request)

    def gateways(self) -> list[str]:
        """The gateways that hold a lease, without those whose process on this host has ended."""
        held = self._database.live_leases(gateway_lease(self._usecase, ""), SystemClock().now())
        return [gateway for gateway in held if not _has_ended(gateway)]


def gateway_name() -> str:
    """A name for the gateway in this process; no other has it, and ``gateways`` can tell when the process is gone."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"


def _has_ended(gateway: str) -> bool:
    """Whether it is a process of this host that is gone; of another host only its lease can tell."""
    host, pid, _ = gateway.rsplit(":", 2)
    return host == socket.gethostname() and not processes.runs(int(pid))


def gateway_lease(usecase: str, gateway: str) -> str:
    """The name of a gateway's lease."""
    return f"gateway/{usecase}/{gateway}"
