"""The FastAPI part of a gateway: feedback, features, status, health, and the description of every route."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from cluster.log import LogUnavailable
from pipelines.features.state import StateError
from serving import wire
from serving.auth import Principal, Scope
from serving.problems import MEDIA_TYPE, Problem

if TYPE_CHECKING:
    from serving.gateway import Gateway

_BEARER = HTTPBearer(auto_error=False)  # shows the scheme in the description; KeyRing decides


def _response(problem: Problem) -> Response:
    headers = {key.decode(): value.decode() for key, value in problem.headers()}
    return Response(problem.body(), problem.status, headers=headers, media_type=MEDIA_TYPE.decode())


def build_api(gateway: Gateway) -> FastAPI:
    """The app of one use case. ``predict`` and ``…/events`` are described here and answered by the gateway itself."""
    prefix = f"/v1/{gateway.use_case.name}"
    app = FastAPI(
        title=gateway.use_case.title,
        version=gateway.use_case.contract.version,
        docs_url="/docs",
        openapi_url="/openapi.json",
        redoc_url=None,
    )

    def principal(scope: Scope) -> Any:
        def check(request: Request) -> Principal:
            authorization = request.headers.get("authorization")
            return gateway.keys.require(authorization.encode() if authorization else None, scope)

        return Depends(check)

    releaser = principal(Scope.RELEASE)

    def allow(scope: Scope) -> list[Any]:
        return [Depends(_BEARER), principal(scope)]

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
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        errors = [
            {"pointer": "/" + "/".join(map(str, e["loc"][1:])), "rule": e["type"], "detail": e["msg"]}
            for e in error.errors()
        ]
        return _response(Problem(422, "The request is not valid", "Mend the fields listed under errors.", errors))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return _response(Problem(error.status_code, str(error.detail), f"See {prefix}/docs for what there is."))

    @app.post("/predict", dependencies=allow(Scope.PREDICT), tags=["predict"])
    async def predict(
        body: wire.PredictRequest,
        idempotency_key: Annotated[str | None, Header(max_length=200, description=wire.IDEMPOTENCY_KEY)] = None,
        tidegate_variant: Annotated[wire.Variant | None, Header(description=wire.VARIANT)] = None,
    ) -> wire.PredictResponse:
        """Answers each instance with a value, an interval and the status of its features."""
        raise AssertionError("the gateway answers this route before FastAPI sees it")

    @app.post("/events", dependencies=allow(Scope.INGEST), tags=["ingest"])
    async def events(body: wire.EventsRequest) -> wire.EventsResponse:
        """Takes events; each is acknowledged when it is durable, or quarantined with the rules it breaks."""
        raise AssertionError("the gateway answers this route before FastAPI sees it")

    @app.post("/dimensions/{name}/events", dependencies=allow(Scope.INGEST), tags=["ingest"])
    async def dimension(name: str, body: wire.EventsRequest) -> wire.EventsResponse:
        """Takes rows of a dimension, as ``events`` does events."""
        raise AssertionError("the gateway answers this route before FastAPI sees it")

    @app.post("/feedback", dependencies=allow(Scope.FEEDBACK), tags=["feedback"])
    async def feedback(body: wire.FeedbackRequest) -> wire.FeedbackResponse:
        """Takes outcomes of earlier predictions; they are durable when this answers."""
        await gateway.outcomes([outcome.model_dump() for outcome in body.outcomes])
        return wire.FeedbackResponse(accepted=len(body.outcomes))

    @app.get("/features/{entity}", dependencies=allow(Scope.READ), tags=["read"])
    def features(entity: str) -> wire.FeaturesResponse:
        """What state holds for an entity: value, status and age of every stored feature."""
        return wire.FeaturesResponse(**gateway.predictor.features(entity, gateway.clock.now(), gateway.view))

    @app.get("/status", dependencies=allow(Scope.READ), tags=["read"])
    def status() -> dict[str, Any]:
        """Where the log, the state, the drain and the routing stand."""
        return gateway.status()

    @app.get("/rollout", dependencies=allow(Scope.READ), tags=["rollout"])
    def rollout() -> wire.RolloutStatus:
        """Where the release stands, its evidence, and what the judge says of it."""
        return wire.RolloutStatus(**gateway.rollouts.status())

    @app.post("/rollout/start", dependencies=[Depends(_BEARER)], tags=["rollout"])
    def start(body: wire.RolloutStart, who: Principal = releaser) -> wire.RolloutStatus:
        """Asks for the release of a version; the controller takes requests in their order."""
        gateway.rollouts.start(body.version, by=who.name, policy=body.policy, force=body.force, reason=body.reason)
        return wire.RolloutStatus(**gateway.rollouts.status())

    @app.post("/rollout/{command}", dependencies=[Depends(_BEARER)], tags=["rollout"])
    def command(
        command: Literal["pause", "resume", "approve", "abort", "revert"],
        body: wire.RolloutCommand,
        who: Principal = releaser,
    ) -> wire.RolloutStatus:
        """Pauses, resumes, approves or aborts the rollout that is under way, or takes the champion back."""
        return wire.RolloutStatus(**gateway.rollouts.command(command, by=who.name, reason=body.reason))

    @app.get("/healthz", tags=["health"])
    def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"])
    def readyz() -> dict[str, str]:
        """The replica can answer and everything behind it works."""
        if failures := gateway.failures():
            raise Problem(503, "Not ready", "; ".join(failures))
        return {"status": "ready"}

    return app
