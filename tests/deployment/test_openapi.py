"""The OpenAPI document: valid, whole, with examples that the contracts accept and every refusal as it is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import jsonschema
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from openapi_spec_validator import validate

from cluster.settings import Settings
from pipelines import usecases
from pipelines.contracts.requests import check_record, compile_model
from pipelines.spec import FieldType, UseCase
from serving.answers import instances
from serving.auth import ConfiguredKey, KeyRing, Scope
from serving.bodies import entries
from serving.problems import Problem
from tests.data.profiles import PROFILE, made_case
from tests.deployment.bare_gateway import BareGateway
from tests.deployment.test_routes import operations

KEY = "a-key-that-may-do-everything"
PAGES = {name: usecases.load(name) for name in usecases.names()} | {"with_dimensions": made_case()}
NOW_US = 1_800_000_000_000_000
PROBLEM, JSON = "application/problem+json", "application/json"


def bare(case: UseCase, home: Any, **options: Any) -> BareGateway:
    keys = KeyRing([ConfiguredKey(name="all", key=KEY, scopes=frozenset(Scope), **options)])
    return BareGateway(case, keys, Settings(home=home))


@pytest.fixture(params=sorted(PAGES))
def case(request: pytest.FixtureRequest) -> UseCase:
    return PAGES[request.param]


@pytest.fixture
def gateway(case: UseCase, home: Any) -> BareGateway:
    return bare(case, home)


@pytest.fixture
def document(gateway: BareGateway) -> dict[str, Any]:
    return TestClient(gateway).get("/openapi.json").json()


def body(operation: dict[str, Any]) -> dict[str, Any]:
    return operation["requestBody"]["content"][JSON]


def test_the_document_is_one_of_openapi_and_has_every_route(gateway, document):
    validate(document)
    routes = {
        f"{method} {r.path_format}" for r in gateway.api.routes if isinstance(r, APIRoute) for method in r.methods
    }
    assert set(operations(document)) == routes
    assert len({operation["operationId"] for operation in operations(document).values()}) == len(routes)


def test_every_operation_says_what_it_takes_and_what_it_answers(document):
    for label, operation in operations(document).items():
        answers = operation["responses"]
        if label == "GET /ab/report":
            assert answers["200"]["content"] == {"text/html": {"schema": {"type": "string"}}}
        else:
            assert set(answers["200"]["content"]) == {JSON}
            assert answers["200"]["content"][JSON]["schema"].keys() == {"$ref"}, label
        for status, answer in answers.items():
            if status != "200":
                assert answer["content"] == {PROBLEM: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}
                assert answer["description"], (label, status)
        if "security" in operation:
            assert {"401", "403", "429"} <= answers.keys(), label
        if label.startswith("POST"):
            assert {"400", "413", "422"} <= answers.keys(), label
            assert body(operation)["schema"]["additionalProperties"] is False


def test_predict_takes_its_two_headers(document):
    found = {p["name"]: p["schema"] for p in operations(document)["POST /predict"]["parameters"]}
    assert found == {
        "Idempotency-Key": {"type": "string", "minLength": 1, "maxLength": 200},
        "Tidegate-Variant": {"enum": ["champion", "challenger"]},
    }


def test_the_examples_keep_the_contract_and_the_schema_that_stands_beside_them(case, document):
    found = operations(document)
    posts = {label for label in found if label.startswith("POST")}
    with_example = {label for label in posts if "example" in body(found[label])}
    assert with_example == posts - (set() if case.dimensions else {"POST /dimensions/{name}/events"})
    for label in with_example:
        media = body(found[label])
        jsonschema.Draft202012Validator({**media["schema"], "components": document["components"]}).validate(
            media["example"]
        )
    (instance,) = entries(body(found["POST /predict"])["example"], "instances", 1)
    assert check_record(instances(case), instance, NOW_US)[1] == []
    (event,) = entries(body(found["POST /events"])["example"], "events", 1)
    assert check_record(compile_model(case.contract), event, NOW_US)[1] == []
    (entity,) = found["GET /features/{entity}"]["parameters"]
    assert entity["schema"]["examples"] == [instance[case.contract.entity]]


def test_a_page_with_dimensions_names_them_and_shows_a_row(home):
    document = TestClient(bare(PAGES["with_dimensions"], home)).get("/openapi.json").json()
    operation = operations(document)["POST /dimensions/{name}/events"]
    names = [dimension.name for dimension in PAGES["with_dimensions"].dimensions]
    assert PROFILE.name in names
    (parameter,) = operation["parameters"]
    assert (parameter["schema"]["enum"], parameter["schema"]["examples"]) == (names, names[:1])
    (row,) = body(operation)["example"]["events"]
    first = PAGES["with_dimensions"].dimensions[0]
    assert check_record(compile_model(first.contract), row, NOW_US)[1] == []
    rows = body(operation)["schema"]["properties"]["events"]["items"]["anyOf"]
    assert [set(schema.get("properties", ())) for schema in rows] == [
        *({field.name for field in d.contract.fields} for d in PAGES["with_dimensions"].dimensions),
        set(),
    ]


def test_without_an_example_of_a_pattern_none_is_made_up(home):
    aqua = PAGES["aqua"]
    fields = tuple(field.model_copy(update={"example": None}) for field in aqua.contract.fields)
    case = aqua.model_copy(update={"contract": aqua.contract.model_copy(update={"fields": fields})})
    assert any(field.type is FieldType.STRING and field.pattern for field in fields)
    found = operations(TestClient(bare(case, home)).get("/openapi.json").json())
    assert "example" not in body(found["POST /predict"])
    assert "example" not in body(found["POST /events"])
    assert "example" in body(found["POST /feedback"])
    validate(TestClient(bare(case, home)).get("/openapi.json").json())


@pytest.mark.parametrize(
    ("path", "content", "status", "pointers"),
    [
        ("/feedback", b"{", 400, None),
        ("/feedback", b'{"outcomes": [{"prediction_id": "a", "value": NaN}]}', 400, None),
        ("/feedback", b'{"outcomes": [{"prediction_id": "a", "value": "1"}]}', 422, ["/outcomes/0/value"]),
        ("/feedback", b'{"outcomes": [{"prediction_id": "a", "value": true}]}', 422, ["/outcomes/0/value"]),
        ("/feedback", b'{"outcomes": [], "by": 1}', 422, ["/outcomes", "/by"]),
        ("/events", b'{"events": [{}], "by": 1}', 422, ["/by"]),
        ("/rollout/start", b'{"version": " 1"}', 422, ["/version"]),
        ("/rollout/start", b'{"version": "1", "force": "yes"}', 422, ["/force"]),
        ("/rollout/start", b'{"version": "1", "policy": {"alpha": "0.1"}}', 422, ["/policy/alpha"]),
        ("/rollout/pause", b'{"reason": 1}', 422, ["/reason"]),
        ("/ab/start", b'{"test": {"variants": []}}', 422, ["/test/variants"]),
        ("/ab/start", b'{"test": {"variants": [{"version": "2", "share": 0.999}]}}', 422, ["/test"]),
        ("/rollout/delete", b"{}", 422, ["/command"]),
    ],
)
def test_a_body_that_the_document_does_not_allow_is_refused_as_the_document_says(home, path, content, status, pointers):
    client = TestClient(bare(PAGES["aqua"], home), headers={"authorization": f"Bearer {KEY}"})
    refused = client.post(path, content=content)
    assert (refused.status_code, refused.headers["content-type"]) == (status, PROBLEM), refused.text
    if pointers is not None:
        assert [error["pointer"] for error in refused.json()["errors"]] == pointers


@pytest.mark.parametrize("path", ["/predict", "/events", "/feedback", "/rollout/start"])
def test_a_body_of_no_declared_length_is_read_no_further_than_the_limit(home, path):
    piece, read, answers = b" " * 65_536, [0], []
    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    scope = {
        "type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "root_path": "",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        read[0] += len(piece)
        assert read[0] < 10 * 1024 * 1024, "nobody stops reading"
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    asyncio.run(bare(PAGES["aqua"], home)(scope, receive, send))
    assert answers[0]["status"] == 413
    assert read[0] <= 4 * 1024 * 1024 + len(piece)


@pytest.mark.parametrize("zone", ["Europe", "Nowhere", "", "../etc", "\x00"])
def test_a_policy_with_a_time_zone_that_does_not_exist_is_refused(home, zone):
    policy = {"blackouts": [{"begin": "22:00", "end": "06:00", "zone": zone}]}
    client = TestClient(bare(PAGES["aqua"], home), headers={"authorization": f"Bearer {KEY}"})
    refused = client.post("/rollout/start", json={"version": "1", "policy": policy})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/policy/blackouts/0"


def test_a_predict_body_with_more_than_its_instances_is_refused():
    with pytest.raises(Problem) as refused:
        entries({"instances": [{}], "parameters": {}}, "instances", 1)
    assert (refused.value.status, refused.value.errors[0]["pointer"]) == (422, "/parameters")
