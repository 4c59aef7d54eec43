"""A retraining cycle whose search and training take no time, and a driver that kills itself after a named step.

What is faked is the work; the trigger, the journal, the release request and their order are the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.clock import SystemClock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from cluster.triggers import Triggers
from pipelines.contracts import leases
from pipelines.retraining import cycle
from pipelines.retraining.cycle import CycleReport
from pipelines.spec import RetrainPolicy, SearchSpace, UseCase
from pipelines.training.registry import ModelVersion
from pipelines.training.search import Search, Trial
from tests.model import demand

POLICY = RetrainPolicy(
    search=SearchSpace(learning_rate=(2e-3, 4e-3), hidden=((32, 16), (8,)), trials=2, holdout=timedelta(days=10)),
    cool_down=timedelta(0),
)
STEPS = ("claimed", "pinned", "searched", "trained", "noted", "judged", "resolved", "closed")


def use_case(**changes: object) -> UseCase:
    return demand.use_case(**changes).model_copy(update={"retraining": POLICY})


@dataclass
class World:
    """Registered versions are lines of a file, so that they outlive a killed process."""

    home: Path
    passes: bool = True

    def __post_init__(self) -> None:
        self.settings = Settings(home=self.home)
        self.database = Database(self.settings.database_url)
        self.database.create()
        self.versions = self.home / "versions"
        self.searches = self.home / "searches"

    def made(self) -> list[str]:
        """The versions registered so far."""
        return self.versions.read_text().split() if self.versions.exists() else []

    def version(self, model: str, version: str) -> ModelVersion:
        """As ``Registry.version``."""
        assert version in self.made()
        report = {"gates": [{"name": "gate", "passed": self.passes}], "test": {"mae": 1.0}}
        return ModelVersion(model, version, "run", "", self.passes, {"gates": json.dumps(report)})

    def run(self, after: Any = cycle._nothing) -> CycleReport | None:
        """One attempt at the pending trigger."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cycle, "backfill", lambda *_, **__: _Anything())
            patch.setattr(cycle, "load_examples", lambda *_, **__: None)
            patch.setattr(cycle, "split", lambda *_: _Anything())
            patch.setattr(cycle, "search", self._search)
            patch.setattr(cycle, "train", self._train)
            patch.setattr(Tables, "version", lambda *_: 41)
            return cycle.run(
                use_case(),
                tables=Tables(self.settings.tables_url),
                database=self.database,
                settings=self.settings,
                clock=SystemClock(),
                registry=self,
                after=after,
            )

    def _search(self, *_: Any, **__: Any) -> Search:
        with self.searches.open("a") as file:
            file.write("x")
        return Search({"hidden": (8,)}, "mae", (Trial({"hidden": (8,)}, 0.5, 1.0),), 100, 10)

    def _train(self, case: UseCase, *, trigger: int, events_version: int, **_: Any) -> Any:
        assert case.model.hidden == (8,)  # as the search chose, also after a journey through JSON
        assert events_version == 41
        version = str(len(self.made()) + 1)
        with self.versions.open("a") as file:
            file.write(f"{version}\n")
        requested = self.passes and Triggers(self.database).request_release(trigger, version, {}, 1)
        return _Anything(version=version, requested=requested)


class _Anything:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        return 0


def main(home: str, step: str) -> None:
    """Run the cycle and die right after ``step``; what a dead process held is free again soon."""
    leases._SECONDS = cycle._CLAIM_S = 0.5

    def kill(done: str) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    World(Path(home)).run(kill)


if __name__ == "__main__":
    main(*sys.argv[1:])
