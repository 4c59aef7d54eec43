"""A contract that contradicts itself does not load, and says which field is at fault."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.spec import Contract, Field, FieldType
from pipelines.usecases import load, names

WHO = Field(name="who", type=FieldType.STRING)
AT = Field(name="at", type=FieldType.TIMESTAMP)


def _contract(**changes: Any) -> Contract:
    given: dict[str, Any] = {
        "name": "c", "version": "1.0.0", "owner": "o", "fields": (WHO, AT), "entity": "who", "time": "at",
        "key": ("who", "at"),
    }  # fmt: skip
    return Contract(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fields": (WHO, AT, WHO)}, "names a field twice"),
        ({"entity": "nobody"}, "entity 'nobody' is not one of its fields"),
        ({"key": ("who", "when")}, "key 'when' is not one of its fields"),
        ({"key": ()}, "needs a key"),
        ({"time": "who"}, "time field 'who' must be a timestamp"),
        ({"entity": "at"}, "entity field 'at' must be a string"),
        ({"fields": (WHO.model_copy(update={"nullable": True}), AT)}, "must not be nullable"),
        ({"delay": timedelta(hours=2)}, "delay 2:00:00 exceeds lateness 1:00:00"),
        ({"future": timedelta(seconds=-1)}, "must not be negative"),
        ({"version": "1.0"}, "version"),
        ({"max_rejected_share": 1.5}, "max_rejected_share"),
        ({"lateness_": 1}, "lateness_"),
    ],
)
def test_a_contract_that_contradicts_itself_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        _contract(**changes)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"type": FieldType.STRING, "minimum": 0}, "minimum and maximum need a number"),
        ({"type": FieldType.FLOAT, "allowed": ("a",)}, "pattern, allowed need a string"),
        ({"type": FieldType.FLOAT, "example": "one"}, "has no example such as 'one'"),
        ({"type": FieldType.DECIMAL}, "a decimal needs a precision"),
        ({"type": FieldType.DECIMAL, "precision": 2, "scale": 3}, "a scale that is not above it"),
        ({"type": FieldType.DECIMAL, "precision": 2, "scale": 0, "minimum": -math.inf}, "leave infinite limits out"),
        ({"type": FieldType.FLOAT, "precision": 2}, "precision and scale are those of a decimal"),
        ({"type": FieldType.STRING, "min_length": 2, "max_length": 1}, "min_length 2 exceeds 1"),
        ({"type": FieldType.FLOAT, "minimum": 0, "warn": ("maximum",)}, "warns of maximum, which it does not have"),
        ({"type": FieldType.FLOAT, "minimum": 0, "warn": ("minimum",), "refuse": ("minimum",)}, "leave one out"),
        ({"type": FieldType.FLOAT, "minimum": math.nan}, "a limit is not a number"),
        ({"type": FieldType.FLOAT, "refuse": ("maximum",)}, "refuses loads for maximum, which it does not have"),
        ({"type": FieldType.BOOLEAN, "example": "yes"}, "has no example such as 'yes'"),
        ({"type": FieldType.STRING, "pattern": "a+", "example": "b"}, "the example 'b' does not match"),
        ({"type": FieldType.INTEGER, "minimum": 2, "maximum": 1}, "minimum 2.0 exceeds maximum 1.0"),
        ({"type": FieldType.STRING, "pattern": "("}, "unterminated|missing"),
        ({"type": FieldType.STRING, "name": "Upper"}, "name"),
    ],
)
def test_a_field_whose_limits_do_not_fit_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValidationError, re.error), match=reason):
        Field(**{"name": "f", **given})


def test_a_contract_is_frozen_and_finds_its_fields() -> None:
    contract = _contract()
    assert contract.field("at") is AT
    with pytest.raises(KeyError, match=r"has no field 'when'; it has \['who', 'at'\]"):
        contract.field("when")
    with pytest.raises(ValidationError, match="frozen"):
        contract.version = "2.0.0"


def test_the_reference_pages_load() -> None:
    assert {"aqua", "prop"} <= set(names())
    for name in names():
        assert load(name).contract.key
