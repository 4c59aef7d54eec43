"""What a person may do to a rollout, for the HTTP routes and the command line alike."""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.clock import Clock
from cluster.database import Database
from cluster.settings import Settings
from pipelines.spec import ReleasePolicy
from pipelines.training.registry import Registry
from serving import releases
from serving.problems import Problem
from serving.rollout import actor
from serving.rollout.journal import Journal, Situation
from serving.rollout.machine import NotAllowed
from serving.rollout.projections import describe

_CALL_S = 10.0


class Rollouts:
    """The rollouts of one use case, as an operator sees them."""

    def __init__(self, usecase: str, settings: Settings, database: Database, clock: Clock) -> None:
        self._usecase, self._settings, self._database, self._clock = usecase, settings, database, clock
        self._journal = Journal(database, usecase)
        self._known = Situation()
        self._lock = threading.Lock()

    def status(self) -> dict[str, Any]:
        """Where the release stands, from the journal: it needs no controller."""
        with self._lock:
            self._known = situation = self._journal.situation(self._known)
        tried = situation.state.challenger
        waiting = [version for version in self._database.open_releases(self._usecase) if version != tried]
        return describe(situation, self._clock.now()) | {"waiting": waiting}

    def start(self, version: str, *, by: str, policy: ReleasePolicy | None, force: bool, reason: str) -> None:
        """Asks for a release; raises ``Problem`` 409 when it cannot be asked for."""
        try:
            releases.request(
                self._usecase,
                version,
                by=by,
                policy=policy,
                force=force,
                reason=reason,
                database=self._database,
                registry=Registry(self._settings),
                clock=self._clock,
            )
        except releases.ReleaseError as error:
            raise Problem(409, "The release cannot be asked for", str(error)) from error

    def command(self, name: str, *, by: str, reason: str) -> dict[str, Any]:
        """One of the controller's ``COMMANDS``; ``Problem`` 409 when it does not fit, 503 without a controller."""
        try:
            ray.get(actor.handle(self._usecase).command.remote(name, by, reason), timeout=_CALL_S)
        except NotAllowed as error:
            raise Problem(409, "That does not fit the rollout", str(error.args[0])) from error
        except (RayError, GetTimeoutError, ValueError) as error:
            raise Problem(
                503,
                "The rollout controller does not answer",
                f"Look at the rollout before you repeat this: it may have been taken. Gateways keep their table, and "
                f"`tidegate deploy {self._usecase}` starts a new controller. {error}",
            ) from error
        return self.status()
