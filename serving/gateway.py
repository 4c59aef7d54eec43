"""The request path of one use case: a Serve deployment whose ASGI app answers ``predict`` and ``events`` itself.

Everything else goes to FastAPI, which also describes all routes. The champion runs inside this process; a challenger
is asked through ``serving.trial``, the versions of an A/B test through ``serving.split``, and ``serving.following``
keeps all up to the routing table.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson

from cluster.alerts import Alerts
from cluster.clock import open_clock
from cluster.database import Database
from cluster.log import LogUnavailable
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.drain import EVENTS, OUTCOMES, PREDICTIONS, QUARANTINE
from pipelines.features.online import OnlineState, open_log
from pipelines.features.state import StateError
from pipelines.features.views import open_views
from serving.answers import Answered, Assigned, Other, Part, Predictor, Prepared
from serving.auth import KeyRing, Scope
from serving.bodies import Receive, entries, parse, read_body
from serving.events import DimensionFeed, Drain, EventIntake
from serving.following import Follower
from serving.problems import Problem
from serving.rollout.operators import Rollouts
from serving.runner import DescribedVersion, LoadedVersion, VersionRefused
from serving.split import Split
from serving.together import Together
from serving.trial import Asked, Trial
from serving.watch import Watch
from serving.way import Described
from serving.wire import MAX_EVENTS, MAX_KEY

ASGIScope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Below this many instances the model is faster than the hop to another thread.
_INLINE_INSTANCES = 16
# Requests that a replica answers at once; Serve gives it a few more (``serving.app``), which are told to come later.
_MOST_AT_ONCE = 200
_FOR_TRIALS = 0.9
_INGEST = re.compile(r"(?:/dimensions/(?P<name>[^/]+))?/events")
_BUSY = f"This gateway answers {_MOST_AT_ONCE} requests already: send it again, or raise TIDEGATE_GATEWAY_REPLICAS."
_VARIANT, _CHAMPION, _CHALLENGER = "Tidegate-Variant", b"champion", b"challenger"


class Gateway:
    """Holds what one replica needs to answer; ``__call__`` is the ASGI app."""

    def __init__(self, usecase: str, settings: Settings) -> None:
        self.use_case = usecases.load(usecase)
        self.settings = settings
        self.clock = open_clock(settings)
        self.keys = KeyRing.open(settings)
        self.tables = Tables(settings.tables_url, settings.storage_options)
        self.database = Database(settings.database_url)
        self.alerts = Alerts(self.database, self.clock)
        self.log = open_log(settings, self.use_case)
        self.views = open_views(settings, self.use_case)
        self.facts = {name: open_log(settings, fed.source) for name, fed in self.views.dimensions.items()}
        self._catch_up()  # with what an earlier process logged and did not live to apply
        self.predictor = Predictor(self.use_case, self.views)
        # What writes events comes after it: the state of the champion's view is the one that must keep up.
        self.follower = Follower(self.use_case, settings, self.database, self._warm)
        self.intake = EventIntake(self.use_case, self.log, self.clock, self._project, settings.log_rows)
        self.holder = f"{socket.gethostname()}:{os.getpid()}"
        self.drain = Drain(
            self.use_case,
            self.log,
            self._project,
            self.tables,
            self.database,
            settings,
            self.alerts,
            self.holder,
        )
        self.feeds = {
            name: DimensionFeed(
                fed.source, self.facts[name], partial(self._project_dimension, name), settings=settings,
                clock=self.clock, tables=self.tables, database=self.database, alerts=self.alerts, holder=self.holder,
            )
            for name, fed in self.views.dimensions.items()
        }  # fmt: skip
        self.rollouts = Rollouts(usecase, settings, self.database, self.clock)
        self.watch = Watch(lambda: self.state, self.alerts, self.clock)
        self._answering = 0
        self._together = Together(self._champion)
        from serving.api import build_api  # it imports the request models, which a worker without HTTP never needs

        self.api = build_api(self)

    @property
    def view(self) -> str:
        """The fingerprint of the view that the champion answers from."""
        return self.follower.serving.champion.artifact.view

    @property
    def state(self) -> OnlineState:
        """The state that the champion answers from."""
        return self.views.states[self.view]

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Answers ``POST …/predict`` and ``POST …/events``; hands every other route to FastAPI."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path = _path(scope)
            handler = self.predict if path == "/predict" else self.ingest if _INGEST.fullmatch(path) else None
            if handler is not None:
                self._answering += 1
                try:
                    if self._answering > _MOST_AT_ONCE:
                        raise Problem(429, "Too many requests at once", _BUSY, retry_after_s=1)
                    answer = 200, [(b"content-type", b"application/json")], await handler(scope, receive)
                except Problem as problem:
                    answer = _refusal(problem)
                except StateError as error:
                    answer = _refusal(Problem(503, "State is not ready", str(error)))
                finally:
                    self._answering -= 1
                await _send(send, *answer)
                return
        await self.api(scope, receive, send)

    async def predict(self, scope: ASGIScope, receive: Receive) -> bytes:
        """Checks the key, reads the body, answers, logs, and refuses what the deadline leaves no time for."""
        limit = asyncio.timeout(self.settings.deadline_seconds)
        try:
            async with limit:
                return await self._predict(scope, receive)
        except TimeoutError:
            if not limit.expired():
                raise  # it is somebody else's
            said = f"There was no answer within {self.settings.deadline_seconds:g} s: send fewer instances, or later."
            raise Problem(503, "The deadline has passed", said, retry_after_s=1) from None

    async def _predict(self, scope: ASGIScope, receive: Receive) -> bytes:
        # A version that is tried gets no more of the deadline than leaves the champion's answer time to be given.
        until = time.perf_counter() + self.settings.deadline_seconds * _FOR_TRIALS
        self.keys.require(header(scope, b"authorization"), Scope.PREDICT)
        given, variant = _idempotency_key(scope), _variant(scope)
        document, began = await self._json(receive), time.perf_counter()
        records = self.predictor.parse(document)
        serving, now, champion = self.follower.serving, self.clock.now(), self.predictor.champion
        few, plain = len(records) <= _INLINE_INSTANCES, serving.trial is None and serving.split is None
        if few and plain and variant != _CHALLENGER:
            answered = await self._together.answered(records)
            self.intake.predictions(answered.records())
            return orjson.dumps(answered.document)
        if len(records) <= _INLINE_INSTANCES:
            prepared, prediction, took = champion(records, serving.champion, now)
        else:
            prepared, prediction, took = await asyncio.to_thread(champion, records, serving.champion, now)
        if variant == _CHALLENGER and (serving.trial is None or serving.trial.challenger.watch):
            said = "An A/B test runs, which assigns units itself. " if serving.split is not None else ""
            raise Problem(409, "No version is being tried", f"{said}Leave out {_VARIANT}, or ask for the champion.")
        tried, version = serving.trial or serving.split, serving.champion.version
        if tried is None or variant == _CHAMPION:
            answered = self.predictor.compose(prepared, prediction, version)
            self.intake.predictions(answered.records())
            return orjson.dumps(answered.document)
        forced, key = variant == _CHALLENGER, given or secrets.token_hex(8)
        counted = not forced and (given is None or tried.first_seen(given))
        asked = Asked(
            key, counted, prepared, partial(self._rows_of, prepared), prediction, took, began, forced, until=until
        )
        answer = self._tried(version, tried, asked) if isinstance(tried, Trial) else self._split(version, tried, asked)
        return orjson.dumps((await answer).document)

    def _champion(self, records: Sequence[Mapping[str, Any]]) -> Answered:
        """The champion's answers to a few records, which may be those of several requests."""
        version = self.follower.serving.champion
        prepared, prediction, _ = self.predictor.champion(records, version, self.clock.now())
        return self.predictor.compose(prepared, prediction, version.version)

    async def _tried(self, champion: str, trial: Trial, asked: Asked) -> Answered:
        """The answers while a version is being tried; the log gets what both versions said.

        A forced request is the challenger's in all its instances.
        """
        prepared, weight, count = asked.prepared, trial.weight, len(asked.prepared.records)
        assigned = np.ones(count, dtype=bool) if asked.forced else trial.assign(asked.key, prepared.entities, weight)
        trial.see(asked)
        if assigned.any():
            chosen = await trial.choose(asked, assigned, weight)
            parts = () if chosen.tried is None else (Part(chosen.taken, trial.challenger.version, chosen.tried),)
            answered = self.predictor.compose(prepared, chosen.prediction, champion, parts)
            # Logged without the champion's answer, a request that its caller assigned is paired with none.
            self.intake.predictions(answered.records(None if asked.forced else chosen.other))
            return answered
        if weight > 0:
            trial.count_champion(asked, weight)
        answered = self.predictor.compose(prepared, asked.champion, champion)
        if trial.copies(asked.key):
            trial.copy(asked, partial(self._log_copied, answered))
        else:
            self.intake.predictions(answered.records())
        return answered

    async def _split(self, champion: str, split: Split, asked: Asked) -> Answered:
        """The answers during an A/B test. A request that is repeated is answered alike, and its units are the same."""
        prepared = asked.prepared
        if not split.is_open:
            answered = self.predictor.compose(prepared, asked.champion, champion)
        else:
            units = split.units(asked.key, prepared.entities)
            arms = split.assign(units)
            prediction, parts = await split.choose(asked, arms)
            versions = [split.versions[arm] for arm in arms.tolist()]
            assigned = Assigned(split.split.test, versions, [f"{split.name(unit):x}" for unit in units])
            answered = self.predictor.compose(prepared, prediction, champion, parts, assigned)
        self.intake.predictions(answered.records())
        return answered

    async def _rows_of(self, prepared: Prepared, version: Described) -> Prepared:
        """The instances by the view of another version; raises what ``Predictor.prepare`` does.

        Another view is read in a thread, however few the instances are: others are answered meanwhile, and the
        deadline of who is asked can pass.
        """
        make = partial(self.predictor.challenger, prepared, version)
        return make() if version.artifact.view == prepared.view else await asyncio.to_thread(make)

    def _log_copied(self, answered: Answered, other: Other) -> None:
        self.intake.predictions(answered.records(other))

    def _warm(self, version: LoadedVersion | DescribedVersion) -> None:
        try:
            self._catch_up()  # its state may have been built since events were last written
            self.predictor.warm(version, self.clock.now())
        except (StateError, LogUnavailable) as error:
            raise VersionRefused(f"version {version.version} has no state to answer from: {error}") from error

    async def ingest(self, scope: ASGIScope, receive: Receive) -> bytes:
        """Checks the key, reads the body, acknowledges each event, or row of a dimension."""
        self.keys.require(header(scope, b"authorization"), Scope.INGEST)
        intake = self._intake(_path(scope))
        try:
            document = await asyncio.wait_for(self._json(receive), self.settings.deadline_seconds)
        except TimeoutError:
            said = f"The body did not come within {self.settings.deadline_seconds:g} s: nothing of it was taken."
            raise Problem(503, "The deadline has passed", said, retry_after_s=1) from None
        events = entries(document, "events", MAX_EVENTS)
        return orjson.dumps({"results": await intake.ingest(events)})

    def _intake(self, path: str) -> EventIntake:
        """The intake of a path that ``_INGEST`` matches."""
        found = _INGEST.fullmatch(path)
        if found is None or (name := found["name"]) is None:
            return self.intake
        if name not in self.feeds:
            raise Problem(404, "Unknown dimension", f"There is no {name!r}; there are {sorted(self.feeds)}.")
        return self.feeds[name].intake

    async def outcomes(self, outcomes: list[dict[str, Any]]) -> None:
        """Logs outcomes durably before they are acknowledged."""
        now = self.clock.now()
        first: dict[str, bytes] = {}
        for outcome in outcomes:
            first.setdefault(outcome["prediction_id"], orjson.dumps({**outcome, "at": now}))
        await self.intake.outcomes(first)

    def status(self) -> dict[str, Any]:
        """Where the log, the state, the drain and the routing stand."""
        streams = (EVENTS, QUARANTINE, PREDICTIONS, OUTCOMES)
        positions = {view: state.position() for view, state in self.views.states.items()}
        return {
            "usecase": self.use_case.name,
            "replica": self.holder,
            "clock": self.clock.now(),
            "epoch": self.follower.serving.table.epoch,
            "champion": self.follower.serving.champion.version,
            "applied": positions[self.view][1],
            "views": {
                view: {"generation": made, "applied": upto, "unplaced": self.views.states[view].unplaced()}
                for view, (made, upto) in positions.items()
            },
            "log": {s: {"last": self.log.last(s), "pending": self.log.pending(s)} for s in streams},
            "dimensions": {
                name: {"last": feed.log.last(EVENTS), "pending": feed.log.pending(EVENTS)}
                for name, feed in self.feeds.items()
            },
            "refused": self.follower.refused(),
            "failures": [*self.failures(), *map(str, self.views.gaps().values())],
        }

    def failures(self) -> list[str]:
        """What keeps this replica from answering as it should. A state that no champion needs yet is nothing of it."""
        drains = (drain.failure for drain in self._drains)
        found = (*drains, self.follower.failure, self.watch.failure, self.keys.failure)
        return [str(failure) for failure in found if failure]

    def check(self) -> None:
        """Raises when a background part of this replica has ended, so that Serve replaces it."""
        for drain in self._drains:
            if not drain.alive():
                raise RuntimeError(f"a drain of {self.use_case.name!r} ended: {drain.failure!r}")
        if not self.watch.alive():
            raise RuntimeError(f"the gateway of {self.use_case.name!r} no longer watches sensors and events")
        if not self.follower.alive():
            why = self.follower.failure
            raise RuntimeError(f"the gateway of {self.use_case.name!r} no longer follows its routing table: {why}")

    def close(self) -> None:
        """Flushes the log and lets go of the stores."""
        self.watch.close()
        self.follower.close()
        self.intake.close()
        self.drain.close()
        for feed in self.feeds.values():
            feed.close()

    @property
    def _drains(self) -> tuple[Drain, ...]:
        return (self.drain, *(feed.drain for feed in self.feeds.values()))

    def _catch_up(self) -> None:
        """Brings every state up to its log, as far as that has what the state lacks."""
        self.views.project(self.log)
        for name, fed in self.views.dimensions.items():
            fed.project(self.facts[name])

    def _project(self) -> int:
        return self.views.project(self.log, needed=self.view)

    def _project_dimension(self, name: str) -> int:
        return self.views.dimensions[name].project(self.facts[name], needed=self.view)

    async def _json(self, receive: Receive) -> Any:
        return parse(await read_body(receive, self.settings.body_limit))


def _path(scope: ASGIScope) -> str:
    """The path below the use case's own (Serve gives the whole)."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _idempotency_key(scope: ASGIScope) -> str | None:
    """The caller's name for the request, so that a repetition finds the version it had; None when it gave none."""
    given = header(scope, b"idempotency-key")
    if given is None:
        return None
    if not given or len(given) > MAX_KEY:
        raise Problem(400, "The idempotency key does not fit", f"Idempotency-Key takes 1 to {MAX_KEY} bytes.")
    return given.decode("latin-1")


def _variant(scope: ASGIScope) -> bytes | None:
    """The version that a tester wants to be answered by; None for the one that the split gives."""
    given = header(scope, b"tidegate-variant")
    if given not in (None, _CHAMPION, _CHALLENGER):
        raise Problem(400, "There is no such variant", f"{_VARIANT} takes champion or challenger.")
    return given


def header(scope: ASGIScope, name: bytes) -> bytes | None:
    """The first value of a header (ASGI gives names in lower case)."""
    return next((value for key, value in scope["headers"] if key == name), None)


def _refusal(problem: Problem) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    return problem.status, problem.headers(), problem.body()


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
