"""The HTTP interface's documents as pydantic models: what OpenAPI shows and the client returns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines.spec.abtest import ABTest
from pipelines.spec.release import ReleasePolicy

Variant = Literal["champion", "challenger"]
"""The version that a tester asks for."""
VARIANT = "the version that is to answer, for testers: it is no evidence for or against a version that is being tried"
IDEMPOTENCY_KEY = (
    "the caller's name for the request: while a version is being tried, a repetition gets the same version"
)


MAX_INSTANCES, MAX_EVENTS, MAX_KEY = 1_000, 10_000, 200
"""The most instances and events of a request, and the most bytes of an idempotency key."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PredictRequest(_Request):
    """Instances: the entity and the view's inputs."""

    instances: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_INSTANCES)


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

    events: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_EVENTS)


class RuleProblem(BaseModel):
    """A broken rule of the contract."""

    field: str
    rule: str
    message: str


class EventResult(BaseModel):
    """What became of one event. A duplicate was stored before and is accepted without being stored again.

    ``warnings`` are rules that an accepted event breaks and that refuse none.
    """

    status: Literal["accepted", "quarantined"]
    event_id: str | None = None
    sequence: int | None = None
    duplicate: bool = False
    warnings: list[str] = []
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

    outcomes: list[Outcome] = Field(min_length=1, max_length=MAX_EVENTS)


class FeedbackResponse(BaseModel):
    """How many outcomes are durable now."""

    accepted: int


class FeatureValue(BaseModel):
    """One stored feature of an entity, as of now."""

    value: float | None
    status: str
    age_seconds: float | None


class FeaturesResponse(BaseModel):
    """All stored features of an entity by the champion's view, the log sequence and the state generation they were
    read at.
    """

    entity: str
    view: str
    sequence: int
    generation: int
    features: dict[str, FeatureValue]


class RolloutCommand(_Request):
    """Why an operator pauses, resumes, approves or aborts; it is kept in the journal with the key's name."""

    reason: str = Field(default="", max_length=500)


class RolloutStart(_Request):
    """A version to be released, under the page's policy or another.

    ``force`` passes over gates that did not pass, and needs a reason.
    """

    version: str = Field(pattern=r"^[1-9][0-9]{0,8}$")
    policy: ReleasePolicy | None = None
    force: bool = False
    reason: str = Field(default="", max_length=500)


class RolloutEvidence(BaseModel):
    """What is known of the challenger. A guardrail acts when its ``log_e`` reaches its ``threshold``.

    ``skewed`` are the answers that the last audit since the rollout was resumed found to differ from what their events
    make again, ``degraded`` the requests since then whose inputs were missing, stale or made up.
    """

    challenger_requests: int
    served: int
    harmed: int
    copies: int
    disagreed: int
    days: int
    skewed: int = 0
    degraded: int = 0
    log_e: dict[str, float | None]
    threshold: dict[str, float | None]


class RolloutStatus(BaseModel):
    """Where the release stands. ``ended`` is the last version tried, ``outcome`` how that went.

    ``reverted`` is a champion that was taken back to the version before it since the last rollout began.
    """

    phase: str
    champion: str | None
    previous: str | None
    challenger: str | None
    variants: list[str] = Field(default=[], description="the versions of an A/B test beside the champion")
    rollout: int
    step: int
    weight: float
    paused: bool
    outcome: str | None
    ended: str | None
    reverted: str | None = None
    evidence: RolloutEvidence
    verdict: str | None = None
    reason: str | None = None
    waiting: list[str] = Field(default=[], description="versions whose release was asked for and not begun")


class DifferentCase(BaseModel):
    """An instance that two versions answered, at a moment in microseconds since the Unix epoch."""

    prediction_id: str
    entity: str
    at_us: int
    tried: float
    other: float


class RolloutDifferences(BaseModel):
    """What the version that is tried says differently from the other one, in the target's unit: the mean difference,
    quantiles of its absolute value, and the cases in which it is largest.
    """

    version: str
    instances: int
    mean: float
    quantiles: dict[str, float]
    worst: list[DifferentCase]


class ABTestStart(_Request):
    """An A/B test of versions that passed their gates; ``force`` passes over those that did not, and needs a reason."""

    test: ABTest
    force: bool = False
    reason: str = Field(default="", max_length=500)


class Comparison(BaseModel):
    """A variant of an A/B test against the champion: by how much the means of their units differ, and between what.

    ``finding`` is better, worse or open. What is not known yet is null.
    """

    version: str
    units: int
    mean: float | None
    difference: float | None
    low: float | None
    high: float | None
    finding: str


class SampleRatio(BaseModel):
    """Evidence that units were not assigned by their shares; the test pauses when ``log_e`` reaches ``threshold``."""

    log_e: float | None
    threshold: float | None


class ABTestStatus(BaseModel):
    """Where the last A/B test stands. Moments are microseconds since the Unix epoch; ``assigned`` counts units by
    version, the champion's first, since the test began or was last resumed, and ``accidents`` the requests in which the
    champion had to answer for a variant.
    """

    test: int
    definition: dict[str, Any]
    running: bool
    paused: bool
    champion: str
    champion_units: int
    champion_mean: float | None
    variants: list[Comparison]
    sample_ratio: SampleRatio
    outcome: str | None
    winner: str | None
    started_us: int
    at_us: int | None = Field(description="when outcomes were last read")
    assigned: list[int]
    served: int
    harmed: int
    accidents: int
    reason: str | None = None


class LogStatus(BaseModel):
    """The last sequence of a stream, and how many of its records are not in their table yet."""

    last: int
    pending: int


class ViewStatus(BaseModel):
    """The generation of a view's state, the log sequence it has applied, and the events it could not place."""

    generation: int
    applied: int
    unplaced: int


class GatewayStatus(BaseModel):
    """Where one gateway stands. ``clock`` is the cluster's, in microseconds since the Unix epoch."""

    model_config = ConfigDict(extra="allow")

    usecase: str
    replica: str
    clock: int
    epoch: int
    champion: str
    applied: int
    views: dict[str, ViewStatus]
    log: dict[str, LogStatus]
    dimensions: dict[str, LogStatus]
    refused: dict[str, str] = Field(description="versions that cannot be loaded or tried here, and why")
    failures: list[str]


class Alive(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The replica can answer and everything behind it works."""

    status: Literal["ready"] = "ready"


class Place(BaseModel):
    """One thing that is wrong: where, by which rule, and what to change."""

    pointer: str
    rule: str
    detail: str


class ProblemDocument(BaseModel):
    """A refusal, as of RFC 9457."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    errors: list[Place] = []
