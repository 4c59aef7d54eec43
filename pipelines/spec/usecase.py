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
    """A contract, a feature view, a model and its gates, checked against each other when the page loads.

    Everything that trains uses ``view``. When you edit it, leave the old one in ``kept`` until no champion, previous or
    challenger uses it: the state of every view of the page is kept up to the log, so a version answers from the view
    that it was trained on. The model's columns are of ``view``; a version of a kept view names its own.
    """

    name: str = PydanticField(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    view: FeatureView
    kept: tuple[FeatureView, ...] = ()
    model: ModelSpec
    gates: tuple[Gate, ...]
    release: ReleasePolicy = ReleasePolicy()
    fallback: Fallback | None = None
    retraining: RetrainPolicy | None = None

    def under(self, view: FeatureView) -> UseCase:
        """The page with ``view`` in the place of its present one, to be read by what computes a view's features."""
        return self.model_copy(update={"view": view, "kept": ()})

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for view in (self.view, *self.kept):
            self._view_fits(view)
        for view in self.kept:
            self._inputs_agree(view)
            self._dimensions_agree(view)
        self._number("target", self.model.target.field)
        strings, columns = {self.contract.entity}, set(self.view.stored) | set(self.view.calendar_columns)
        for name in self.view.inputs:
            (columns if self.contract.field(name).type in NUMBERS else strings).add(name)
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
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a request brings beside its entity: the inputs of every view."""
        return tuple(dict.fromkeys(name for view in (self.view, *self.kept) for name in view.inputs))

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Those of every view, each once."""
        return tuple({part.name: part for view in (self.view, *self.kept) for part in view.dimensions}.values())

    def source(self, dimension: Dimension) -> EventSource:
        """The source of a dimension's rows, such as ``aqua.profile``."""
        return EventSource(name=f"{self.name}.{dimension.name}", contract=dimension.contract)

    def _number(self, role: str, name: str) -> None:
        if self.contract.field(name).type not in NUMBERS:
            raise ValueError(f"use case {self.name!r}: {role} {name!r} must be a number")

    def _view_fits(self, view: FeatureView) -> None:
        for window in view.windows:
            if not (set(window.folds) <= FOLDS_OF_STRINGS and self.contract.field(window.field).type in _COUNTABLE):
                self._number(f"field of {', '.join(map(str, window.folds))}", window.field)
        for lag in view.lags:
            self._number("lagged field", lag.field)
        for near in view.neighbours:
            self._neighbours_fit(near, view)
        for dimension in view.dimensions:
            self._dimension_fits(dimension, view)
        for name in view.inputs:
            if self.contract.field(name).type not in _COUNTABLE:
                raise ValueError(f"use case {self.name!r}: input {name!r} must be a number or a string")
        if self.contract.entity in view.inputs:
            raise ValueError(f"use case {self.name!r}: the entity {self.contract.entity!r} is given anyway")
        if self.model.target.field in view.inputs:
            raise ValueError(f"use case {self.name!r}: the target {self.model.target.field!r} cannot be an input")
        if self.fallback is not None:
            self._ladder_fits(self.fallback, view)

    def _inputs_agree(self, kept: FeatureView) -> None:
        """One request is answered by versions of either view, so a caller must be able to serve both."""
        apart = sorted(n for n in {*kept.inputs} ^ {*self.view.inputs} if not self.contract.field(n).nullable)
        if apart:
            raise ValueError(
                f"use case {self.name!r}: a request is answered from the present view or from the kept one "
                f"{kept.name!r}, so it must bring the same inputs; {apart} belong to one of them only and are not "
                "nullable in the contract: make them so, or release the view without a kept one"
            )

    def _dimensions_agree(self, kept: FeatureView) -> None:
        """A dimension of either view is one source, with one log and one table."""
        contracts = {dimension.name: dimension.contract for dimension in self.view.dimensions}
        apart = [d.name for d in kept.dimensions if contracts.get(d.name, d.contract) != d.contract]
        if apart:
            raise ValueError(
                f"use case {self.name!r}: dimensions {apart} have one contract in the present view and another in the "
                f"kept one {kept.name!r}: give them the same, or another name"
            )

    def _dimension_fits(self, dimension: Dimension, view: FeatureView) -> None:
        who = f"use case {self.name!r}, dimension {dimension.name!r}"
        if dimension.key != self.contract.entity and dimension.key not in view.inputs:
            raise ValueError(f"{who}: its key {dimension.key!r} must be the entity or an input of the view")
        if self.contract.field(dimension.key).type is not FieldType.STRING:
            raise ValueError(f"{who}: its key {dimension.key!r} must be a string")

    def _neighbours_fit(self, near: Neighbours, view: FeatureView) -> None:
        who = f"use case {self.name!r}, neighbours {near.name!r}"
        if missing := sorted(set(near.asked) - set(view.inputs)):
            raise ValueError(f"{who}: {missing} must be inputs of the view, because a request is compared by them")
        for name in (near.longitude, near.latitude, *(name for name, _ in near.similar), *near.fields):
            if self.contract.field(name).type not in NUMBERS:
                raise ValueError(f"{who}: {name!r} must be a number")
        for name, most in ((near.longitude, 180.0), (near.latitude, 85.0)):
            low, high = self.contract.field(name).limits
            if low < -most or high > most:
                raise ValueError(f"{who}: the contract must keep {name!r} between {-most:g} and {most:g} degrees")

    def _ladder_fits(self, fallback: Fallback, view: FeatureView) -> None:
        field = self.model.target.field
        longest = max((window.length for window in view.windows if window.field == field), default=timedelta(0))
        if longest < max(fallback.hold, fallback.silence):
            raise ValueError(
                f"use case {self.name!r}: the age of {field!r} is known from the windows of view {view.name!r}, whose "
                f"longest is {longest}; the fallback's hold {fallback.hold} and silence {fallback.silence} must not "
                "exceed that"
            )
        if fallback.hold < view.ttl:
            raise ValueError(
                f"use case {self.name!r}: the fallback's hold {fallback.hold} is below the view's ttl {view.ttl} "
                f"({view.name!r}), so it would hold nothing that is not fresh anyway"
            )
