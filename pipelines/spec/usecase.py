"""One page of definitions: everything Tidegate needs to know of a use case."""

from __future__ import annotations

from typing import Self

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec
from pipelines.spec.contract import Contract, FieldType
from pipelines.spec.features import FeatureView
from pipelines.spec.model import Gate, ModelSpec

_NUMBERS = (FieldType.FLOAT, FieldType.INTEGER, FieldType.BOOLEAN)


class UseCase(Spec):
    """A contract, a feature view, a model and its gates, checked against each other when the page loads."""

    name: str = PydanticField(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    contract: Contract
    view: FeatureView
    model: ModelSpec
    gates: tuple[Gate, ...]

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        def number(role: str, name: str) -> None:
            if self.contract.field(name).type not in _NUMBERS:
                raise ValueError(f"use case {self.name!r}: {role} {name!r} must be a number")

        for name in (*(window.field for window in self.view.windows), *(lag.field for lag in self.view.lags)):
            number("windowed field", name)
        number("target", self.model.target.field)
        strings, columns = {self.contract.entity}, set(self.view.stored) | set(self.view.calendar_columns)
        for name in self.view.inputs:
            kind = self.contract.field(name).type
            if kind is FieldType.TIMESTAMP:
                raise ValueError(f"use case {self.name!r}: input {name!r} must be a number or a string")
            (columns if kind in _NUMBERS else strings).add(name)
        columns |= {derived.name for derived in self.view.derived}
        wanted = {*self.model.numeric, *(gate.baseline for gate in self.gates)}
        wanted |= {name for name in (self.model.anchor, self.model.scale) if name}
        if missing := sorted(wanted - columns):
            raise ValueError(f"use case {self.name!r}: view {self.view.name!r} has no numeric columns {missing}")
        if missing := sorted(set(self.model.categorical) - strings):
            raise ValueError(f"use case {self.name!r}: categorical {missing} are neither the entity nor string inputs")
        if not self.model.target.horizon and not self.contract.delay:
            raise ValueError(
                f"use case {self.name!r}: with a horizon of zero the contract needs a delay above zero, "
                "or the event that carries the target would be among its own features"
            )
        if self.contract.entity in self.view.inputs:
            raise ValueError(f"use case {self.name!r}: the entity {self.contract.entity!r} is given anyway")
        if self.model.target.field in self.view.inputs:
            raise ValueError(f"use case {self.name!r}: the target {self.model.target.field!r} cannot be an input")
        return self
