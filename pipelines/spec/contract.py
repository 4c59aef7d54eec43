"""The contract: what one row of a source must be. Engines in ``pipelines.contracts`` enforce it."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from enum import StrEnum
from typing import Literal, Self, get_args

from pydantic import Field as PydanticField
from pydantic import model_validator

from pipelines.spec.base import Spec
from pipelines.spec.expression import Kind, Node, parse
from pipelines.spec.loads import Distribution, LoadRule, Monotone, References, Unique
from pipelines.spec.severity import Severity

_NAME = r"^[a-z][a-z0-9_]*$"


class FieldType(StrEnum):
    """The types a field may have. A timestamp is an instant: it always carries a zone. A decimal is an exact number. A
    list is of values of one other type.
    """

    STRING = "string"
    FLOAT = "float64"
    INTEGER = "int64"
    BOOLEAN = "bool"
    DECIMAL = "decimal"
    TIMESTAMP = "timestamp"
    LIST = "list"


_PLAIN = (FieldType.FLOAT, FieldType.INTEGER)
_ITEMS = (FieldType.STRING, FieldType.FLOAT, FieldType.INTEGER, FieldType.BOOLEAN)
Limit = Literal["minimum", "maximum", "min_length", "max_length", "pattern", "allowed", "min_items", "max_items"]
RowRule = Literal["missing", "type", "finite", "unit", Limit]


class Field(Spec):
    """One column. A null is allowed only where ``nullable``; every other limit ignores nulls.

    A decimal has at most ``precision`` digits, of which ``scale`` are behind the point.
    ``minimum`` and ``maximum`` are inclusive, in ``unit``; so are ``min_length`` and ``max_length``, in code points.
    ``pattern`` must match the whole string; an ``example`` is shown to those who call the API. A list has values of the
    type ``items``, none of them null, at least ``min_items`` and at most ``max_items``; its other limits, and its
    example, are those of every value in it. The limits named by ``warn`` refuse no row,
    and what breaks a rule named by ``refuse`` has its whole load refused; see ``Severity``.
    """

    name: str = PydanticField(pattern=_NAME)
    type: FieldType
    items: FieldType | None = None
    nullable: bool = False
    precision: int | None = PydanticField(default=None, ge=1, le=38)
    scale: int | None = PydanticField(default=None, ge=0, le=38)
    minimum: float | None = None
    maximum: float | None = None
    min_length: int | None = PydanticField(default=None, ge=0)
    max_length: int | None = PydanticField(default=None, ge=0)
    pattern: str | None = None
    allowed: tuple[str, ...] | None = None
    min_items: int | None = PydanticField(default=None, ge=0)
    max_items: int | None = PydanticField(default=None, ge=0)
    example: str | float | None = None
    unit: str | None = None
    description: str = ""
    warn: tuple[Limit, ...] = ()
    refuse: tuple[RowRule, ...] = ()

    @property
    def limits(self) -> tuple[float, float]:
        """``minimum`` and ``maximum``, infinite where there is none or it only warns."""
        low, high = -math.inf, math.inf
        if self.minimum is not None and "minimum" not in self.warn:
            low = self.minimum
        if self.maximum is not None and "maximum" not in self.warn:
            high = self.maximum
        return low, high

    @property
    def item(self) -> Self:
        """What every value of a list is held to, as a field of the list's name."""
        kept = tuple(name for name in self.warn if name not in ("min_items", "max_items"))
        alone = {"type": self.items, "items": None, "nullable": False, "min_items": None, "max_items": None}
        return self.model_copy(update={**alone, "warn": kept, "refuse": ()})

    @model_validator(mode="after")
    def _items_fit(self) -> Self:
        if self.type is not FieldType.LIST:
            if (self.items, self.min_items, self.max_items) != (None, None, None):
                raise ValueError(
                    f"field {self.name!r}: items, min_items and max_items are a list's, not of {self.type}"
                )
        elif self.items not in _ITEMS:
            raise ValueError(f"field {self.name!r}: a list needs items, one of {', '.join(_ITEMS)}")
        if self.min_items is not None and self.max_items is not None and self.min_items > self.max_items:
            raise ValueError(f"field {self.name!r}: min_items {self.min_items} exceeds {self.max_items}")
        return self

    @model_validator(mode="after")
    def _limits_fit_the_type(self) -> Self:
        kind = self.items or self.type
        numeric = kind in (FieldType.FLOAT, FieldType.INTEGER, FieldType.DECIMAL)
        if self.type is FieldType.DECIMAL:
            if self.precision is None or self.scale is None or self.scale > self.precision:
                raise ValueError(f"field {self.name!r}: a decimal needs a precision, and a scale that is not above it")
            if any(limit is not None and not math.isfinite(limit) for limit in (self.minimum, self.maximum)):
                raise ValueError(f"field {self.name!r}: a decimal is finite anyway: leave infinite limits out")
        elif (self.precision, self.scale) != (None, None):
            raise ValueError(f"field {self.name!r}: precision and scale are those of a decimal, not of {self.type}")
        if not numeric and (self.minimum is not None or self.maximum is not None):
            raise ValueError(f"field {self.name!r}: minimum and maximum need a number, not {kind}")
        texts = ("min_length", "max_length", "pattern", "allowed")
        if kind is not FieldType.STRING and any(getattr(self, name) is not None for name in texts):
            raise ValueError(f"field {self.name!r}: {', '.join(texts)} need a string, not {kind}")
        wanted = str if kind is FieldType.STRING else float if kind in _PLAIN else type(None)
        if self.example is not None and not isinstance(self.example, wanted):
            raise ValueError(f"field {self.name!r}: its type, {kind}, has no example such as {self.example!r}")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(f"field {self.name!r}: min_length {self.min_length} exceeds {self.max_length}")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"field {self.name!r}: minimum {self.minimum} exceeds maximum {self.maximum}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"field {self.name!r}: pattern {self.pattern!r} is not valid: {error}") from error
            if isinstance(self.example, str) and re.fullmatch(self.pattern, self.example) is None:
                raise ValueError(f"field {self.name!r}: the example {self.example!r} does not match {self.pattern!r}")
        if any(limit is not None and math.isnan(limit) for limit in (self.minimum, self.maximum)):
            raise ValueError(f"field {self.name!r}: a limit is not a number: leave it out")
        for name in self.refuse:
            if name in get_args(Limit) and getattr(self, name) is None:
                raise ValueError(f"field {self.name!r} refuses loads for {name}, which it does not have")
        for name in self.warn:
            if getattr(self, name) is None:
                raise ValueError(f"field {self.name!r} warns of {name}, which it does not have")
            if name in self.refuse:
                raise ValueError(f"field {self.name!r} both warns of {name} and refuses loads for it: leave one out")
        return self


