"""A source of events: what loads, logs, drains and tables know of a use case, and of each of its dimensions."""

from __future__ import annotations

from pydantic import Field as PydanticField

from pipelines.spec.base import Spec
from pipelines.spec.contract import Contract


class EventSource(Spec):
    """Events under one contract. Tables, log and lease are kept by the name; ``usecase.dimension`` is a dimension's."""

    name: str = PydanticField(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?$")
    contract: Contract
