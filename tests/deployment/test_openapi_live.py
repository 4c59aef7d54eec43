"""What a running gateway answers is what its OpenAPI document says, for generated requests and for the document's own.

The requests are drawn by Schemathesis: valid ones, and ones that break the document in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import settings

from cluster.settings import Settings
from pipelines.training.registry import Registry
from serving.drills import register_copy
from tests.deployment.small_gateway import SmallGateway, small_gateway
from tests.deployment.test_routes import operations
from tests.deployment.waiting import drained, until

COMMANDS = ("pause", "resume", "approve", "abort")
STEERING = ("POST /ab/pause", "POST /ab/resume", "POST /ab/abort")
CONFIG = {
    "checks": {"negative_data_rejection": {"expected-statuses": ["400", "401", "404", "409", "413", "422"]}},
    "operations": [
        # A policy and a test have rules between their fields, which no schema tells.
        {"include-name": name, "checks": {"positive_data_acceptance": {"enabled": False}}}
        for name in ("POST /rollout/start", "POST /ab/start")
    ],
}
asked: dict[str, set[int]] = {}
"""The statuses that were seen, by operation."""


@pytest.fixture(scope="module")
def gateway(cluster: Settings) -> Iterator[SmallGateway]:
    with small_gateway(cluster) as made:
        yield made


@pytest.fixture(scope="module")
def document(gateway: SmallGateway) -> dict[str, Any]:
    return httpx.get(f"{gateway.url}/v1/aqua/openapi.json").json()


@pytest.fixture(scope="module")
def described(gateway: SmallGateway) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(
        f"{gateway.url}/v1/aqua/openapi.json", config=schemathesis.Config.from_dict(CONFIG)
    )


schema = schemathesis.pytest.from_fixture("described")


@pytest.mark.timeout(240)
@schema.parametrize()
@settings(max_examples=20, derandomize=True, deadline=None, database=None)
def test_generated_requests_are_answered_as_the_document_says(case, gateway):
    headers = {"authorization": f"Bearer {gateway.key}"}
    answer = case.call(headers=headers)
    case.validate_response(answer, headers=headers)
    asked.setdefault(case.operation.label, set()).add(answer.status_code)


def test_every_operation_was_asked_and_took_valid_requests(document):
    assert set(asked) == set(operations(document))
    # Nothing is there to be released or tested.
    operators = {"POST /rollout/start", "POST /rollout/{command}", "POST /ab/start", *STEERING}
    refused = {label for label, statuses in asked.items() if 200 not in statuses}
    nothing = {"GET /differences", "GET /ab", "GET /ab/report"}
    assert refused == {"POST /dimensions/{name}/events", *nothing, *operators}
    assert all(409 in asked[label] for label in operators)


def test_what_was_accepted_keeps_nothing_from_working(gateway):
    with gateway.client() as client:
        drained(client)
        assert client.status()["failures"] == []
    assert httpx.get(f"{gateway.url}/v1/aqua/readyz").json() == {"status": "ready"}


def example(operation: dict[str, Any], path: str) -> tuple[str, Any]:
    """The path and the body of an operation, of the document's examples."""
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["schema"]["examples"][0])
    content = operation.get("requestBody", {"content": {"application/json": {}}})["content"]
    return path, content["application/json"].get("example")


@pytest.mark.timeout(240)
def test_the_examples_of_the_document_are_answered_with_200(gateway, document):
    version = register_copy("aqua", "1", None, Registry(gateway.settings), gateway.settings)
    assert version == "2", "the version of the example"
    base = f"{gateway.url}/v1/aqua"
    with (
        httpx.Client(headers={"authorization": f"Bearer {gateway.key}"}, timeout=30) as http,
        gateway.client() as client,
    ):

        def send(method: str, path: str, body: Any) -> dict[str, Any]:
            answer = http.request(method, base + path, json=body)
            assert answer.status_code == 200, (method, path, answer.text)
            return answer.json()

        tests = {"POST /ab/start", "GET /ab", "GET /ab/report", *STEERING}
        last = {"POST /dimensions/{name}/events", "POST /rollout/start", "POST /rollout/{command}", *tests}
        last.add("GET /differences")
        found = operations(document)
        for label in found.keys() - last:
            method, path = label.split()
            answer = send(method, *example(found[label], path))
            if label == "POST /events":
                assert [result["status"] for result in answer["results"]] == ["accepted"]
            if label == "POST /predict":
                assert answer["predictions"][0]["value"] is not None
        send("POST", *example(found["POST /rollout/start"], "/rollout/start"))
        until(lambda: client.rollout().phase == "shadow", "the version is tried", 60)
        operation = {**found["POST /rollout/{command}"], "parameters": []}
        for command in COMMANDS:
            send("POST", *example(operation, f"/rollout/{command}"))
        until(lambda: client.rollout().phase == "idle", "the rollout has ended", 60)
        assert send("POST", *example(found["POST /ab/start"], "/ab/start"))["running"]
        assert send("GET", "/ab", None)["variants"][0]["version"] == version
        assert "A/B test 2 of aqua" in client.ab_report()
        for label in STEERING:
            send("POST", *example(found[label], label.removeprefix("POST ")))