class Rule(Spec):
    """A condition between the fields of a row (``pipelines.spec.expression``), which must not be false."""

    name: str = PydanticField(pattern=_NAME)
    check: str
    severity: Severity = Severity.REJECT
    description: str = ""


class ServiceLevel(Spec):
    """What the owner promises of the source as a service, such as its ``latency``, ``retention``, ``availability`` or
    ``timeToRepair``: ``value`` in ``unit``, of the field ``element`` where it is of one.

    It is for people, and for tools that read the contract's document; what a load must keep is a rule of loads.
    """

    name: str = PydanticField(pattern=r"^[a-z][A-Za-z]*$")
    value: bool | int | float | str
    unit: str | None = None
    element: str | None = None
    description: str = ""

    @model_validator(mode="after")
    def _value_can_be_written(self) -> Self:
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise ValueError(f"service level {self.name!r} must be a finite number, not {self.value}")
        return self


NUMBERS = (FieldType.FLOAT, FieldType.INTEGER, FieldType.BOOLEAN)
"""What counts as a number."""


_KINDS = {
    FieldType.STRING: Kind.TEXT,
    FieldType.FLOAT: Kind.NUMBER,
    FieldType.INTEGER: Kind.NUMBER,
    FieldType.BOOLEAN: Kind.TRUTH,
    FieldType.DECIMAL: Kind.EXACT,
    FieldType.TIMESTAMP: Kind.INSTANT,
    FieldType.LIST: Kind.LIST,
}


