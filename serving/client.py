"""The client: what an application calls. It needs httpx and pydantic alone.

A call that failed on the way is sent again where that is safe: events are idempotent by their id, a prediction and
an outcome may be repeated, an operator's word may not. A refusal is raised as ``TidegateError`` and never repeated,
but for 429, whose Retry-After is respected.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from pipelines.spec.abtest import ABTest
from pipelines.spec.release import ReleasePolicy
from serving.wire import (
    ABTestStart,
    ABTestStatus,
    EventResult,
    EventsResponse,
    FeaturesResponse,
    FeedbackResponse,
    Prediction,
    PredictResponse,
    RolloutDifferences,
    RolloutStart,
    RolloutStatus,
    Variant,
)

Answer = TypeVar("Answer")
_PROBLEM = "application/problem+json"


class TidegateError(RuntimeError):
    """The gateway refused. ``problem`` is its RFC 9457 document."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.problem = dict(problem)
        places = "; ".join(
            f"{e.get('pointer', '')} {e.get('rule', '')}: {e.get('detail', '')}".strip()
            for e in self.problem.get("errors", [])[:5]
        )
        detail = f"{self.problem.get('title', 'refused')}: {self.problem.get('detail', '')}"
        super().__init__(f"{status} {detail}" + (f" ({places})" if places else ""))


@dataclass(frozen=True)
class _Call(Generic[Answer]):
    """One request and how its answer is read."""

    method: str
    path: str
    body: Any
    read: Callable[[Any], Answer]
    repeatable: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)


def _predict(
    instances: Sequence[Mapping[str, Any]], key: str | None, variant: Variant | None
) -> _Call[list[Prediction]]:
    body = {"instances": [dict(i) for i in instances]}
    # With a key a request that has to be sent again finds the version it had.
    headers = {"idempotency-key": key or secrets.token_hex(8)}
    if variant is not None:
        headers["tidegate-variant"] = variant
    return _Call("POST", "/predict", body, lambda a: PredictResponse.model_validate(a).predictions, headers=headers)


def _events(events: Sequence[Mapping[str, Any]], dimension: str | None) -> _Call[list[EventResult]]:
    body = {"events": [dict(e) for e in events]}
    path = "/events" if dimension is None else f"/dimensions/{dimension}/events"
    return _Call("POST", path, body, lambda a: EventsResponse.model_validate(a).results)


def _feedback(outcomes: Mapping[str, float]) -> _Call[int]:
    body = {"outcomes": [{"prediction_id": i, "value": v} for i, v in outcomes.items()]}
    return _Call("POST", "/feedback", body, lambda a: FeedbackResponse.model_validate(a).accepted)


def _features(entity: str) -> _Call[FeaturesResponse]:
    return _Call("GET", f"/features/{quote(entity, safe='')}", None, FeaturesResponse.model_validate)


def _status() -> _Call[dict[str, Any]]:
    return _Call("GET", "/status", None, dict)


def _rollout() -> _Call[RolloutStatus]:
    return _Call("GET", "/rollout", None, RolloutStatus.model_validate)


def _rollout_start(version: str, policy: ReleasePolicy | None, force: bool, reason: str) -> _Call[RolloutStatus]:
    body = RolloutStart(version=version, policy=policy, force=force, reason=reason).model_dump(mode="json")
    return _Call("POST", "/rollout/start", body, RolloutStatus.model_validate, repeatable=False)


def _rollout_command(command: str, reason: str) -> _Call[RolloutStatus]:
    body = {"reason": reason}
    return _Call("POST", f"/rollout/{command}", body, RolloutStatus.model_validate, repeatable=False)


def _differences() -> _Call[RolloutDifferences]:
    return _Call("GET", "/differences", None, RolloutDifferences.model_validate)


def _test() -> _Call[ABTestStatus]:
    return _Call("GET", "/ab", None, ABTestStatus.model_validate)


def _test_report() -> _Call[str]:
    return _Call("GET", "/ab/report", None, str)


def _test_start(test: ABTest, force: bool, reason: str) -> _Call[ABTestStatus]:
    body = ABTestStart(test=test, force=force, reason=reason).model_dump(mode="json")
    return _Call("POST", "/ab/start", body, ABTestStatus.model_validate, repeatable=False)


