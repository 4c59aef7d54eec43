"""What a person may do to a rollout, for the HTTP routes and the command line alike."""

from __future__ import annotations

import threading
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from deltalake.exceptions import DeltaError
from pydantic import ValidationError
from ray.exceptions import GetTimeoutError, RayError

from cluster.clock import Clock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.spec import ABTest, ReleasePolicy
from pipelines.training.registry import Registry
from pipelines.validation.differences import read_differences
from serving import releases
from serving.problems import Problem
from serving.rollout import actor
from serving.rollout.journal import Journal, Situation
from serving.rollout.machine import NotAllowed
from serving.rollout.projections import describe, describe_test

_CALL_S = 10.0


class Rollouts:
    """The rollouts of one use case, as an operator sees them."""

    def __init__(self, usecase: str, settings: Settings, database: Database, clock: Clock) -> None:
        self._usecase, self._settings, self._database, self._clock = usecase, settings, database, clock
        self._journal = Journal(database, usecase)
        self._known = Situation()
        self._test: tuple[int, Situation | None] | None = None  # by the number of the rollout that began after it
        self._lock = threading.Lock()

    def status(self) -> dict[str, Any]:
        """Where the release stands, from the journal: it needs no controller."""
        situation = self._situation()
        tried = situation.state.challenger
        waiting = [version for version in self._database.open_releases(self._usecase) if version != tried]
        return describe(situation, self._clock.now()) | {"waiting": waiting}

    def differences(self) -> dict[str, Any]:
        """What the version that is tried, or was tried last, says differently; ``Problem`` 404 when there is none."""
        situation = self._situation()
        version = situation.state.challenger or situation.state.ended
        found = None
        if version is not None and not situation.state.test:
            tables = Tables(self._settings.tables_url, self._settings.storage_options)
            use_case, since_us = usecases.load(self._usecase), situation.evidence.started_us
            try:
                found = read_differences(use_case, tables, version, since_us)
            except (DeltaError, OSError, pa.ArrowException) as error:
                raise Problem(503, "The table of predictions cannot be read", str(error), retry_after_s=1) from error
        if found is None:
            raise Problem(404, "There are no differences", "No instance was answered by two versions in this rollout.")
        return {**asdict(found), "version": version, "quantiles": {f"{q:g}": v for q, v in found.quantiles.items()}}

    def test(self) -> dict[str, Any]:
        """Where the last A/B test stands, from the journal; ``Problem`` 404 when there was none."""
        return describe_test(self._test_situation(), self._clock.now())

    def test_report(self) -> str:
        """The last A/B test as an HTML page; ``Problem`` 404 when there was none, 409 when this code cannot read it."""
        from serving.rollout.pages import report  # which draws, and takes half a second to import

        try:
            return report(self._usecase, self._test_situation(), self._clock.now())
        except ValidationError as error:
            detail = f"Its definition, journalled by other code, does not fit: {error.errors()[0]['msg']}."
            raise Problem(409, "The A/B test cannot be told of", detail) from error

    def start_test(self, test: ABTest, *, by: str, force: bool, reason: str) -> dict[str, Any]:
        """Begins an A/B test; ``Problem`` 409 when a version may not answer, or something else is being tried."""
        registry = Registry(self._settings)
        allowed = partial(
            releases.may_answer, self._usecase, force=force, reason=reason, database=self._database, registry=registry
        )
        try:
            forced = [version for version in test.versions if allowed(version)]
        except releases.ReleaseError as error:
            raise Problem(409, "The A/B test cannot begin", str(error)) from error
        self._say("start_test", test.model_dump(mode="json"), by, reason, forced)
        return self.test()

    def command_test(self, name: str, *, by: str, reason: str) -> dict[str, Any]:
        """``command`` for the A/B test that runs; ``Problem`` 409 when none does."""
        self._say("command", name, by, reason, True)
        return self.test()

    def _test_situation(self) -> Situation:
        situation = self._situation()
        if situation.state.test:
            return situation
        # A test that is over is not read again for every question; the last one can only be followed by a newer one,
        # which is then the situation of now for as long as it runs.
        with self._lock:
            if self._test is None or self._test[0] != situation.state.rollout:
                self._test = situation.state.rollout, self._journal.test()
            found = self._test[1]
        if found is None:
            raise Problem(
                404, "There is no A/B test", f"None ever began; POST /v1/{self._usecase}/ab/start begins one."
            )
        return found

    def _situation(self) -> Situation:
        with self._lock:
            self._known = situation = self._journal.situation(self._known)
        return situation

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
        self._say("command", name, by, reason)
        return self.status()

    def _say(self, method: str, *words: Any) -> None:
        try:
            ray.get(getattr(actor.handle(self._usecase), method).remote(*words), timeout=_CALL_S)
        except NotAllowed as error:
            raise Problem(409, "That does not fit what is being released", str(error.args[0])) from error
        except (RayError, GetTimeoutError, ValueError) as error:
            raise Problem(
                503,
                "The rollout controller does not answer",
                f"Look at the rollout before you repeat this: it may have been taken. Gateways keep their table, and "
                f"`tidegate deploy {self._usecase}` starts a new controller. {error}",
            ) from error
