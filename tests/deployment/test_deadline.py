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


def predicted(settings: Settings, gateway: BareGateway, parts: list[bytes]) -> tuple[int, dict[str, Any], float]:
    """Status, document and seconds of a request whose body never ends after ``parts``."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    key = [(b"authorization", f"Bearer {owner_key(settings)}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": key}
    began = time.monotonic()
    asyncio.run(gateway(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), time.monotonic() - began


def test_a_body_that_does_not_come_is_not_waited_for_longer(settings):
    gateway = BareGateway(usecases.load("aqua"), KeyRing.open(settings), settings)
    status, problem, took = predicted(settings, gateway, [])
    assert (status, problem["title"]) == (503, "The deadline has passed")
    assert "no answer within 0.1 s" in problem["detail"]
    assert DEADLINE_S <= took < 50 * DEADLINE_S


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
