"""The rollout controller as a detached Ray actor: it outlives whoever started it, and Ray starts it again when it dies.

``handle`` finds the actor, ``start`` makes sure that there is one.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from deltalake.exceptions import DeltaError
from pydantic import ValidationError
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from sqlalchemy.exc import SQLAlchemyError

from cluster.alerts import Alerts
from cluster.clock import Clock, open_clock
from cluster.database import Database, StaleEpoch, StaleJournal
from cluster.notifications import NotificationFailed, Notifier, Webhook
from cluster.session import NAMESPACE
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.spec import ABTest, UseCase
from pipelines.spec.base import DAY_US, microseconds
from pipelines.training.artifact import ArtifactError
from pipelines.training.registry import Registry, RegistryError
from pipelines.validation.arms import read_arms
from pipelines.validation.paired import complete_days, paired_days
from serving.rollout import audits
from serving.rollout.announcements import Announcer
from serving.rollout.controller import Controller
from serving.rollout.journal import Journal, Situation
from serving.rollout.machine import Phase, State
from serving.rollout.projections import aliases
from serving.rollout.serve_world import ServeWorld

logger = logging.getLogger(__name__)

ALERT, REGISTRY_ALERT, AUDIT_ALERT = "rollout_failing", "registry_failing", "audit_failing"
NOTIFY_ALERT, RESULTS_ALERT = "notifications_failing", "test_results_failing"
_TURN_S = 0.05
_LABELS_S = 1.0
_AUDIT_S = 60.0  # at least so long between audits, also when a replay clock hurries
_AFTER_FAILURE_S, _AFTER_AUDIT_FAILURE_S = 1.0, 600.0
_NOTIFY_S, _AFTER_NOTIFY_FAILURE_S = 1.0, 10.0
_RESTART_S = 30.0
# What the parts around the controller may fail with for a while.
_OUTSIDE = (SQLAlchemyError, RayError, RayServeException, OSError)


class ControllerStarting(RuntimeError):
    """The controller has not read its journal yet; callers go on with what they have."""


class RolloutActor:
    """The actor's class; its methods are called from gateways and from operators."""

    def __init__(self, usecase: str) -> None:
        # Nothing here may fail: Ray does not start an actor again whose constructor raised.
        self._usecase = usecase
        self._made: Controller | None = None
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        for told in ("cluster.alerts", "serving.rollout"):  # what becomes of alerts and releases is said in full
            logging.getLogger(told).setLevel(logging.INFO)
        for work in (self._turn, self._read_labels, self._read_results, self._show, self._audit, self._notify):
            threading.Thread(target=self._ending_with_the_process, args=(work,), daemon=True).start()

    def exchange(self, *arguments: Any) -> dict[str, Any] | None:
        """``Controller.exchange``."""
        return self._controller.exchange(*arguments)

    def command(self, name: str, by: str, reason: str, of_test: bool = False) -> None:
        """``Controller.command``."""
        self._controller.command(name, by, reason, of_test=of_test)

    def start_test(self, test: dict[str, Any], by: str, reason: str, forced: list[str]) -> None:
        """``Controller.start_test``."""
        self._controller.start_test(ABTest.model_validate(test), by, reason, tuple(forced))

    def ping(self) -> None:
        """Answers as soon as the process is there."""

    @property
    def _controller(self) -> Controller:
        if self._made is None:
            raise ControllerStarting(f"the rollout controller of {self._usecase!r} is starting")
        return self._made

    def _ending_with_the_process(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            # Half a controller would be worse than none: Ray starts a whole one, which goes on from the journal.
            logger.exception("the rollout controller of %s ends", self._usecase)
            os._exit(1)

    def _parts(self) -> _Parts:
        settings = Settings.from_environment()
        database, clock = Database(settings.database_url), open_clock(settings)
        tables = Tables(settings.tables_url, settings.storage_options)
        return _Parts(usecases.load(self._usecase), settings, database, clock, tables, Alerts(database, clock))

    def _turn(self) -> None:
        parts, pause, told = self._parts(), threading.Event(), False
        while True:
            try:
                if self._made is None:
                    if (announcer := self._announcer(parts)) is not None:
                        announcer.begin()
                    world = ServeWorld(parts.use_case, parts.settings, parts.database, parts.alerts, parts.clock)
                    self._made = Controller(parts.use_case, Journal(parts.database, self._usecase), world, parts.clock)
                self._made.turn()
                if not told:  # by this process: an earlier one may have opened the alert
                    parts.alerts.resolve(ALERT, self._usecase, "the controller acts")
                    told = True
            except (StaleEpoch, StaleJournal):
                pass  # another controller acted, and its journal was read again
            except _OUTSIDE as error:
                # Nothing is lost: what the state requires is tried again, and gateways keep their last table.
                logger.warning("a turn of the rollout controller of %s failed: %s", self._usecase, error)
                told = False
                _open(parts.alerts, ALERT, self._usecase, error)
                pause.wait(_AFTER_FAILURE_S)
            pause.wait(_TURN_S)

    def _read_labels(self) -> None:
        """Matured outcomes; read only when a day has become complete since those that are known."""
        parts, pause = self._parts(), threading.Event()
        while not pause.wait(_LABELS_S):
            situation = self._made.situation if self._made is not None else Situation()
            state, evidence = situation.state, situation.evidence
            champion, challenger = state.champion, state.challenger
            if state.phase is Phase.WATCHING:
                champion, challenger = state.previous, state.champion
            if not state.judged or champion is None or challenger is None:
                continue
            try:
                labels = situation.policy.labels
                if labels is None:
                    continue
                now, grace = parts.clock.now(), microseconds(labels.grace)
                known = evidence.days[-1].day if evidence.days else evidence.started_us // DAY_US - 1
                if complete_days(parts.use_case, now, grace) - 1 <= known:
                    continue
                days = paired_days(
                    parts.use_case,
                    parts.tables,
                    champion=champion,
                    challenger=challenger,
                    since_us=evidence.started_us,
                    now_us=now,
                    grace_us=grace,
                )
                self._controller.take_labels(state.rollout, days)
            except (StaleEpoch, StaleJournal):
                continue
            except ValidationError:
                continue  # the judge ends a rollout whose policy does not fit
            except (*_OUTSIDE, DeltaError) as error:
                logger.warning("the outcomes of %s could not be read: %s", self._usecase, error)

    def _read_results(self) -> None:
        """The arms of an A/B test by the outcomes so far, every hundredth of the time that it has lasted."""
        parts, pause, read = self._parts(), threading.Event(), (0, 0)
        while not pause.wait(_LABELS_S):
            situation = self._made.situation if self._made is not None else Situation()
            state, began = situation.state, situation.evidence.started_us
            now = parts.clock.now()
            number, last = read
            if state.phase is not Phase.TESTING or (number == state.rollout and (now - last) * 100 < last - began):
                continue
            try:
                arms = read_arms(parts.use_case, parts.tables, situation.test, state.rollout, began)
                self._controller.take_results(state.rollout, arms)
                parts.alerts.resolve(RESULTS_ALERT, self._usecase, "the results of the A/B test are read again")
                read = state.rollout, now
            except (StaleEpoch, StaleJournal):
                continue
            except ValidationError:
                continue  # the controller ends a test that does not fit
            except (*_OUTSIDE, DeltaError, pa.ArrowException) as error:
                logger.warning("the results of an A/B test of %s could not be read: %s", self._usecase, error)
                _open(parts.alerts, RESULTS_ALERT, self._usecase, error)
                pause.wait(_AFTER_FAILURE_S * 10)

    def _show(self) -> None:
        """Keeps MLflow's aliases and this node's copy of a new version up to date. Nothing waits for either."""
        from mlflow.exceptions import MlflowException

        parts, pause = self._parts(), threading.Event()
        registry: Registry | None = None
        shown: tuple[dict[str, str], tuple[str, ...]] | None = None
        while not pause.wait(_TURN_S * 4):
            state = self._made.state if self._made is not None else State()
            wanted = aliases(state)
            if (wanted, state.applications) == shown or not wanted:
                continue
            try:
                registry = registry or Registry(parts.settings)
                if state.phase in (Phase.STARTING, Phase.TESTING):
                    # MLflow is imported here already; a replica on this node is spared that, and so is the question
                    # which views they answer from.
                    for version in filter(None, (*state.applications, state.champion)):
                        registry.download(self._usecase, version, parts.settings.cache_dir / "models")
                registry.show_aliases(self._usecase, wanted)
                parts.alerts.resolve(REGISTRY_ALERT, self._usecase, "the registry takes aliases again")
                shown = wanted, state.applications
            except (MlflowException, RegistryError, ArtifactError, SQLAlchemyError, OSError) as error:
                logger.warning("the registry does not show the versions of %s: %s", self._usecase, error)
                _open(parts.alerts, REGISTRY_ALERT, self._usecase, error)
                pause.wait(_AFTER_FAILURE_S * 10)

    def _audit(self) -> None:
        """Has what was served audited now and then; what differs pauses a rollout."""
        parts, pause, schedule = self._parts(), threading.Event(), audits.Schedule()
        while not pause.wait(_AUDIT_S):
            situation = self._made.situation if self._made is not None else Situation()
            state = situation.state
            rule = (situation.policy if state.tried else parts.use_case.release).skew
            began_us = situation.evidence.started_us if state.tried else None
            try:
                now = parts.clock.now()
                lately = schedule.span(now, rule, began_us, paused=state.paused)
                if rule is None or lately is None:
                    continue
                found = audits.audit(self._usecase, rule, lately)
                if found is not None and not state.paused:
                    self._controller.take_skew(found)
                parts.alerts.resolve(AUDIT_ALERT, self._usecase, "what is served is audited again")
                schedule.done(now)
            except (StaleEpoch, StaleJournal, ControllerStarting):
                continue  # the next audit finds the same
            except (*_OUTSIDE, audits.AuditFailed) as error:
                logger.warning("what %s served could not be audited: %s", self._usecase, error)
                _open(parts.alerts, AUDIT_ALERT, self._usecase, error)
                pause.wait(_AFTER_AUDIT_FAILURE_S)

    def _announcer(self, parts: _Parts) -> Announcer | None:
        url = parts.settings.webhook_url
        return None if url is None else Announcer(self._usecase, parts.database, Webhook(url))

    def _notify(self) -> None:
        """Tells the webhook, if there is one, of this use case's releases, and of alerts, which one controller does."""
        parts, pause = self._parts(), threading.Event()
        if (announcer := self._announcer(parts)) is None:
            return
        notifier = Notifier(parts.database, announcer.webhook, f"{socket.gethostname()}:{os.getpid()}")
        while not pause.wait(_NOTIFY_S):
            try:
                if announcer.turn() + notifier.turn():
                    parts.alerts.resolve(NOTIFY_ALERT, self._usecase, "the webhook takes notifications again")
            except (NotificationFailed, SQLAlchemyError) as error:
                logger.warning("notifications of %s were not sent: %s", self._usecase, error)
                _open(parts.alerts, NOTIFY_ALERT, self._usecase, error)
                pause.wait(_AFTER_NOTIFY_FAILURE_S)


@dataclass(frozen=True)
class _Parts:
    """What a thread of the actor works with."""

    use_case: UseCase
    settings: Settings
    database: Database
    clock: Clock
    tables: Tables
    alerts: Alerts


def _open(alerts: Alerts, name: str, usecase: str, error: Exception) -> None:
    try:
        alerts.open(name, usecase, str(error)[:500])
    except SQLAlchemyError as failure:
        # Without the database there is no place for an alert; gateways report it in their readiness.
        logger.warning("the alert %s of %s could not be opened: %s", name, usecase, failure)


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


def restart(usecase: str) -> None:
    """A controller with the code and the page of now; the one that runs ends, and the journal tells the new one all."""
    with suppress(ValueError):  # none runs
        ray.kill(handle(usecase))
    deadline = time.monotonic() + _RESTART_S
    while True:
        try:
            ray.get(start(usecase).ping.remote(), timeout=_RESTART_S)
            return
        except RayError:  # the old one is still on its way out under the same name
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def handle(usecase: str) -> ActorHandle[Any]:
    """The controller that runs; raises ``ValueError`` when there is none."""
    return ray.get_actor(_name(usecase), namespace=NAMESPACE)


def _name(usecase: str) -> str:
    return f"rollout-{usecase}"
