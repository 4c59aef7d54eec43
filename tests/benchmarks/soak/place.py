"""A use case served by two gateways on a cluster of its own: real demand, a model fitted in seconds, one champion."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import processes, session
from cluster.database import Database
from cluster.settings import Settings
from pipelines import usecases
from pipelines.training.registry import Registry
from serving.auth import owner_key
from serving.client import Client
from serving.demo.report import Size
from serving.drills import Drill, register_copy
from serving.rollout.journal import Journal
from tests.benchmarks.harness import say

USECASE = "aqua"
GATEWAYS = 2
_SIZE = Size(history_days=430, replay_days=76, trials=None)


@dataclass(frozen=True)
class Place:
    """The running cluster as callers and operators reach it, and its processes."""

    settings: Settings
    running: session.Session
    registry: Registry
    database: Database
    journal: Journal

    def client(self, **options: Any) -> Client:
        """A caller's way to the gateways."""
        return Client(USECASE, url=self.running.http, api_key=owner_key(self.settings), **options)

    def copy(self, champion: str, drill: Drill | None) -> str:
        """A further version, the champion's model with that fault; its number."""
        return register_copy(USECASE, champion, drill, self.registry, self.settings)

    def pids(self, prefix: str) -> list[int]:
        """The processes of this cluster, and of no other, whose title begins like that."""
        found = processes.session_pids(self.running.environment_marker)
        return [pid for pid in found if processes.command(pid).startswith(prefix)]


@contextlib.contextmanager
def served(home: Path) -> Iterator[Place]:
    """The place for the length of a block; afterwards none of its processes runs.

    What a killed run left in ``home`` is ended and removed first; compiled code may stay.
    """
    settings = Settings(
        home=home,
        clock="replay",
        http_port=session.free_port(),
        drain_seconds=0.5,
        gateway_replicas=GATEWAYS,
        ray_rows=10_000_000,  # Arrow alone is sooner done with so few
        drills=home / "drills.json",
    )
    session.down(settings)
    for entry in settings.home.iterdir() if settings.home.exists() else ():
        if entry.is_dir():
            shutil.rmtree(entry if entry != settings.cache_dir else entry / "models", ignore_errors=True)
        else:
            entry.unlink()
    running = session.up(settings)
    try:
        # After `up`: Serve reads its flags when it is imported.
        from serving.app import deploy
        from serving.demo.steps import Demo

        demo = Demo.over(usecases.load(USECASE), settings, say, running.http, _SIZE)
        for step in (demo.contract, demo.features, demo.train):
            step()
        deploy(USECASE, settings)
        session.disconnect()
        database = Database(settings.database_url)
        yield Place(settings, running, Registry(settings), database, Journal(database, USECASE))
    finally:
        session.disconnect()
        session.down(settings)  # raises when a process of the cluster would not end
