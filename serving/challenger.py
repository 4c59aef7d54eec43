"""One model version in a Serve application of its own, so that its crash, leak or slowness stays its own.

``Applications`` deploys and removes challengers for the rollout controller; ``Asker`` is a gateway's way to one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from cluster.processes import bound_memory
from cluster.settings import Settings
from pipelines import usecases
from pipelines.training.artifact import Prediction
from serving.drills import DrilledRunner, drill_of
from serving.runner import Rows, load_version

_CPUS = 0.1


@dataclass(frozen=True)
class Reply:
    """A challenger's answers [n] each, and how long it spent inside the runner."""

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    seconds: float

    @property
    def prediction(self) -> Prediction:
        """The answers as a runner gives them."""
        return Prediction(self.value, self.lower, self.upper)


class Challenger:
    """The deployment: answers from columns that a gateway has made, and times its runner."""

    def __init__(self, usecase: str, version: str) -> None:
        settings = Settings.from_environment()
        # When a node runs out of memory, the kernel or Ray may end a gateway as well as the challenger that took it.
        bound_memory(settings.challenger_memory_mb)
        loaded = load_version(usecases.load(usecase), version, settings, apart=False)
        drill = drill_of(settings.drills, usecase, version)
        self._runner = loaded.runner if drill is None else DrilledRunner(loaded.runner, drill)

    def predict(self, rows: Rows) -> Reply:
        """Answers n rows; see ``Runner.predict``."""
        began = time.perf_counter()
        found = self._runner.predict(rows.columns, rows.strings, rows.level)
        return Reply(found.value, found.lower, found.upper, time.perf_counter() - began)


def application(usecase: str, version: str) -> str:
    """The name of a challenger's Serve application."""
    return f"{usecase}-challenger-{version}"


class Applications:
    """A use case's challengers as Serve applications. Nothing here waits; ``status`` tells what came of it."""

    def __init__(self, usecase: str) -> None:
        self._usecase = usecase

    def deploy(self, version: str) -> None:
        """Has the application started, unless it is there."""
        name = application(self._usecase, version)
        if self._all().get(name) is not None:
            return
        deployment = serve.deployment(
            name="challenger",
            num_replicas=1,
            max_ongoing_requests=32,
            max_queued_requests=64,
            ray_actor_options={"num_cpus": _CPUS},
            graceful_shutdown_timeout_s=2,
            graceful_shutdown_wait_loop_s=0.2,
            health_check_period_s=2,
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )(Challenger)
        serve._run(deployment.bind(self._usecase, version), _blocking=False, name=name, route_prefix=None)

    def withdraw(self, version: str) -> None:
        """Has the application removed, if it is there."""
        name = application(self._usecase, version)
        if self._all().get(name) not in (None, ApplicationStatus.DELETING):
            serve.delete(name, _blocking=False)

    def status(self, version: str) -> tuple[ApplicationStatus | None, str]:
        """Where the application stands (None: there is none), and Serve's message about it."""
        name = application(self._usecase, version)
        found = serve.status().applications.get(name)
        if found is None:
            return None, ""
        causes = [deployment.message for deployment in found.deployments.values() if deployment.message]
        return found.status, " ".join([found.message, *causes]).strip()

    def _all(self) -> dict[str, ApplicationStatus]:
        return {name: found.status for name, found in serve.status().applications.items()}


class Asker:
    """Asks one challenger; made in any thread, asked in an event loop."""

    def __init__(self, usecase: str, version: str) -> None:
        known = serve.get_app_handle(application(usecase, version))  # raises when there is no such application
        # That one is Serve's for the whole process: a second rollout of a version would get it as the first left it.
        handle: Any = DeploymentHandle(known.deployment_name, known.app_name)
        # Under Serve's throughput flags a handle would live in the loop that first uses it, and could not be made ready
        # beside it.
        handle._init(_run_router_in_separate_loop=True)
        self._handle = handle

    def ready(self, timeout_s: float) -> bool:
        """Whether the handle knows a replica within the time: a first request should not have to wait for that."""
        deadline = time.monotonic() + timeout_s
        while not self._handle.running_replicas_populated():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    async def ask(self, rows: Rows) -> Reply:
        """The challenger's answers; raises whatever went wrong with it."""
        reply: Reply = await self._handle.predict.remote(rows)
        return reply

    def close(self) -> None:
        """Lets go of the handle's connections."""
        self._handle.shutdown()
