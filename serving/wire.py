"""The HTTP interface's documents as pydantic models: what OpenAPI shows and the client returns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PredictRequest(_Request):
    """Instances: the entity and the view's inputs."""

    instances: list[dict[str, Any]] = Field(min_length=1, max_length=1000)


class Prediction(BaseModel):
    """One answer. ``value`` is null when no number can be given; ``degraded`` then says why."""

    prediction_id: str
    value: float | None
    interval: tuple[float, float] | None
    model_version: str
    variant: str
    features: dict[str, str] = Field(description="status of every feature that is not FRESH")
    degraded: list[str]


class PredictResponse(BaseModel):
    """The answers in the order of the instances; ``as_of`` is when features were taken."""

    predictions: list[Prediction]
    as_of: str


class EventsRequest(_Request):
    """Events in the form of the contract."""

    events: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)


class RuleProblem(BaseModel):
    """A broken rule of the contract."""

    field: str
    rule: str
    message: str


class EventResult(BaseModel):
    """What became of one event. A duplicate was stored before and is accepted without being stored again."""

    status: Literal["accepted", "quarantined"]
    event_id: str | None = None
    sequence: int | None = None
    duplicate: bool = False
    rules: list[str] = []
    problems: list[RuleProblem] = []


class EventsResponse(BaseModel):
    """One result per event, in order."""

    results: list[EventResult]


class Outcome(_Request):
    """What really happened for one prediction, in the target's unit."""

    prediction_id: str = Field(min_length=1, max_length=64)
    value: float


class FeedbackRequest(_Request):
    """Outcomes of earlier predictions."""

    outcomes: list[Outcome] = Field(min_length=1, max_length=10_000)


class FeedbackResponse(BaseModel):
    """How many outcomes are durable now."""

    accepted: int


class FeatureValue(BaseModel):
    """One stored feature of an entity, as of now."""

    value: float | None
    status: str
    age_seconds: float | None


class FeaturesResponse(BaseModel):
    """All stored features of an entity, the log sequence and the state generation they were read at."""

    entity: str
    sequence: int
    generation: int
    features: dict[str, FeatureValue]