def _test_command(command: str, reason: str) -> _Call[ABTestStatus]:
    return _Call("POST", f"/ab/{command}", {"reason": reason}, ABTestStatus.model_validate, repeatable=False)


class _Connection:
    """What both clients share: address, key, and which failed attempt is made again."""

    def __init__(self, usecase: str, url: str | None, api_key: str | None, timeout_s: float, retries: int) -> None:
        key = api_key or os.environ.get("TIDEGATE_API_KEY")
        if not key:
            raise ValueError("an API key is needed: give api_key, or set TIDEGATE_API_KEY")
        self._retries = retries
        self._options: dict[str, Any] = {
            "base_url": (url or os.environ.get("TIDEGATE_URL", "http://127.0.0.1:8000")) + f"/v1/{usecase}",
            "headers": {"authorization": f"Bearer {key}"},
            "timeout": timeout_s,
        }

    def _delay(self, call: _Call[Any], attempt: int, response: httpx.Response | None) -> float | None:
        """Seconds to wait before the next attempt, or None when this one counts."""
        if attempt >= self._retries or not call.repeatable:
            return None
        if response is None or _lost_on_the_way(response):
            return min(0.1 * 2.0**attempt, 2.0)
        if response.status_code == 429:
            return float(response.headers.get("retry-after", 1))
        return None


def _lost_on_the_way(response: httpx.Response) -> bool:
    # While no replica runs the proxy itself answers, with 404 or 5xx; a gateway's refusal is a problem document.
    refused = response.headers.get("content-type", "").startswith(_PROBLEM)
    return not refused and (response.status_code == 404 or response.status_code >= 500)


def _read(call: _Call[Answer], response: httpx.Response) -> Answer:
    if response.is_success:
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return call.read(response.json() if is_json else response.text)
    if response.headers.get("content-type", "").startswith(_PROBLEM):
        raise TidegateError(response.status_code, response.json())
    raise TidegateError(response.status_code, {"title": response.reason_phrase, "detail": response.text[:500]})


class Client(_Connection):
    """Calls one use case's gateway; use it as a context manager or ``close`` it.

    ``url`` defaults to TIDEGATE_URL or the local gateway, ``api_key`` to TIDEGATE_API_KEY. A call waits up to
    ``timeout_s`` seconds for each of at most ``1 + retries`` attempts.
    """

    def __init__(
        self,
        usecase: str,
        *,
        url: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 8,
    ) -> None:
        super().__init__(usecase, url, api_key, timeout_s, retries)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def predict(
        self,
        instances: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        variant: Variant | None = None,
    ) -> list[Prediction]:
        """One prediction per instance, in order.

        While a version is being tried, requests with the same ``idempotency_key`` get the same version. A tester may
        ask for a ``variant``; that is no evidence for or against it.
        """
        return self._send(_predict(instances, idempotency_key, variant))

    def events(self, events: Sequence[Mapping[str, Any]], dimension: str | None = None) -> list[EventResult]:
        """One result per event, or per row of a dimension, in order; accepted ones are durable."""
        return self._send(_events(events, dimension))

    def feedback(self, outcomes: Mapping[str, float]) -> int:
        """Sends outcomes by prediction id; returns how many were accepted."""
        return self._send(_feedback(outcomes))

    def features(self, entity: str) -> FeaturesResponse:
        """What state holds for an entity now."""
        return self._send(_features(entity))

    def status(self) -> dict[str, Any]:
        """Where the gateway's log, state and routing stand."""
        return self._send(_status())

    def rollout(self) -> RolloutStatus:
        """Where the release stands."""
        return self._send(_rollout())

    def rollout_start(
        self, version: str, *, policy: ReleasePolicy | None = None, force: bool = False, reason: str = ""
    ) -> RolloutStatus:
        """Asks for the release of a version, under the page's policy or another."""
        return self._send(_rollout_start(version, policy, force, reason))

    def rollout_command(self, command: str, reason: str = "") -> RolloutStatus:
        """Pauses, resumes, approves or aborts what is under way, or reverts to the previous champion."""
        return self._send(_rollout_command(command, reason))

    def rollout_differences(self) -> RolloutDifferences:
        """What the version that is tried says differently, with the worst cases."""
        return self._send(_differences())

    def ab_test(self) -> ABTestStatus:
        """Where the last A/B test stands."""
        return self._send(_test())

    def ab_report(self) -> str:
        """The last A/B test as an HTML page, with a plot."""
        return self._send(_test_report())

    def ab_start(self, test: ABTest, *, force: bool = False, reason: str = "") -> ABTestStatus:
        """Begins an A/B test."""
        return self._send(_test_start(test, force, reason))

    def ab_command(self, command: str, reason: str = "") -> ABTestStatus:
        """Pauses, resumes or aborts the A/B test that runs."""
        return self._send(_test_command(command, reason))

    def _send(self, call: _Call[Answer]) -> Answer:
        for attempt in itertools.count():
            response = None
            try:
                response = self._http.request(call.method, call.path, json=call.body, headers=call.headers)
            except httpx.TransportError:
                if self._delay(call, attempt, None) is None:
                    raise
            delay = self._delay(call, attempt, response)
            if delay is None and response is not None:
                return _read(call, response)
            time.sleep(delay or 0)
        raise AssertionError("the loop has no end")


