"""Every route of the OpenAPI document against every scope and every kind of key."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.log import LogUnavailable
from cluster.settings import Settings
from pipelines import usecases
from pipelines.features.state import StateError
from serving.auth import KeyRing, Scope
from tests.deployment.bare_gateway import BareGateway, Reached

NEEDS = {
    "POST /predict": Scope.PREDICT,
    "POST /events": Scope.INGEST,
    "POST /dimensions/{name}/events": Scope.INGEST,
    "POST /feedback": Scope.FEEDBACK,
    "GET /features/{entity}": Scope.READ,
    "GET /status": Scope.READ,
    "GET /rollout": Scope.READ,
    "GET /differences": Scope.READ,
    "POST /rollout/start": Scope.RELEASE,
    "POST /rollout/{command}": Scope.RELEASE,
    "GET /ab": Scope.READ,
    "GET /ab/report": Scope.READ,
    "POST /ab/start": Scope.RELEASE,
    "POST /ab/pause": Scope.RELEASE,
    "POST /ab/resume": Scope.RELEASE,
    "POST /ab/abort": Scope.RELEASE,
    "GET /healthz": None,
    "GET /readyz": None,
}
"""What each route asks for; None where it answers anybody."""
KEYS = ("none", "wrong", "expired", "withdrawn", "right")


def key(kind: str, scope: Scope) -> str:
    return f"the-{kind}-key-that-may-{scope}"


def entry(kind: str, scope: Scope, **options: Any) -> dict[str, Any]:
    return {
        "name": f"{kind} {scope}",
        "sha256": hashlib.sha256(key(kind, scope).encode()).hexdigest(),
        "scopes": [scope],
        **options,
    }


class Gate:
    """The routes behind a file of keys: of each scope one that holds, one that has expired, one that was taken out."""

    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.file, self.time = home / "keys.json", 0.0
        self.kept = [entry("right", scope) for scope in Scope]
        self.kept += [entry("expired", scope, expires="2020-01-01T00:00:00Z") for scope in Scope]
        self.file.write_text(json.dumps([*self.kept, *(entry("withdrawn", scope) for scope in Scope)]))
        settings = Settings(home=home, keys_file=self.file)
        self.keys = KeyRing.open(settings, real=lambda: self.time)
        self.client = TestClient(BareGateway(usecases.load("aqua"), self.keys, settings))
        self.document = self.client.get("/openapi.json").json()

    def put(self, entries: list[dict[str, Any]]) -> None:
        self.file.write_text(json.dumps(entries))
        self.time += 1

    def status(self, method: str, path: str, given: str | bytes | None) -> int:
        """What the answer is; 200 for a request that came past the key."""
        said = given.encode() if isinstance(given, str) else given
        headers = {} if said is None else {"authorization": b"Bearer " + said}
        try:
            return self.client.request(method, path, headers=headers, content="{}").status_code
        except Reached:
            return 200


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    made = Gate(tmp_path_factory.mktemp("gate"))
    assert made.status("GET", "/status", key("withdrawn", Scope.READ)) == 200, "it is in force until it is taken out"
    made.put(made.kept)
    return made


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{method.upper()} {p}": op for p, methods in document["paths"].items() for method, op in methods.items()}


def paths(operation: dict[str, Any], path: str) -> list[str]:
    """The path with each value that its parameters may have; any, where they are free."""
    found = [path]
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            values = parameter["schema"].get("enum", ["anything"])
            found = [p.replace(f"{{{parameter['name']}}}", value) for p in found for value in values]
    return found


def test_the_document_has_the_routes_of_the_table_and_says_what_they_ask_for(gate):
    asked = {label: operation.get("security", []) for label, operation in operations(gate.document).items()}
    assert asked == {label: [] if scope is None else [{"ApiKey": [scope]}] for label, scope in NEEDS.items()}
    (scheme,) = gate.document["components"]["securitySchemes"].items()
    assert (scheme[0], scheme[1]["type"], scheme[1]["scheme"]) == ("ApiKey", "http", "bearer")


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("scope", list(Scope))
def test_a_route_takes_its_own_scope_with_a_key_that_holds_and_nothing_else(gate, scope, kind):
    given = None if kind == "none" else key(kind, scope)
    for label, operation in operations(gate.document).items():
        method, template = label.split()
        for path in paths(operation, template):
            status, need = gate.status(method, path, given), NEEDS[label]
            if need is None:
                assert status == 200, (label, status)
            elif kind != "right":
                assert status == 401, (label, status)
            elif scope is not need:
                assert status == 403, (label, status)
            else:  # ``{}`` is no request of most routes: they say so, now that the key was good
                assert status in (200, 400, 404, 422), (label, status)


def test_the_body_of_a_request_without_a_key_is_not_even_looked_at(gate):
    for label, operation in operations(gate.document).items():
        method, template = label.split()
        if method == "POST":
            for path in paths(operation, template):
                assert gate.client.post(path, content="{").status_code == 401, path


def test_paths_that_only_end_like_a_route_are_none(gate):
    for path in (
        "/nowhere/predict",
        "/nowhere/events",
        "/dimensions/events",
        "/dimensions/a/b/events",
        "/rollout/events",
    ):
        headers = {"authorization": f"Bearer {key('right', Scope.INGEST)}"}
        assert gate.client.post(path, headers=headers, json={}).status_code in (403, 404), path
    headers = {"authorization": f"Bearer {key('right', Scope.PREDICT)}"}
    assert gate.client.post("/nowhere/predict", headers=headers, json={}).status_code == 404


def test_an_entity_may_have_a_slash_in_its_name(gate):
    assert gate.status("GET", "/features/a%2Fb", key("right", Scope.READ)) == 200


def test_a_key_beyond_ascii_is_the_same_key_on_every_route(gate):
    given = "ein-langer-Schlüssel"
    digest = hashlib.sha256(given.encode()).hexdigest()
    gate.put([*gate.kept, {"name": "umlaut", "sha256": digest, "scopes": ["read", "predict"]}])
    try:
        for method, path in (("GET", "/status"), ("POST", "/predict")):
            assert gate.status(method, path, given.encode()) == 200
    finally:
        gate.put(gate.kept)


def test_a_method_that_a_route_does_not_have_is_refused_with_those_it_has(gate):
    refused = gate.client.get("/predict")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert refused.headers["content-type"] == "application/problem+json"


def test_a_key_ends_at_its_moment_while_the_gateway_runs(gate):
    end = datetime.now(UTC) + timedelta(seconds=1)
    brief = {**entry("brief", Scope.READ), "expires": end.isoformat()}
    gate.put([*gate.kept, brief])
    try:
        assert gate.status("GET", "/status", key("brief", Scope.READ)) == 200
        time.sleep(max(0.0, (end - datetime.now(UTC)).total_seconds()))
        assert gate.status("GET", "/status", key("brief", Scope.READ)) == 401
    finally:
        gate.put(gate.kept)


@pytest.mark.parametrize(
    ("error", "title"),
    [(StateError("rebuild it"), "State is not ready"), (LogUnavailable("it is away"), "The log does not answer")],
)
def test_a_store_that_fails_is_a_refusal_that_says_what_to_do(gate, monkeypatch, error, title):
    def fail(_: BareGateway) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(BareGateway, "status", fail)
    refused = gate.client.get("/status", headers={"authorization": f"Bearer {key('right', Scope.READ)}"})
    assert (refused.status_code, refused.json()["title"], refused.json()["detail"]) == (503, title, str(error))
