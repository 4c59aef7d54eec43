"""The request path of one use case: a Serve deployment whose ASGI app answers ``predict`` and ``events`` itself.

Everything else goes to FastAPI, which also describes all routes. The champion runs inside this process; a newer
routing table is loaded and warmed beside it and swapped in one assignment.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson
from sqlalchemy.exc import OperationalError

from cluster.alerts import Alerts
from cluster.clock import open_clock
from cluster.database import Database
from cluster.settings import Settings
from cluster.tables import Tables
from pipelines import usecases
from pipelines.drain import EVENTS, OUTCOMES, PREDICTIONS, QUARANTINE
from pipelines.features.online import OnlineState, open_log, state_path
from pipelines.features.state import StateError
from serving import routing
from serving.answers import Predictor
from serving.auth import KeyRing, Scope
from serving.events import Drain, EventIntake
from serving.problems import Problem
from serving.runner import LoadedVersion, VersionRefused, load_version

ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_EVENTS = 10_000
# Below this many instances the model is faster than the hop to another thread.
_INLINE_INSTANCES = 16
_ROUTING_POLL_S = 1.0


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
        self.state = OnlineState(state_path(settings, self.use_case), self.use_case)
        self._project()  # what an earlier process logged and did not live to apply
        self.intake = EventIntake(self.use_case, self.log, self.clock, self._project)
        self.predictor = Predictor(self.use_case, self.state.bind())
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
        table = routing.read(self.database, usecase)
        if table is None:
            raise RuntimeError(f"{usecase!r} has no champion: release a version before its gateway starts")
        self.table = table
        self.champion: LoadedVersion = load_version(self.use_case, table.champion, settings)
        self.predictor.warm(self.champion, self.clock.now())
        self.routing_failure: str | None = None
        self._stop = threading.Event()
        self._routing = threading.Thread(target=self._follow_routing, name="routing", daemon=True)
        self._routing.start()
        from serving.api import build_api  # it imports the request models, which a worker without HTTP never needs

        self.api = build_api(self)

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Answers ``POST …/predict`` and ``POST …/events``; hands every other route to FastAPI."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"]
            handler = self.predict if path.endswith("/predict") else self.ingest if path.endswith("/events") else None
            if handler is not None:
                try:
                    answer = 200, [(b"content-type", b"application/json")], await handler(scope, receive)
                except Problem as problem:
                    answer = _refusal(problem)
                except StateError as error:
                    answer = _refusal(Problem(503, "State is not ready", str(error)))
                await _send(send, *answer)
                return
        if scope["type"] == "http":
            declared = header(scope, b"content-length") or b"0"
            if declared.isdigit() and int(declared) > self.settings.body_limit:
                await _send(send, *_refusal(_too_large(self.settings.body_limit)))
                return
        await self.api(scope, receive, send)

    async def predict(self, scope: ASGIScope, receive: Receive) -> bytes:
        """Checks the key, reads the body, answers, logs."""
        self.keys.require(header(scope, b"authorization"), Scope.PREDICT)
        records = self.predictor.parse(await self._json(receive))
        champion, now = self.champion, self.clock.now()
        if len(records) <= _INLINE_INSTANCES:
            answered = self.predictor.answer(records, champion, now)
        else:
            answered = await asyncio.to_thread(self.predictor.answer, records, champion, now)
        self.intake.predictions(answered.records)
        return orjson.dumps(answered.document)

    async def ingest(self, scope: ASGIScope, receive: Receive) -> bytes:
        """Checks the key, reads the body, acknowledges each event."""
        self.keys.require(header(scope, b"authorization"), Scope.INGEST)
        document = await self._json(receive)
        events = document.get("events") if isinstance(document, dict) else None
        if not isinstance(events, list) or not events:
            raise Problem(400, "No events", 'Send {"events": [{…}, …]} with at least one event.')
        if len(events) > MAX_EVENTS:
            raise Problem(413, "Too many events", f"{len(events)} exceed {MAX_EVENTS} a request: send several.")
        return orjson.dumps({"results": await self.intake.ingest(events)})

    async def outcomes(self, outcomes: list[dict[str, Any]]) -> None:
        """Logs outcomes durably before they are acknowledged."""
        now = self.clock.now()
        await self.intake.outcomes({o["prediction_id"]: orjson.dumps({**o, "at": now}) for o in outcomes})

    def status(self) -> dict[str, Any]:
        """Where the log, the state, the drain and the routing stand."""
        streams = (EVENTS, QUARANTINE, PREDICTIONS, OUTCOMES)
        return {
            "usecase": self.use_case.name,
            "replica": self.holder,
            "clock": self.clock.now(),
            "epoch": self.table.epoch,
            "champion": self.champion.version,
            "applied": self.state.applied(),
            "log": {s: {"last": self.log.last(s), "pending": self.log.pending(s)} for s in streams},
            "failures": [str(f) for f in (self.drain.failure, self.routing_failure) if f],
        }

    def check(self) -> None:
        """Raises when a background part of this replica has ended, so that Serve replaces it."""
        if not self.drain.alive():
            raise RuntimeError(f"the drain of {self.use_case.name!r} ended: {self.drain.failure!r}")
        if not self._routing.is_alive():
            raise RuntimeError(f"the gateway of {self.use_case.name!r} no longer follows its routing table")

    def close(self) -> None:
        """Flushes the log and lets go of the stores."""
        self._stop.set()
        self.intake.close()
        self.drain.close()

    def _project(self) -> int:
        return self.state.project(self.log)

    async def _json(self, receive: Receive) -> Any:
        body = await read_body(receive, self.settings.body_limit)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Problem(400, "The body is not JSON", str(error)) from error

    def _follow_routing(self) -> None:
        while not self._stop.wait(_ROUTING_POLL_S):
            try:
                table = routing.read(self.database, self.use_case.name)
                if table is None or table.epoch <= self.table.epoch:
                    self.routing_failure = None
                    continue
                if table.champion != self.champion.version:
                    loaded = load_version(self.use_case, table.champion, self.settings)
                    self.predictor.warm(loaded, self.clock.now())
                    self.champion = loaded
            except (VersionRefused, OperationalError) as error:
                self.routing_failure = str(error)  # the last table goes on answering; readiness reports why
                continue
            self.table, self.routing_failure = table, None


def header(scope: ASGIScope, name: bytes) -> bytes | None:
    """The first value of a header (ASGI gives names in lower case)."""
    return next((value for key, value in scope["headers"] if key == name), None)


def _too_large(limit: int) -> Problem:
    return Problem(413, "The body is too large", f"At most {limit} bytes are taken: send several requests.")


def _refusal(problem: Problem) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    return problem.status, problem.headers(), problem.body()


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body; raises ``Problem`` 413 as soon as it exceeds ``limit`` bytes."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "The body ended early", "The connection closed before the whole body came.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
