"""The fallback ladder: how long a last value may stand in for a silent sensor, and what stands in for it then."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, Self

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec, check_zone

SlotPart = Literal["hour", "weekend", "month"]


class Fallback(Spec):
    """What answers are made from when readings of a field stop: last values, then the season's normal, then nothing.

    A STALE window value of at most the age ``hold`` is used as it is, flagged and with a wider interval; an older or
    lost one is replaced by the season's normal. A lag has no such limit: it is as old as its offset by definition.
    An entity whose target field has given nothing for longer than ``silence`` is silent, and an alert says so.

    The season is a slot of the local calendar in ``zone``: hour of day, weekend or not, and month. A normal is the
    median of at least ``rows`` training rows of the entity in the slot; with fewer, the last of ``slots`` is left out
    of the slot, then the one before it, and when only the first is left and still has too few, there is no normal.
    """

    hold: timedelta
    silence: timedelta
    zone: str
    slots: tuple[SlotPart, ...] = ("hour", "month")
    rows: int = PydanticField(default=5, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hold <= timedelta(0) or self.silence <= timedelta(0):
            raise ValueError(f"fallback: hold {self.hold} and silence {self.silence} must be above zero")
        if not self.slots or len(set(self.slots)) != len(self.slots):
            raise ValueError(f"fallback: slots need one part or more, each once; found {self.slots}")
        check_zone(self.zone)
        return self
