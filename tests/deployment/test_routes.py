"""Every route asks for its scope, whatever else the key may do."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.log import LogUnavailable
from pipelines import usecases
from pipelines.features.state import StateError
from serving.api import build_api
from serving.auth import ConfiguredKey, KeyRing, Scope

ROUTES = [
    ("GET", "/v1/aqua/features/dma_1", Scope.READ),
    ("GET", "/v1/aqua/status", Scope.READ),
    ("GET", "/v1/aqua/rollout", Scope.READ),
    ("POST", "/v1/aqua/feedback", Scope.FEEDBACK),
    ("POST", "/v1/aqua/rollout/start", Scope.RELEASE),
    ("POST", "/v1/aqua/rollout/pause", Scope.RELEASE),
    ("POST", "/v1/aqua/rollout/resume", Scope.RELEASE),
    ("POST", "/v1/aqua/rollout/approve", Scope.RELEASE),
    ("POST", "/v1/aqua/rollout/abort", Scope.RELEASE),
    ("POST", "/v1/aqua/rollout/revert", Scope.RELEASE),
]
BODIES = {"start": {"version": "2"}, "feedback": {"outcomes": [{"prediction_id": "p", "value": 1.0}]}}


class Reached(RuntimeError):
    """The request came past its key."""


class Untouched:
    """Stands for a part that no refused request may reach."""

    def __getattr__(self, name: str) -> Any:
        raise Reached


class StubGateway:
    """A gateway of which only the page and the keys are real."""

    def __init__(self, keys: KeyRing) -> None:
        self.keys = keys
        self.use_case = usecases.load("aqua")
        self.rollouts = self.predictor = self.clock = Untouched()

    def status(self) -> dict[str, Any]:
        raise Reached

    async def outcomes(self, _: Any) -> None:
        raise Reached


def _key(scopes: set[Scope]) -> tuple[TestClient, dict[str, str]]:
    key = "k" * 32
    ring = KeyRing([ConfiguredKey(name="app", key=key, scopes=frozenset(scopes))])
    return TestClient(build_api(StubGateway(ring))), {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_a_route_takes_its_own_scope_and_no_other(method, path, scope):
    client, header = _key(set(Scope) - {scope})
    path, body = path.removeprefix("/v1/aqua"), BODIES.get(path.rsplit("/", 1)[1], {}) if method == "POST" else None
    refused = client.request(method, path, json=body, headers=header)
    assert refused.status_code == 403, refused.text
    assert str(scope) in refused.json()["detail"]
    assert client.request(method, path).status_code == 401
    client, header = _key({scope})
    with pytest.raises(Reached):
        client.request(method, path, json=body, headers=header)


@pytest.mark.parametrize(
    ("error", "title"),
    [(StateError("rebuild it"), "State is not ready"), (LogUnavailable("it is away"), "The log does not answer")],
)
def test_a_store_that_fails_is_a_refusal_that_says_what_to_do(monkeypatch, error, title):
    def fail(_: StubGateway) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(StubGateway, "status", fail)
    client, header = _key({Scope.READ})
    refused = client.get("/status", headers=header)
    assert (refused.status_code, refused.json()["title"], refused.json()["detail"]) == (503, title, str(error))
