"""How a gateway follows the controller: one thread brings evidence and takes newer routing tables.

Without the controller the last table goes on answering and the database is asked instead. A newer table is loaded
and warmed beside the old one and takes effect in one assignment.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.serve.exceptions import RayServeException
from sqlalchemy.exc import SQLAlchemyError

from cluster.clock import SystemClock
from cluster.database import Database
from cluster.settings import Settings
from pipelines.spec import UseCase
from serving import routing
from serving.challenger import Asker
from serving.frames import Reply
from serving.rollout.actor import handle, start
from serving.rollout.serve_world import gateway_lease, gateway_name
from serving.routing import Challenger, RoutingTable, UnknownTable
from serving.runner import DescribedVersion, LoadedVersion, Rows, VersionRefused, describe_version, load_version
from serving.split import Split, Variant
from serving.tally import Tally
from serving.trial import Trial
from serving.way import Allowed

logger = logging.getLogger(__name__)

_REPORT_S = 0.2
_LONG_POLL_S = 2.0
_WITHOUT_CONTROLLER_S = 0.5
_LEASE_S, _RENEW_S = 15.0, 4.0
_CALL_S = 10.0
_ASKER_READY_S = 3.0
_DESCRIBED_S = 0.2
_LOAD_TRIES = 3
_AFTER_REFUSAL_S = 5.0


@dataclass(frozen=True)
class Serving:
    """What answers now."""

    table: RoutingTable
    champion: LoadedVersion
    trial: Trial | None = None
    split: Split | None = None


@dataclass(frozen=True)
class _Refusal:
    """A version that did not load: why, how often, and from when (monotonic seconds) it may be tried again."""

    reason: str
    tries: int
    again_s: float


class Follower:
    """Keeps ``serving`` up to the newest routing table; ``close`` ends it."""

    def __init__(
        self,
        use_case: UseCase,
        settings: Settings,
        database: Database,
        warm: Callable[[LoadedVersion | DescribedVersion], None],
    ) -> None:
        """Raises ``RuntimeError`` before the first champion, ``VersionRefused`` when it does not load.

        ``warm`` makes ready what a version's rows are made of; it may raise ``VersionRefused``.
        """
        table = routing.read(database, use_case.name)
        if table is None:
            raise RuntimeError(f"{use_case.name!r} has no champion: release a version before its gateway starts")
        self.gateway = gateway_name()
        self.failure: str | None = None
        self._use_case, self._settings, self._database, self._warm = use_case, settings, database, warm
        self._tally = Tally(self.gateway)
        self._allowed = Allowed(*use_case.contract.field(use_case.model.target.field).limits)
        self._loaded = {table.champion: self._load(table.champion)}
        self._refused: dict[str, _Refusal] = {}
        self._loading: dict[str, Future[LoadedVersion]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._number: int | None = None
        self._askers: dict[str, Asker] = {}
        self._described: dict[str, DescribedVersion] = {}
        self._describing: dict[str, Future[DescribedVersion]] = {}
        self._leaving: list[tuple[float, Asker]] = []
        self._actor: Any = None
        self._renewed = -_RENEW_S
        self._stop = threading.Event()
        # Whatever is tried by this first table comes with the first turn.
        self.serving = Serving(table, self._loaded[table.champion])
        self._thread = threading.Thread(target=self._follow_to_the_end, name="following", daemon=True)
        self._thread.start()

    def refused(self) -> dict[str, str]:
        """The versions that cannot be loaded or tried here at the moment, and why."""
        return {version: refusal.reason for version, refusal in self._refused.items()}

    def alive(self) -> bool:
        """Whether the thread still follows."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Gives the lease back and stops; what was counted since the last report is lost."""
        self._stop.set()
        self._thread.join(timeout=_CALL_S)
        self._loader.shutdown(wait=False, cancel_futures=True)
        try:
            self._database.release_lease(gateway_lease(self._use_case.name, self.gateway), self.gateway)
        except SQLAlchemyError as error:
            logger.warning("the lease of gateway %s was not given back: %s", self.gateway, error)

    def _follow_to_the_end(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            self.failure = f"it ended by {error!r}"  # which the health check tells Serve, whose log people read
            raise

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._renew()
                newest = self._exchange()
            except SQLAlchemyError as error:
                self.failure = f"the database does not answer: {error}"
                self._stop.wait(_WITHOUT_CONTROLLER_S)
                continue
            except UnknownTable as error:
                self.failure = str(error)  # the last table goes on answering
                self._stop.wait(_WITHOUT_CONTROLLER_S)
                continue
            self._prepare()
            try:
                self._apply(newest or self.serving.table)
                self.failure = None
            except VersionRefused as error:
                self.failure = str(error)  # the last table goes on answering; readiness reports why
                self._stop.wait(_AFTER_REFUSAL_S)
            self._let_go()

    def _exchange(self) -> RoutingTable | None:
        """A newer table, or None; from the controller, or without it from the database."""
        report = self._tally.report()
        busy = bool(self.serving.table.tried) or bool(self._loading)
        wait_s = _REPORT_S if busy else _LONG_POLL_S
        try:
            self._actor = self._actor or handle(self._use_case.name)
            found = ray.get(
                self._actor.exchange.remote(
                    self.gateway,
                    self.serving.table.epoch,
                    sorted(self._loaded),
                    {v: refusal.reason for v, refusal in self._refused.items() if refusal.tries >= _LOAD_TRIES},
                    report.model_dump(mode="json") if report else None,
                    wait_s,
                ),
                timeout=wait_s + _CALL_S,
            )
        except (RayError, GetTimeoutError, ValueError) as error:
            logger.warning("the rollout controller of %s does not answer: %s", self._use_case.name, error)
            self._actor = None
            self._start_controller()
            self._stop.wait(_WITHOUT_CONTROLLER_S)
            newest = routing.read(self._database, self._use_case.name)
            return newest if newest is not None and newest.epoch > self.serving.table.epoch else None
        if report is not None:
            self._tally.acknowledged()
        return None if found is None else routing.parse(found)

    def _prepare(self) -> None:
        """Loads, in a thread beside this one, what the table wants to be ready."""
        now = time.monotonic()
        for version in self.serving.table.versions(self.gateway) - self._loaded.keys() - self._loading.keys():
            if version not in self._refused or self._refused[version].again_s <= now:
                self._loading[version] = self._loader.submit(self._load, version)
        for version, future in list(self._loading.items()):
            if future.done():
                del self._loading[version]
                try:
                    self._loaded[version] = future.result()
                    self._refused.pop(version, None)
                except VersionRefused as error:
                    self._refuse(version, error)

    def _refuse(self, version: str, error: VersionRefused) -> None:
        """Perhaps only the registry was away, or its state is being built: it counts as refused after some tries."""
        tries = self._refused[version].tries + 1 if version in self._refused else 1
        self._refused[version] = _Refusal(str(error), tries, time.monotonic() + _AFTER_REFUSAL_S)

    def _apply(self, table: RoutingTable) -> None:
        now = self.serving
        if table.epoch < now.table.epoch:
            return  # of a call that was overtaken
        if table.champion not in self._loaded:
            self._loaded[table.champion] = self._load(table.champion)
        champion = self._loaded[table.champion]
        self._leave(table)
        trial, split = self._trial(table, champion), self._split(table)
        if table is not now.table or trial is not now.trial or split is not now.split:
            self.serving = Serving(table, champion, trial, split)
        kept = table.versions(self.gateway)
        self._loaded = {version: loaded for version, loaded in self._loaded.items() if version in kept}
        kept |= set(table.tried)
        self._refused = {version: why for version, why in self._refused.items() if version in kept}

    def _trial(self, table: RoutingTable, champion: LoadedVersion) -> Trial | None:
        """The trial that the table calls for; None as long as its challenger cannot be asked."""
        wanted, trial = table.challenger, self.serving.trial
        if wanted is None:
            return None
        if trial is not None and not _differ(wanted, trial.challenger):
            trial.follow(wanted)
            return trial
        if wanted.watch:
            return self._watch(wanted, champion)
        way = self._way(wanted.version)
        if way is None:
            return None
        # Fixed for the whole rollout, from the champion's past on this node, so both versions are held to one limit.
        slow_s = max(wanted.slow_factor * champion.median_s(), wanted.slow_floor_ms / 1e3)
        return Trial(wanted, way.ask, slow_s, self._tally, self._allowed, table.champion, way.described)

    def _watch(self, wanted: Challenger, champion: LoadedVersion) -> Trial | None:
        """The watch over a champion beside the version before it, which answers its copies in this process."""
        before = self._loaded.get(wanted.version)
        if before is None:
            return None  # it is being loaded

        async def ask(rows: Rows) -> Reply:
            found, took = await asyncio.to_thread(before.predict, rows)
            return Reply(found.value, found.lower, found.upper, took)

        slow_s = max(wanted.slow_factor * before.median_s(), wanted.slow_floor_ms / 1e3)
        return Trial(wanted, ask, slow_s, self._tally, self._allowed, champion.version, before)

    def _split(self, table: RoutingTable) -> Split | None:
        """The A/B test that the table calls for; None as long as any of its versions cannot be asked: a test in which
        one of them cannot answer would be about nothing.
        """
        wanted, split = table.split, self.serving.split
        if wanted is None:
            return None
        if split is not None and split.split == wanted:
            return split
        variants: dict[str, Variant] = {}
        for share in wanted.shares:
            way = self._way(share.version)
            if way is None:
                return None  # nor is any other waited for now: this thread has a lease to renew
            variants[share.version] = way
        return Split(wanted, variants, self._tally, self._allowed, table.champion)

    def _way(self, version: str) -> Variant | None:
        """How a version is asked that has an application of its own; None as long as it cannot be."""
        described = self._describe(version)
        if described is None:
            return None
        if version not in self._askers:
            try:
                asker = Asker(self._use_case.name, version)
                if not asker.ready(_ASKER_READY_S):
                    asker.close()
                    return None
            except (RayServeException, RayError):
                return None  # Serve does not know the application yet, or no more, or does not answer
            self._askers[version] = asker
        return Variant(self._askers[version].ask, described)

    def _describe(self, version: str) -> DescribedVersion | None:
        """What the version's rows are made by, ready to be used; None as long as that cannot be had."""
        if version in self._described:
            return self._described[version]
        if version in self._refused and self._refused[version].again_s > time.monotonic():
            return None
        if version not in self._describing:
            self._describing[version] = self._loader.submit(self._make_ready, version)
        try:
            # Not for long: this thread renews the lease and applies tables, and a registry may hang.
            self._described[version] = self._describing[version].result(_DESCRIBED_S)
        except TimeoutError:
            return None
        except VersionRefused as error:
            del self._describing[version]
            self._refuse(version, error)
            return None
        del self._describing[version]
        self._refused.pop(version, None)
        return self._described[version]

    def _make_ready(self, version: str) -> DescribedVersion:
        described = describe_version(self._use_case, version, self._settings)
        self._warm(described)
        return described

    def _leave(self, table: RoutingTable) -> None:
        """Forgets versions that are no longer tried, but not their handles under requests that still wait for them.

        In another rollout a version has another application, though of the same name.
        """
        tried = set(table.tried) if table.number == self._number else set()
        self._number = table.number
        self._described = {version: known for version, known in self._described.items() if version in tried}
        self._describing = {version: future for version, future in self._describing.items() if version in tried}
        for version in self._askers.keys() - tried:
            self._leaving.append((time.monotonic() + 5.0, self._askers.pop(version)))

    def _let_go(self) -> None:
        for entry in [e for e in self._leaving if e[0] <= time.monotonic()]:
            self._leaving.remove(entry)
            try:
                entry[1].close()
            except (RayServeException, RayError) as error:
                logger.warning("the way to a challenger that is gone was not closed: %s", error)

    def _start_controller(self) -> None:
        """Ray starts a killed controller again; one that is gone for good is started from here."""
        try:
            start(self._use_case.name)
        except (RayError, ValueError) as error:
            logger.warning("the rollout controller of %s was not started: %s", self._use_case.name, error)

    def _load(self, version: str) -> LoadedVersion:
        loaded = load_version(self._use_case, version, self._settings)
        self._warm(loaded)
        return loaded

    def _renew(self) -> None:
        """Leases end in real time, also under a replay clock: they tell who is alive."""
        if time.monotonic() - self._renewed < _RENEW_S:
            return
        name = gateway_lease(self._use_case.name, self.gateway)
        self._database.acquire_lease(name, self.gateway, _LEASE_S, SystemClock().now())
        self._renewed = time.monotonic()


def _differ(wanted: Challenger, tried: Challenger) -> bool:
    """Whether they belong to different trials."""
    return (wanted.rollout, wanted.watch) != (tried.rollout, tried.watch)
