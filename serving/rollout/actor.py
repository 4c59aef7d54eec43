"""The rollout controller as a detached Ray actor: it outlives whoever started it, and Ray starts it again when it dies.

``handle`` finds the actor, ``start`` makes sure that there is one.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import ray
from deltalake.exceptions import DeltaError
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from sqlalchemy.exc import OperationalError

from cluster.alerts import Alerts
from cluster.clock import open_clock
from cluster.database import Database, StaleEpoch, StaleJournal
from cluster.session import NAMESPACE
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.spec.base import microseconds
from pipelines.validation.paired import paired_days
from serving.rollout.controller import Controller
from serving.rollout.journal import Journal
from serving.rollout.machine import Phase
from serving.rollout.world import ServeWorld

logger = logging.getLogger(__name__)

ALERT = "rollout_failing"
_TURN_S = 0.05
_LABELS_S = 1.0
_AFTER_FAILURE_S = 1.0


class RolloutActor:
    """The actor's class; its methods are called from gateways and from operators."""

    def __init__(self, usecase: str) -> None:
        settings = Settings.from_environment()
        self._use_case = usecases.load(usecase)
        database = Database(settings.database_url)
        self._clock = open_clock(settings)
        self._tables = Tables(settings.tables_url, settings.storage_options)
        self._alerts = Alerts(database, self._clock)
        world = ServeWorld(self._use_case, database, settings)
        self._controller = Controller(self._use_case, Journal(database, usecase), world, self._clock)
        self._wheel = threading.Thread(target=self._ending_with_the_process, args=(self._turn,), daemon=True)
        self._labels = threading.Thread(target=self._ending_with_the_process, args=(self._read_labels,), daemon=True)
        self._wheel.start()
        self._labels.start()

    def exchange(self, *arguments: Any) -> dict[str, Any] | None:
        """``Controller.exchange``."""
        return self._controller.exchange(*arguments)

    def command(self, name: str, by: str, reason: str) -> dict[str, Any]:
        """``Controller.command``."""
        return self._controller.command(name, by, reason)

    def status(self) -> dict[str, Any]:
        """``Controller.status``."""
        return self._controller.status()

    def _ending_with_the_process(self, work: Any) -> None:
        try:
            work()
        except BaseException:
            # Half a controller would be worse than none: Ray starts a whole one, which goes on from the journal.
            logger.exception("the rollout controller of %s ends", self._use_case.name)
            os._exit(1)

    def _turn(self) -> None:
        from mlflow.exceptions import MlflowException

        pause, failing = threading.Event(), False
        while True:
            try:
                self._controller.turn()
                if failing:
                    self._alerts.resolve(ALERT, self._use_case.name, "the controller acts again")
                failing = False
            except (StaleEpoch, StaleJournal):
                pass  # another controller acted; the next turn begins from what it did
            except (OperationalError, RayError, RayServeException, MlflowException) as error:
                # Nothing is lost: what the state requires is tried again, and gateways keep their last table.
                logger.warning("a turn of the rollout controller of %s failed: %s", self._use_case.name, error)
                if not isinstance(error, OperationalError):
                    self._alerts.open(ALERT, self._use_case.name, str(error)[:500])
                    failing = True
                pause.wait(_AFTER_FAILURE_S)
            pause.wait(_TURN_S)

    def _read_labels(self) -> None:
        pause = threading.Event()
        while not pause.wait(_LABELS_S):
            situation = self._controller.situation
            state, labels = situation.state, situation.policy.labels
            tried = state.phase in (Phase.SHADOW, Phase.CANARY, Phase.PROMOTING)
            if not tried or labels is None or state.champion is None or state.challenger is None:
                continue
            try:
                days = paired_days(
                    self._use_case,
                    self._tables,
                    champion=state.champion,
                    challenger=state.challenger,
                    since_us=situation.evidence.started_us,
                    now_us=self._clock.now(),
                    grace_us=microseconds(labels.grace),
                )
                self._controller.take_labels(state.rollout, days)
            except (StaleEpoch, StaleJournal):
                continue
            except (OSError, DeltaError, OperationalError) as error:
                logger.warning("the outcomes of %s could not be read: %s", self._use_case.name, error)


def start(usecase: str) -> ActorHandle[Any]:
    """The controller of the use case; started, detached, when there is none. Ray must be connected."""
    actor: Any = ray.remote(RolloutActor)
    found: ActorHandle[Any] = actor.options(
        name=_name(usecase),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=64,
    ).remote(usecase)
    return found


def handle(usecase: str) -> ActorHandle[Any]:
    """The controller that runs; raises ``ValueError`` when there is none."""
    return ray.get_actor(_name(usecase), namespace=NAMESPACE)


def _name(usecase: str) -> str:
    return f"rollout-{usecase}"
