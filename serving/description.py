"""The OpenAPI document of a gateway: bodies by the contracts of the page, examples that these accept, every refusal."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from pipelines.contracts.requests import RecordModel, compile_model
from pipelines.spec import UseCase
from serving import wire
from serving.answers import instances
from serving.problems import MEDIA_TYPE

_REF = "#/components/schemas/{model}"
_RETRY = {
    "Retry-After": {"description": "seconds to wait before the request is sent again", "schema": {"type": "integer"}}
}
_REFUSED: dict[int, dict[str, Any]] = {
    400: {"description": "A body that is no JSON or has no entries, or a header that does not fit"},
    401: {
        "description": "No key, an unknown one, or one that has expired",
        "headers": {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}},
    },
    403: {"description": "The key lacks the scope"},
    404: {"description": "There is nothing of that name"},
    409: {"description": "It does not fit what is being released"},
    413: {"description": "More bytes or entries than a request may have"},
    422: {"description": "What breaks the contract or this description, by its place"},
    429: {"description": "More than the key or the log may take; send it again", "headers": _RETRY},
    503: {"description": "What is needed to answer is not ready or does not answer", "headers": _RETRY},
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem documents that a route may answer with, as FastAPI takes ``responses``."""
    content = {MEDIA_TYPE.decode(): {"schema": {"$ref": _REF.format(model=wire.ProblemDocument.__name__)}}}
    return {status: {**_REFUSED[status], "content": content} for status in statuses}


def takes(model: type[BaseModel], example: dict[str, Any] | None, **entries: Any) -> dict[str, Any]:
    """The body of a route, as FastAPI takes ``openapi_extra``; ``entries`` are what its lists hold, by their name."""
    schema = model.model_json_schema(ref_template=_REF)
    for name, items in entries.items():
        schema["properties"][name]["items"] = items
    media = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": media}}}


def predict_extra(use_case: UseCase) -> dict[str, Any]:
    """The body and headers of ``predict``."""
    model = instances(use_case)
    headers = [
        _header("Idempotency-Key", wire.IDEMPOTENCY_KEY, {"type": "string", "minLength": 1, "maxLength": wire.MAX_KEY}),
        _header("Tidegate-Variant", wire.VARIANT, {"enum": ["champion", "challenger"]}),
    ]
    return {
        "parameters": headers,
        **takes(wire.PredictRequest, _one("instances", model), instances=model.json_schema()),
    }


def events_extra(*models: RecordModel) -> dict[str, Any]:
    """The body of a route that takes rows of any of ``models``; the example is of the first."""
    anything = {"description": "Whatever breaks the contract is quarantined, with the rules that it breaks."}
    rows = {"anyOf": [*(model.json_schema() for model in models), anything]}
    return takes(wire.EventsRequest, _one("events", models[0]) if models else None, events=rows)


def dimensions(use_case: UseCase) -> dict[str, RecordModel]:
    """The rules of one row of each dimension."""
    return {part.name: compile_model(part.contract, name=part.name) for part in use_case.dimensions}


def _one(name: str, model: RecordModel) -> dict[str, Any] | None:
    example = model.example()
    return None if example is None else {name: [example]}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


class DescribedApp(FastAPI):
    """A FastAPI app that answers with problem documents, and whose document says so and nothing else."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            problem = wire.ProblemDocument.model_json_schema(ref_template=_REF)
            schemas |= problem.pop("$defs") | {wire.ProblemDocument.__name__: problem}
            for operation in (operation for path in document["paths"].values() for operation in path.values()):
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    del operation["responses"]["422"]  # FastAPI's own
                for media in operation.get("requestBody", {}).get("content", {}).values():
                    schemas |= media["schema"].pop("$defs", {})
        assert self.openapi_schema is not None
        return self.openapi_schema
