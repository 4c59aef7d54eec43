"""One model version in a Serve application of its own, so that its crash, leak or slowness stays its own.

``Applications`` deploys and removes challengers for the rollout controller; ``Asker`` is a gateway's way to one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from cluster import session
from cluster.processes import bound_memory
from cluster.settings import Settings
from pipelines import usecases
from serving.drills import DrilledRunner, drill_of
from serving.frames import Reply, pack_reply, pack_rows, unpack_reply, unpack_rows
from serving.line import Busy, Line, Listener, Place
from serving.runner import Rows, load_version

logger = logging.getLogger(__name__)

_CPUS = 0.1
_HANGS_S = 30.0
_PLACE_S, _AGAIN_S = 30.0, 0.2


class Challenger:
    """The deployment: answers from columns that a gateway has made, and times its runner."""

    def __init__(self, usecase: str, version: str) -> None:
        settings = Settings.from_environment()
        # When a node runs out of memory, the kernel or Ray may end a gateway as well as the challenger that took it.
        bound_memory(settings.challenger_memory_mb)
        loaded = load_version(usecases.load(usecase), version, settings, apart=False)
        drill = drill_of(settings.drills, usecase, version)
        self._runner = loaded.runner if drill is None else DrilledRunner(loaded.runner, drill)
        self._listener = Listener(_address(), self._answer)

    def place(self) -> Place:
        """Where gateways ask it."""
        return self._listener.place

    def check_health(self) -> None:
        """Raises when it no longer answers, so that Serve replaces it."""
        if not self._listener.alive():
            raise RuntimeError("it no longer listens")
        if self._listener.busy_s() > _HANGS_S:
            raise RuntimeError(f"it has answered one request for more than {_HANGS_S:g} s")

    def _answer(self, message: bytes) -> bytes:
        """See ``Runner.predict``."""
        rows = unpack_rows(message)
        began = time.perf_counter()
        found = self._runner.predict(rows.columns, rows.strings, rows.level)
        return pack_reply(found, time.perf_counter() - began)


def _address() -> str:
    """That of this node in the cluster: no other interface of the machine is listened on."""
    me = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in session.nodes() if node["NodeID"] == me)


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
    """Asks one challenger; made in any thread, asked in one event loop."""

    def __init__(self, usecase: str, version: str) -> None:
        known = serve.get_app_handle(application(usecase, version))  # raises when there is no such application
        # That one is Serve's for the whole process: a second rollout of a version would get it as the first left it.
        handle: Any = DeploymentHandle(known.deployment_name, known.app_name)
        # Under Serve's throughput flags a handle would live in the loop that first uses it, and could not be made ready
        # beside it.
        handle._init(_run_router_in_separate_loop=True)
        self._handle = handle
        self._place: Place | None = None  # told and not yet used
        self._line: Line | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting: asyncio.Task[Line] | None = None
        self._again_s = -math.inf  # of the loop's clock: it is not connected to before

    def ready(self, timeout_s: float) -> bool:
        """Whether the challenger says where it is within the time: a first request should not have to wait for that."""
        try:
            self._place = self._handle.place.remote().result(timeout_s=timeout_s)
        except TimeoutError:
            return False
        return True

    async def ask(self, rows: Rows) -> Reply:
        """The challenger's answers; raises whatever went wrong with it."""
        line = self._line
        if line is None or line.lost:
            line = await self._connected()
        return unpack_reply(await line.ask(pack_rows(rows)))

    async def _connected(self) -> Line:
        """The line, which one task makes for all who wait, for as long as that takes: with the deadline of a request it
        might never come to an end.
        """
        self._loop = asyncio.get_running_loop()
        if self._connecting is None:
            if self._loop.time() < self._again_s:
                raise Busy("it could not be connected to a moment ago")
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(self._connect_ended)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Line:
        place, self._place = self._place, None
        if place is None:  # it was started again, and is elsewhere
            found: Place = await asyncio.wait_for(self._handle.place.remote(), _PLACE_S)
            place = found
        return await asyncio.wait_for(Line.connect(place), _PLACE_S)

    def _connect_ended(self, task: asyncio.Task[Line]) -> None:
        self._connecting = None
        if task.cancelled() or task.exception() is not None:
            self._again_s = task.get_loop().time() + _AGAIN_S
        else:
            self._line = task.result()

    def close(self) -> None:
        """Lets go of the line and of the handle's connections."""
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._let_go)
            except RuntimeError:  # the loop has ended, and with it what it held
                logger.debug("the line to a challenger was gone with its loop")
        self._handle.shutdown()

    def _let_go(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._line is not None:
            self._line.close()