class Contract(Spec):
    """The schema, limits, identity and time semantics of one source.

    ``entity`` and ``time`` name fields. ``key`` names the fields that identify an event: two rows
    with one key are one event told twice. ``delay`` is how long after its event time a bulk-loaded
    row is taken to have become known. A row known later than ``lateness`` after its event time is
    kept in the table and left out of features. A row whose time is more than ``future`` ahead of
    the clock is refused. A load of which more than ``max_rejected_share`` is refused by row or key
    rules is not published at all. ``rules`` hold between the fields of a row,
    ``load_rules`` for a load as a whole. ``sla`` is what the owner promises besides.
    """

    name: str = PydanticField(pattern=_NAME)
    version: str = PydanticField(pattern=r"^[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}$")
    owner: str
    description: str = ""
    fields: tuple[Field, ...]
    entity: str
    time: str
    key: tuple[str, ...]
    delay: timedelta = timedelta(0)
    lateness: timedelta = timedelta(hours=1)
    future: timedelta = timedelta(0)
    max_rejected_share: float = PydanticField(default=0.05, ge=0, le=1)
    rules: tuple[Rule, ...] = ()
    load_rules: tuple[LoadRule, ...] = ()
    sla: tuple[ServiceLevel, ...] = ()

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise ValueError(f"contract {self.name!r} names a field twice: {sorted(names)}")
        for role, name in (("entity", self.entity), ("time", self.time), *(("key", k) for k in self.key)):
            if name not in names:
                raise ValueError(f"contract {self.name!r}: {role} {name!r} is not one of its fields {names}")
            if self.field(name).nullable:
                raise ValueError(f"contract {self.name!r}: {role} field {name!r} must not be nullable")
            if self.field(name).type in (FieldType.DECIMAL, FieldType.LIST):
                kind = self.field(name).type
                raise ValueError(f"contract {self.name!r}: {role} field {name!r} must be no {kind}: write it as text")
        if len(set(self.key)) != len(self.key):
            raise ValueError(f"contract {self.name!r} names a field of its key twice: {list(self.key)}")
        if not self.key:
            raise ValueError(f"contract {self.name!r} needs a key: the fields that identify an event")
        if self.field(self.time).type is not FieldType.TIMESTAMP:
            raise ValueError(f"contract {self.name!r}: time field {self.time!r} must be a timestamp")
        if self.field(self.entity).type is not FieldType.STRING:
            raise ValueError(f"contract {self.name!r}: entity field {self.entity!r} must be a string")
        if min(self.delay, self.lateness, self.future) < timedelta(0):
            raise ValueError(f"contract {self.name!r}: delay, lateness and future must not be negative")
        if self.delay > self.lateness:
            raise ValueError(
                f"contract {self.name!r}: delay {self.delay} exceeds lateness {self.lateness}, "
                "so no bulk-loaded row could ever become a feature"
            )
        return self

    @model_validator(mode="after")
    def _rules_can_be_read(self) -> Self:
        names = [rule.name for rule in self.rules]
        if len(set(names)) != len(names):
            raise ValueError(f"contract {self.name!r} names a rule twice: {sorted(names)}")
        for rule in self.rules:
            try:
                self.condition(rule)
            except ValueError as error:
                raise ValueError(f"contract {self.name!r}, rule {rule.name!r}: {error}") from error
        return self

    @model_validator(mode="after")
    def _service_levels_fit(self) -> Self:
        named = [(level.name, level.element) for level in self.sla]
        if len(set(named)) != len(named):
            raise ValueError(f"contract {self.name!r} has a service level twice: {[level.name for level in self.sla]}")
        for level in self.sla:
            if level.element is not None:
                try:
                    self.field(level.element)
                except KeyError as error:
                    raise ValueError(f"service level {level.name!r}: {error.args[0]}") from error
        return self

    @model_validator(mode="after")
    def _load_rules_fit(self) -> Self:
        ids = [rule.id for rule in self.load_rules]
        if len(set(ids)) != len(ids):
            raise ValueError(f"contract {self.name!r} has a load rule twice: {sorted(ids)}")
        for rule in self.load_rules:
            for name in rule.reads:
                field = next((field for field in self.fields if field.name == name), None)
                if field is None:
                    names = [field.name for field in self.fields]
                    raise ValueError(f"contract {self.name!r}: {rule.kind} names {name!r}; there are {names}")
                numbers = (FieldType.FLOAT, FieldType.INTEGER)
                if isinstance(rule, Distribution | Monotone) and field.type not in numbers:
                    raise ValueError(f"contract {self.name!r}: {rule.kind} needs a number, and {field.name!r} is none")
                if isinstance(rule, Unique | References) and field.type is FieldType.LIST:
                    raise ValueError(
                        f"contract {self.name!r}: {rule.kind} needs single values: {field.name!r} is a list"
                    )
        return self

    def condition(self, rule: Rule) -> Node:
        """What a rule checks, over this contract's fields."""
        return parse(rule.check, {field.name: _KINDS[field.type] for field in self.fields})

    def field(self, name: str) -> Field:
        """The field of that name; ``KeyError`` names the contract and what it has."""
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(f"contract {self.name!r} has no field {name!r}; it has {[f.name for f in self.fields]}")
