"""What a load as a whole has to be, beside each of its rows. Only accepted rows count."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec, duration_label
from pipelines.spec.severity import Severity


class _LoadRule(Spec):
    """``severity`` is ``warn`` or ``refuse``: there is no row to reject."""

    severity: Literal[Severity.WARN, Severity.REFUSE] = Severity.REFUSE

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that it names."""
        name = getattr(self, "field", None)
        return getattr(self, "fields", ()) if name is None else (name,)


class Volume(_LoadRule):
    """How many rows a load has: between ``minimum`` and ``maximum``, and between two ``ratio``s of the median of the
    last ``history`` published loads of the source. With fewer than three of these it is not held against any.
    """

    kind: Literal["volume"] = "volume"
    minimum: int | None = PydanticField(default=None, ge=0)
    maximum: int | None = PydanticField(default=None, ge=0)
    history: int | None = PydanticField(default=None, ge=3)
    ratio: tuple[float, float] = (0.5, 2.0)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.minimum, self.maximum, self.history) == (None, None, None):
            raise ValueError("a volume rule needs a minimum, a maximum or a history")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"volume: minimum {self.minimum} exceeds maximum {self.maximum}")
        if not 0 <= self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"volume: ratio {self.ratio} must be two numbers from 0 on, the lower one first")
        return self

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return "load.volume"


class Freshness(_LoadRule):
    """The newest event is at most that old when the load begins."""

    kind: Literal["freshness"] = "freshness"
    max_age: timedelta = PydanticField(gt=timedelta(0))

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return "load.freshness"


class NullShare(_LoadRule):
    """At most that share of a field is null."""

    kind: Literal["null_share"] = "null_share"
    field: str
    maximum: float = PydanticField(ge=0, le=1)

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return f"{self.field}.null_share"


class Distribution(_LoadRule):
    """The mean and the standard deviation of a number lie within bounds, both inclusive; nulls do not count."""

    kind: Literal["distribution"] = "distribution"
    field: str
    mean: tuple[float, float] | None = None
    std: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.mean is None and self.std is None:
            raise ValueError(f"the distribution of {self.field!r} needs bounds of its mean or its standard deviation")
        for name, bounds in (("mean", self.mean), ("std", self.std)):
            if bounds is not None and not bounds[0] <= bounds[1]:
                raise ValueError(f"the distribution of {self.field!r}: {name} {bounds} must have the lower bound first")
        return self

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return f"{self.field}.distribution"


class Monotone(_LoadRule):
    """A number that never falls from one event of an entity to its next, such as a meter's reading."""

    kind: Literal["monotone"] = "monotone"
    field: str

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return f"{self.field}.monotone"


class Silence(_LoadRule):
    """Every entity of a load reports at least that often, from its first event in the load to the load's last one.

    With ``known_for``, entities that reported within that time before the load's first event are expected in it, too:
    from their last event in the table on, and where they do not come at all.
    """

    kind: Literal["silence"] = "silence"
    every: timedelta = PydanticField(gt=timedelta(0))
    known_for: timedelta | None = PydanticField(default=None, gt=timedelta(0), le=timedelta(days=36_500))

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return f"load.silence_{duration_label(self.every)}"


class Unique(_LoadRule):
    """No two rows of a load have the same values in these ``fields``; a row with a null there is like no other."""

    kind: Literal["unique"] = "unique"
    fields: tuple[str, ...] = PydanticField(min_length=1)

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return f"load.unique_{'_'.join(self.fields)}"


class References(_LoadRule):
    """Every value of a ``field`` that is not null is one of a ``column`` of accepted events of another ``source``, such
    as ``aqua.profile``, a dimension, when the load is judged.
    """

    kind: Literal["references"] = "references"
    field: str
    source: str
    column: str

    @property
    def id(self) -> str:
        """The rule's name in reports."""
        return f"{self.field}.references"


LoadRule = Annotated[
    Volume | Freshness | NullShare | Distribution | Monotone | Silence | Unique | References,
    PydanticField(discriminator="kind"),
]
