"""One page of definitions: everything Tidegate needs to know of a use case."""

from __future__ import annotations

from datetime import timedelta
from typing import Self

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.contract import NUMBERS, FieldType
from pipelines.spec.fallback import Fallback
from pipelines.spec.features import FOLDS_OF_STRINGS, Dimension, FeatureView, Neighbours
from pipelines.spec.model import Gate, ModelSpec
from pipelines.spec.release import ReleasePolicy
from pipelines.spec.retraining import RetrainPolicy
from pipelines.spec.source import EventSource

_COUNTABLE = (*NUMBERS, FieldType.STRING)


class UseCase(EventSource):
    """A contract, a feature view, a model and its gates, checked against each other when the page loads."""

    name: str = PydanticField(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    view: FeatureView
    model: ModelSpec
    gates: tuple[Gate, ...]
    release: ReleasePolicy = ReleasePolicy()
    fallback: Fallback | None = None
    retraining: RetrainPolicy | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        def number(role: str, name: str) -> None:
            if self.contract.field(name).type not in NUMBERS:
                raise ValueError(f"use case {self.name!r}: {role} {name!r} must be a number")

        for window in self.view.windows:
            if not (set(window.folds) <= FOLDS_OF_STRINGS and self.contract.field(window.field).type in _COUNTABLE):
                number(f"field of {', '.join(map(str, window.folds))}", window.field)
        for lag in self.view.lags:
            number("lagged field", lag.field)
        for near in self.view.neighbours:
            self._neighbours_fit(near)
        for dimension in self.view.dimensions:
            self._dimension_fits(dimension)
        number("target", self.model.target.field)
        strings, columns = {self.contract.entity}, set(self.view.stored) | set(self.view.calendar_columns)
        for name in self.view.inputs:
            kind = self.contract.field(name).type
            if kind is FieldType.TIMESTAMP:
                raise ValueError(f"use case {self.name!r}: input {name!r} must be a number or a string")
            (columns if kind in NUMBERS else strings).add(name)
        columns |= {derived.name for derived in self.view.derived}
        wanted = {*self.model.numeric, *(gate.baseline for gate in self.gates)}
        wanted |= {name for name in (self.model.anchor, self.model.scale) if name}
        if missing := sorted(wanted - columns):
            raise ValueError(f"use case {self.name!r}: view {self.view.name!r} has no numeric columns {missing}")
        if missing := sorted(set(self.model.categorical) - strings):
            raise ValueError(f"use case {self.name!r}: categorical {missing} are neither the entity nor string inputs")
        drift = self.retraining.drift if self.retraining else None
        if drift and (missing := sorted(set(drift.columns) - {*self.view.stored, *self.model.numeric})):
            raise ValueError(
                f"use case {self.name!r}: drift watches {missing}, which are neither stored features nor numeric "
                "columns of the model, so no answer logs them"
            )
        if not self.model.target.horizon and not self.contract.delay:
            raise ValueError(
                f"use case {self.name!r}: with a horizon of zero the contract needs a delay above zero, "
                "or the event that carries the target would be among its own features"
            )
        if self.contract.entity in self.view.inputs:
            raise ValueError(f"use case {self.name!r}: the entity {self.contract.entity!r} is given anyway")
        if self.model.target.field in self.view.inputs:
            raise ValueError(f"use case {self.name!r}: the target {self.model.target.field!r} cannot be an input")
        if self.fallback is not None:
            self._ladder_fits(self.fallback)
        return self

    def source(self, dimension: Dimension) -> EventSource:
        """The source of a dimension's rows, such as ``aqua.profile``."""
        return EventSource(name=f"{self.name}.{dimension.name}", contract=dimension.contract)

    def _dimension_fits(self, dimension: Dimension) -> None:
        who = f"use case {self.name!r}, dimension {dimension.name!r}"
        if dimension.key != self.contract.entity and dimension.key not in self.view.inputs:
            raise ValueError(f"{who}: its key {dimension.key!r} must be the entity or an input of the view")
        if self.contract.field(dimension.key).type is not FieldType.STRING:
            raise ValueError(f"{who}: its key {dimension.key!r} must be a string")

    def _neighbours_fit(self, near: Neighbours) -> None:
        who = f"use case {self.name!r}, neighbours {near.name!r}"
        if missing := sorted(set(near.asked) - set(self.view.inputs)):
            raise ValueError(f"{who}: {missing} must be inputs of the view, because a request is compared by them")
        for name in (near.longitude, near.latitude, *(name for name, _ in near.similar), *near.fields):
            if self.contract.field(name).type not in NUMBERS:
                raise ValueError(f"{who}: {name!r} must be a number")
        for name, most in ((near.longitude, 180.0), (near.latitude, 85.0)):
            low, high = self.contract.field(name).limits
            if low < -most or high > most:
                raise ValueError(f"{who}: the contract must keep {name!r} between {-most:g} and {most:g} degrees")

    def _ladder_fits(self, fallback: Fallback) -> None:
        field = self.model.target.field
        longest = max((window.length for window in self.view.windows if window.field == field), default=timedelta(0))
        if longest < max(fallback.hold, fallback.silence):
            raise ValueError(
                f"use case {self.name!r}: the age of {field!r} is known from its windows, whose longest is {longest}; "
                f"the fallback's hold {fallback.hold} and silence {fallback.silence} must not exceed that"
            )
        if fallback.hold < self.view.ttl:
            raise ValueError(
                f"use case {self.name!r}: the fallback's hold {fallback.hold} is below the view's ttl {self.view.ttl}, "
                "so it would hold nothing that is not fresh anyway"
            )