class AsyncClient(_Connection):
    """The same calls for asyncio."""

    def __init__(
        self,
        usecase: str,
        *,
        url: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 8,
    ) -> None:
        super().__init__(usecase, url, api_key, timeout_s, retries)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def predict(
        self,
        instances: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        variant: Variant | None = None,
    ) -> list[Prediction]:
        """One prediction per instance, in order.

        While a version is being tried, requests with the same ``idempotency_key`` get the same version. A tester may
        ask for a ``variant``; that is no evidence for or against it.
        """
        return await self._send(_predict(instances, idempotency_key, variant))

    async def events(self, events: Sequence[Mapping[str, Any]], dimension: str | None = None) -> list[EventResult]:
        """One result per event, or per row of a dimension, in order; accepted ones are durable."""
        return await self._send(_events(events, dimension))

    async def feedback(self, outcomes: Mapping[str, float]) -> int:
        """Sends outcomes by prediction id; returns how many were accepted."""
        return await self._send(_feedback(outcomes))

    async def features(self, entity: str) -> FeaturesResponse:
        """What state holds for an entity now."""
        return await self._send(_features(entity))

    async def status(self) -> dict[str, Any]:
        """Where the gateway's log, state and routing stand."""
        return await self._send(_status())

    async def rollout(self) -> RolloutStatus:
        """Where the release stands."""
        return await self._send(_rollout())

    async def rollout_start(
        self, version: str, *, policy: ReleasePolicy | None = None, force: bool = False, reason: str = ""
    ) -> RolloutStatus:
        """Asks for the release of a version, under the page's policy or another."""
        return await self._send(_rollout_start(version, policy, force, reason))

    async def rollout_command(self, command: str, reason: str = "") -> RolloutStatus:
        """Pauses, resumes, approves or aborts what is under way, or reverts to the previous champion."""
        return await self._send(_rollout_command(command, reason))

    async def rollout_differences(self) -> RolloutDifferences:
        """What the version that is tried says differently, with the worst cases."""
        return await self._send(_differences())

    async def ab_test(self) -> ABTestStatus:
        """Where the last A/B test stands."""
        return await self._send(_test())

    async def ab_report(self) -> str:
        """The last A/B test as an HTML page, with a plot."""
        return await self._send(_test_report())

    async def ab_start(self, test: ABTest, *, force: bool = False, reason: str = "") -> ABTestStatus:
        """Begins an A/B test."""
        return await self._send(_test_start(test, force, reason))

    async def ab_command(self, command: str, reason: str = "") -> ABTestStatus:
        """Pauses, resumes or aborts the A/B test that runs."""
        return await self._send(_test_command(command, reason))

    async def _send(self, call: _Call[Answer]) -> Answer:
        for attempt in itertools.count():
            response = None
            try:
                response = await self._http.request(call.method, call.path, json=call.body, headers=call.headers)
            except httpx.TransportError:
                if self._delay(call, attempt, None) is None:
                    raise
            delay = self._delay(call, attempt, response)
            if delay is None and response is not None:
                return _read(call, response)
            await asyncio.sleep(delay or 0)
        raise AssertionError("the loop has no end")
