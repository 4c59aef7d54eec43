"""A prediction that takes longer than its deadline is refused, whatever keeps it: its body, or what answers it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from cluster.settings import Settings
from pipelines import usecases
from serving.auth import KeyRing, owner_key
from tests.deployment.bare_gateway import BareGateway

DEADLINE_S = 0.1


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(home=tmp_path, deadline_seconds=DEADLINE_S)


def predicted(
    settings: Settings, gateway: BareGateway, parts: list[bytes], path: str = "/predict"
) -> tuple[int, dict[str, Any], float]:
    """Status, document and seconds of a request whose body never ends after ``parts``."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    key = [(b"authorization", f"Bearer {owner_key(settings)}".encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": key}
    began = time.monotonic()
    asyncio.run(gateway(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), time.monotonic() - began


def test_a_body_that_does_not_come_is_not_waited_for_longer(settings):
    gateway = BareGateway(usecases.load("aqua"), KeyRing.open(settings), settings)
    status, problem, took = predicted(settings, gateway, [])
    assert (status, problem["title"]) == (503, "The deadline has passed")
    assert "no answer within 0.1 s" in problem["detail"]
    assert DEADLINE_S <= took < 50 * DEADLINE_S


def test_nor_is_a_body_of_events(settings):
    gateway = BareGateway(usecases.load("aqua"), KeyRing.open(settings), settings)
    status, problem, _ = predicted(settings, gateway, [], "/events")
    assert (status, problem["title"]) == (503, "The deadline has passed")
    assert "nothing of it was taken" in problem["detail"]


def test_neither_is_an_answer(settings, monkeypatch):
    gateway = BareGateway(usecases.load("aqua"), KeyRing.open(settings), settings)

    async def never(scope: Any, receive: Any) -> bytes:
        return await asyncio.to_thread(time.sleep, 5 * DEADLINE_S) or b""

    monkeypatch.setattr(gateway, "_predict", never)
    status, problem, _ = predicted(settings, gateway, [b"{}"])
    assert (status, problem["status"]) == (503, 503)


def test_a_refusal_in_time_stays_what_it_is(settings):
    gateway = BareGateway(usecases.load("aqua"), KeyRing.open(settings), settings)
    status, problem, _ = predicted(settings, gateway, [b"{"])
    assert (status, problem["title"]) == (400, "The body is not JSON")


def test_more_requests_at_once_than_a_replica_answers_are_told_to_come_later(settings):
    async def flood() -> list[int]:
        gateway = BareGateway(usecases.load("aqua"), KeyRing.open(settings), settings)
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                assert message["status"] == 503 or (b"retry-after", b"1") in message["headers"]

        key = [(b"authorization", f"Bearer {owner_key(settings)}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": key}
        await asyncio.gather(*(gateway(scope, receive, send) for _ in range(203)))
        await gateway(scope, receive, send)
        return statuses

    statuses = asyncio.run(flood())
    assert statuses[:3] == [429] * 3, "at once, not when the others are done"
    assert statuses[3:] == [503] * 201, "all others wait for their deadline, and so does the next one"
