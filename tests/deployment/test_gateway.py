"""The HTTP interface of a running gateway: answers, acknowledgements and refusals."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import httpx
import pytest

from serving.client import AsyncClient, TidegateError

INSTANCE = {"district": "dma_1", "temperature": 15.0, "rain": 0.0, "holiday": False}


@pytest.fixture
def http(demo):
    with httpx.Client(
        base_url=f"{demo.url}/v1/aqua", headers={"authorization": f"Bearer {demo.key}"}, timeout=30
    ) as client:
        yield client


def test_a_prediction_carries_interval_version_variant_and_flags(demo):
    with demo.client() as client:
        (answer,) = client.predict([INSTANCE])
        champion = client.rollout().champion
    assert answer.value is not None
    assert answer.interval is not None
    assert answer.interval[0] < answer.value < answer.interval[1]
    assert (answer.model_version, answer.variant) == (champion, "champion")


def test_a_batch_is_answered_in_order_and_equal_to_single_requests(demo):
    instances = [{**INSTANCE, "district": f"dma_{1 + i % 10}", "temperature": 10.0 + i % 7} for i in range(200)]
    with demo.client() as client:
        batch = client.predict(instances)
        singles = [client.predict([instance])[0] for instance in instances[:20]]
    assert len({answer.prediction_id for answer in batch}) == 200
    for one, many in zip(singles, batch, strict=False):
        assert one.value == pytest.approx(many.value, rel=1e-6)
        assert one.features == many.features


def test_an_unknown_entity_gets_a_flagged_answer_without_a_number(demo):
    with demo.client() as client:
        (answer,) = client.predict([{**INSTANCE, "district": "dma_99"}])
    assert answer.value is None
    assert answer.interval is None
    assert "unknown_entity" in answer.degraded
    assert "no_answer" in answer.degraded


async def _concurrently(demo) -> list[str]:
    import asyncio

    async with AsyncClient("aqua", url=demo.url, api_key=demo.key) as client:
        answers = await asyncio.gather(*(client.predict([INSTANCE]) for _ in range(50)))
        assert (await client.features("dma_1")).entity == "dma_1"
    return [answer[0].prediction_id for answer in answers]


def test_the_asynchronous_client_makes_concurrent_calls(demo):
    import asyncio

    assert len(set(asyncio.run(_concurrently(demo)))) == 50


def test_events_are_acknowledged_once_and_quarantined_by_rule(demo, http):
    now = http.get("/status").json()["clock"] // 1_000_000
    moment = datetime.fromtimestamp(now - 60, UTC).isoformat()
    good = {
        "district": "dma_77", "time": moment, "inflow": 5.0, "temperature": 10.0, "rain": 0.0, "humidity": None,
        "windspeed": 3.0, "holiday": False,
    }  # fmt: skip
    with demo.client() as client:
        first = client.events([good, {**good, "inflow": "n/a"}, {**good, "colour": 1}, good])
        again = client.events([good])
        features = client.features("dma_77")
    assert [result.status for result in first] == ["accepted", "quarantined", "quarantined", "accepted"]
    assert [result.duplicate for result in first] == [False, False, False, True]
    assert first[1].rules == ["inflow.type"]
    assert first[2].rules == ["colour.unknown"]
    assert again[0].duplicate
    assert features.features["inflow_last_1d"].value == 5.0
    assert features.features["inflow_count_1d"].value == 1


def test_an_event_nested_too_deeply_is_quarantined_and_the_one_beside_it_is_kept(http):
    moment = http.get("/status").json()["clock"] // 1_000_000 - 30
    good = {
        "district": "dma_78", "time": datetime.fromtimestamp(moment, UTC).isoformat(), "inflow": 5.0,
        "temperature": 10.0, "rain": 0.0, "humidity": None, "windspeed": 3.0, "holiday": False,
    }  # fmt: skip
    deep = b'{"a":' * 500 + b"1" + b"}" * 500
    body = b'{"events":[' + json.dumps(good).encode() + b"," + deep + b"]}"
    response = http.post("/events", content=body)
    assert response.status_code == 200, response.text
    assert [result["status"] for result in response.json()["results"]] == ["accepted", "quarantined"]


@pytest.mark.parametrize(
    ("path", "body", "status", "title"),
    [
        ("/predict", b"{", 400, "The body is not JSON"),
        ("/predict", b"[]", 400, "No instances"),
        ("/predict", b'{"instances": []}', 400, "No instances"),
        ("/predict", b'{"instances": [{"district": "dma_1"}]}', 422, "The request breaks its contract"),
        ("/predict", b'{"instances": [' + b"{}," * 1000 + b"{}]}", 413, "Too many instances"),
        ("/predict", b" " * (4 * 1024 * 1024 + 1), 413, "The body is too large"),
        ("/events", b'{"events": {}}', 400, "No events"),
        ("/feedback", b'{"outcomes": [{"prediction_id": "a", "value": "x"}]}', 422, "The request is not valid"),
        ("/feedback", b" " * (4 * 1024 * 1024 + 1), 413, "The body is too large"),
        ("/nowhere", b"{}", 404, "Not Found"),
    ],
)
def test_a_refusal_is_a_problem_document_that_says_what_and_where(http, path, body, status, title):
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["title"] == title
    assert problem["detail"]


def test_every_wrong_field_of_a_request_is_named(http):
    response = http.post("/predict", json={"instances": [INSTANCE, {**INSTANCE, "rain": -1, "temperature": "warm"}]})
    errors = {(error["pointer"], error["rule"]) for error in response.json()["errors"]}
    assert errors == {("/instances/1/rain", "rain.minimum"), ("/instances/1/temperature", "temperature.type")}


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/predict"), ("POST", "/events"), ("POST", "/feedback"), ("GET", "/features/dma_1"), ("GET", "/status")],
)
def test_no_route_that_reads_or_writes_answers_without_a_key(demo, method, path):
    response = httpx.request(method, f"{demo.url}/v1/aqua{path}", json={})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_client_raises_the_problem_of_a_refusal(demo):
    with demo.client() as client, pytest.raises(TidegateError, match=r"404 Unknown entity.*dma_98"):
        client.features("dma_98")


def test_health_readiness_and_documentation_need_no_key(demo):
    base = f"{demo.url}/v1/aqua"
    assert httpx.get(f"{base}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{base}/readyz").json() == {"status": "ready"}
    assert "openapi.json" in httpx.get(f"{base}/docs").text
    paths = httpx.get(f"{base}/openapi.json").json()["paths"]
    assert {"/predict", "/events", "/feedback", "/features/{entity}", "/healthz", "/readyz"} <= set(paths)


def test_outcomes_reach_their_table(demo, http):
    from cluster.tables import Tables
    from tests.deployment.waiting import drained

    with demo.client() as client:
        (answer,) = client.predict([INSTANCE])
        assert client.feedback({answer.prediction_id: 8.5}) == 1
        drained(client)
    tables = Tables(demo.settings.tables_url, demo.settings.storage_options)
    outcomes = dict(
        zip(*(tables.read("aqua/outcomes")[c].to_pylist() for c in ("prediction_id", "value")), strict=True)
    )
    logged = tables.read("aqua/predictions")["prediction_id"].to_pylist()
    assert outcomes[answer.prediction_id] == 8.5
    assert logged.count(answer.prediction_id) == 1
