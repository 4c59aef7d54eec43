"""Deploys the gateway of a use case as a Serve application of its own: ``python -m serving.app aqua``."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

from ray import serve

from cluster import session
from cluster.database import Database
from cluster.redis_url import address, is_node_local
from cluster.settings import Settings
from pipelines import usecases
from serving import routing
from serving.gateway import Gateway
from serving.releases import ReleaseError
from serving.rollout import actor
from serving.routing import RoutingTable

_ADOPTION_S = 60.0


@serve.ingress()
class _Gateway:
    """One replica of a use case's gateway."""

    def __init__(self, usecase: str) -> None:
        # The node's own settings: the cluster was started with them, and no key travels through Serve's configuration.
        self.gateway = Gateway(usecase, Settings.from_environment())

    def __serve_build_asgi_app__(self) -> Any:
        # Serve starts uvicorn's lifespan, so the app must answer it; FastAPI does.
        return self.gateway

    def check_health(self) -> None:
        """Serve restarts the replica when this raises: a dead drain or projection must not go on unseen."""
        self.gateway.check()

    async def __del__(self) -> None:
        if hasattr(self, "gateway"):
            await asyncio.to_thread(self.gateway.close)


def refuse_node_local(settings: Settings, nodes: int) -> None:
    """Raises ``ReleaseError``, saying what to set, when ``nodes`` nodes cannot share what ``settings`` names.

    LMDB and SQLite lock and map files of one machine: on several, each node would have a log, a state and a control
    plane of its own.
    """
    if nodes <= 1:
        return
    wrong = []
    if settings.state_url is None:
        wrong.append(f"log and state are LMDB files in {settings.state_dir}: set TIDEGATE_STATE_URL to a Redis server")
    elif is_node_local(settings.state_url):
        wrong.append(
            f"TIDEGATE_STATE_URL is {address(settings.state_url)}, another server on every node: name its host"
        )
    for variable, url in (
        ("TIDEGATE_DATABASE_URL", settings.database_url),
        ("TIDEGATE_MLFLOW_URL", settings.mlflow_url),
    ):
        if url.startswith("sqlite"):
            wrong.append(f"{variable} is a SQLite file: set it to a PostgreSQL URL")
    if wrong:
        raise ReleaseError(
            f"the cluster has {nodes} nodes, and they cannot share what belongs to one: {'; '.join(wrong)}"
        )


def deploy(usecase: str, settings: Settings) -> RoutingTable:
    """Starts the rollout controller and, once there is a champion, the gateway; waits until it answers.

    Raises ``ReleaseError`` when no version may answer, or when the nodes of the cluster cannot share log, state or
    database.
    """
    refuse_node_local(settings, sum(node["Alive"] for node in session.nodes()))
    use_case = usecases.load(usecase)
    database = Database(settings.database_url)
    database.create()
    actor.restart(use_case.name)
    table = _champion(use_case.name, database)
    deployment = serve.deployment(
        name="gateway",
        num_replicas=settings.gateway_replicas,
        max_ongoing_requests=256,
        max_queued_requests=1024,
        ray_actor_options={"num_cpus": 0.25},
        graceful_shutdown_timeout_s=10,
        health_check_period_s=5,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(_Gateway)
    serve.run(
        deployment.bind(use_case.name),
        name=use_case.name,
        route_prefix=f"/v1/{use_case.name}",
    )
    return table


def _champion(usecase: str, database: Database) -> RoutingTable:
    """The table in force; the controller makes the first one from the oldest release request."""
    deadline = time.monotonic() + _ADOPTION_S
    while (table := routing.read(database, usecase)) is None:
        if not database.open_releases(usecase):
            raise ReleaseError(
                f"{usecase!r} has no champion and no release request: run `python -m pipelines.train {usecase}` and "
                "see whether the version's gates passed"
            )
        if time.monotonic() > deadline:
            raise ReleaseError(f"the rollout controller of {usecase!r} made no champion within {_ADOPTION_S:g} s")
        time.sleep(0.05)
    return table


def main(arguments: list[str] | None = None) -> int:
    """The job's entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("usecase", choices=usecases.names())
    options = parser.parse_args(arguments)
    settings = Settings.from_environment()
    session.connect(settings)
    table = deploy(options.usecase, settings)
    sys.stdout.write(f"{options.usecase}: version {table.champion} answers (epoch {table.epoch})\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
