"""The FastAPI part of a gateway: feedback, features, status, health, and the description of every route."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import Depends, Path, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from cluster.log import LogUnavailable
from pipelines.contracts.requests import compile_model
from pipelines.features.state import StateError
from serving import wire
from serving.answers import instances
from serving.auth import Principal, Scope
from serving.bodies import invalid, parse, read_body
from serving.description import DescribedApp, dimensions, events_extra, predict_extra, refusals, takes
from serving.problems import MEDIA_TYPE, Problem

if TYPE_CHECKING:
    from serving.gateway import Gateway

Body = TypeVar("Body", bound=BaseModel)
_BEARER = HTTPBearer(  # shows the scheme in the description; KeyRing decides
    auto_error=False, scheme_name="ApiKey", bearerFormat="API key", description="A key with the scope that is named."
)
_KEY = (401, 403, 429)
_OUTCOME = {"outcomes": [{"prediction_id": "0" * 28, "value": 1.0}]}
_REASON = {"reason": "seen and found good"}
_TEST = {"test": {"variants": [{"version": "2", "share": 0.5}]}, **_REASON}


def _response(problem: Problem) -> Response:
    headers = {key.decode(): value.decode() for key, value in problem.headers()}
    return Response(problem.body(), problem.status, headers=headers, media_type=MEDIA_TYPE.decode())


def build_api(gateway: Gateway) -> DescribedApp:
    """The app of one use case. ``predict`` and ``…/events`` are described here and answered by the gateway itself."""
    use_case = gateway.use_case
    prefix = f"/v1/{use_case.name}"
    app = DescribedApp(
        title=use_case.title,
        version=use_case.contract.version,
        docs_url="/docs",
        openapi_url="/openapi.json",
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )

    def principal(scope: Scope) -> Any:
        def check(request: Request) -> Principal:
            authorization = request.headers.get("authorization")
            return gateway.keys.require(authorization.encode("latin-1") if authorization else None, scope)

        return Depends(check)

    def allow(scope: Scope) -> list[Any]:
        return [Security(_BEARER, scopes=[scope.value]), principal(scope)]

    def body(model: type[Body]) -> Any:
        """The body as ``model``, by JSON's own types. It is read when the key has been checked."""

        async def read(request: Request) -> Body:
            text = await read_body(request.receive, gateway.settings.body_limit)
            parse(text)  # pydantic takes more for JSON than ``predict`` does
            try:
                return model.model_validate_json(text, strict=True)
            except ValidationError as error:
                raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error

        return Depends(read)

    releaser = principal(Scope.RELEASE)
    by_release = [Security(_BEARER, scopes=[Scope.RELEASE.value])]
    outcomes, to_start, to_command = body(wire.FeedbackRequest), body(wire.RolloutStart), body(wire.RolloutCommand)
    to_test = body(wire.ABTestStart)
    facts = dimensions(use_case)
    named = Path(examples=list(facts)[:1] or None, json_schema_extra={"enum": list(facts)} if facts else None)
    known = (instances(use_case).example() or {}).get(use_case.contract.entity)
    entity_path = Path(examples=[known] if known else None)

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> Response:
        return _response(error)

    @app.exception_handler(SQLAlchemyError)
    async def unavailable(_: Request, error: SQLAlchemyError) -> Response:
        return _response(Problem(503, "The database does not answer", "Try again; nothing is lost.", retry_after_s=1))

    @app.exception_handler(LogUnavailable)
    async def without_log(_: Request, error: LogUnavailable) -> Response:
        return _response(Problem(503, "The log does not answer", str(error), retry_after_s=1))

    @app.exception_handler(StateError)
    async def without_state(_: Request, error: StateError) -> Response:
        return _response(Problem(503, "State is not ready", str(error)))

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> Response:
        errors = [
            {"pointer": "/" + "/".join(map(str, e["loc"][1:])), "rule": e["type"], "detail": e["msg"]}
            for e in error.errors()
        ]
        return _response(invalid(errors))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        response = _response(Problem(error.status_code, str(error.detail), f"See {prefix}/docs for what there is."))
        response.headers.update(error.headers or {})  # of a 405, the methods that there are
        return response

    @app.post(
        "/predict",
        dependencies=allow(Scope.PREDICT),
        responses=refusals(400, *_KEY, 409, 413, 422, 503),
        openapi_extra=predict_extra(use_case),
        tags=["predict"],
    )
    async def predict() -> wire.PredictResponse:
        """Answers each instance with a value, an interval and the status of its features."""
        raise AssertionError("the gateway answers this route before FastAPI sees it")

    @app.post(
        "/events",
        dependencies=allow(Scope.INGEST),
        responses=refusals(400, *_KEY, 413, 422, 503),
        openapi_extra=events_extra(compile_model(use_case.contract)),
        tags=["ingest"],
    )
    async def events() -> wire.EventsResponse:
        """Takes events; each is acknowledged when it is durable, or quarantined with the rules it breaks."""
        raise AssertionError("the gateway answers this route before FastAPI sees it")

    @app.post(
        "/dimensions/{name}/events",
        dependencies=allow(Scope.INGEST),
        responses=refusals(400, *_KEY, 404, 413, 422, 503),
        openapi_extra=events_extra(*facts.values()),
        tags=["ingest"],
    )
    async def dimension(name: str = named) -> wire.EventsResponse:
        """Takes rows of a dimension, as ``events`` does events."""
        raise AssertionError("the gateway answers this route before FastAPI sees it")

    @app.post(
        "/feedback",
        dependencies=allow(Scope.FEEDBACK),
        responses=refusals(400, *_KEY, 413, 422, 503),
        openapi_extra=takes(wire.FeedbackRequest, _OUTCOME),
        tags=["feedback"],
    )
    async def feedback(body: wire.FeedbackRequest = outcomes) -> wire.FeedbackResponse:
        """Takes outcomes of earlier predictions; they are durable when this answers."""
        await gateway.outcomes([outcome.model_dump() for outcome in body.outcomes])
        return wire.FeedbackResponse(accepted=len(body.outcomes))

    # An entity may have a slash in its name.
    @app.get(
        "/features/{entity:path}", dependencies=allow(Scope.READ), responses=refusals(*_KEY, 404, 503), tags=["read"]
    )
    def features(entity: str = entity_path) -> wire.FeaturesResponse:
        """What state holds for an entity: value, status and age of every stored feature."""
        return wire.FeaturesResponse(**gateway.predictor.features(entity, gateway.clock.now(), gateway.view))

    @app.get("/status", dependencies=allow(Scope.READ), responses=refusals(*_KEY, 503), tags=["read"])
    def status() -> wire.GatewayStatus:
        """Where the log, the state, the drain and the routing stand."""
        return wire.GatewayStatus(**gateway.status())

    @app.get("/rollout", dependencies=allow(Scope.READ), responses=refusals(*_KEY, 503), tags=["rollout"])
    def rollout() -> wire.RolloutStatus:
        """Where the release stands, its evidence, and what the judge says of it."""
        return wire.RolloutStatus(**gateway.rollouts.status())

    @app.get("/differences", dependencies=allow(Scope.READ), responses=refusals(*_KEY, 404, 503), tags=["rollout"])
    def differences() -> wire.RolloutDifferences:
        """What the version that is tried says differently: the distribution, and the worst cases."""
        return wire.RolloutDifferences(**gateway.rollouts.differences())

    @app.post(
        "/rollout/start",
        dependencies=by_release,
        responses=refusals(400, *_KEY, 409, 413, 422, 503),
        openapi_extra=takes(wire.RolloutStart, {"version": "2", **_REASON}),
        tags=["rollout"],
    )
    def start(who: Principal = releaser, body: wire.RolloutStart = to_start) -> wire.RolloutStatus:
        """Asks for the release of a version; the controller takes requests in their order."""
        gateway.rollouts.start(body.version, by=who.name, policy=body.policy, force=body.force, reason=body.reason)
        return wire.RolloutStatus(**gateway.rollouts.status())

    @app.post(
        "/rollout/{command}",
        dependencies=by_release,
        responses=refusals(400, *_KEY, 409, 413, 422, 503),
        openapi_extra=takes(wire.RolloutCommand, _REASON),
        tags=["rollout"],
    )
    def command(
        command: Literal["pause", "resume", "approve", "abort", "revert"],
        who: Principal = releaser,
        body: wire.RolloutCommand = to_command,
    ) -> wire.RolloutStatus:
        """Pauses, resumes, approves or aborts the rollout or A/B test that is under way, or takes the champion back."""
        return wire.RolloutStatus(**gateway.rollouts.command(command, by=who.name, reason=body.reason))

    @app.get("/ab", dependencies=allow(Scope.READ), responses=refusals(*_KEY, 404, 503), tags=["A/B test"])
    def test() -> wire.ABTestStatus:
        """Where the last A/B test stands: its units, and how each variant compares with the champion."""
        return wire.ABTestStatus(**gateway.rollouts.test())

    @app.get(
        "/ab/report",
        dependencies=allow(Scope.READ),
        responses=refusals(*_KEY, 404, 409, 503),
        response_class=HTMLResponse,
        tags=["A/B test"],
    )
    def test_report() -> HTMLResponse:
        """The same as a page, with a plot of the confidence sequences."""
        return HTMLResponse(gateway.rollouts.test_report())

    @app.post(
        "/ab/start",
        dependencies=by_release,
        responses=refusals(400, *_KEY, 409, 413, 422, 503),
        openapi_extra=takes(wire.ABTestStart, _TEST),
        tags=["A/B test"],
    )
    def start_test(who: Principal = releaser, body: wire.ABTestStart = to_test) -> wire.ABTestStatus:
        """Begins an A/B test of versions beside the champion."""
        found = gateway.rollouts.start_test(body.test, by=who.name, force=body.force, reason=body.reason)
        return wire.ABTestStatus(**found)

    def steering(word: str) -> Callable[..., wire.ABTestStatus]:
        def command_test(who: Principal = releaser, body: wire.RolloutCommand = to_command) -> wire.ABTestStatus:
            """Pauses, resumes or aborts the A/B test that runs; while it is paused the champion answers all."""
            return wire.ABTestStatus(**gateway.rollouts.command_test(word, by=who.name, reason=body.reason))

        return command_test

    for word in ("pause", "resume", "abort"):  # a route each: one for all would take a POST to the report for a command
        app.post(
            f"/ab/{word}",
            name=f"{word}_test",
            dependencies=by_release,
            responses=refusals(400, *_KEY, 404, 409, 413, 422, 503),
            openapi_extra=takes(wire.RolloutCommand, _REASON),
            tags=["A/B test"],
        )(steering(word))

    @app.get("/healthz", tags=["health"])
    def healthz() -> wire.Alive:
        """The process answers."""
        return wire.Alive()

    @app.get("/readyz", responses=refusals(503), tags=["health"])
    def readyz() -> wire.Ready:
        """The replica can answer and everything behind it works."""
        if failures := gateway.failures():
            raise Problem(503, "Not ready", "; ".join(failures))
        return wire.Ready()

    return app
