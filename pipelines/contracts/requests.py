"""The contract's row rules compiled for one record at a time: pydantic decides, and says which rules broke.

For every record the verdict and the rule ids are those of ``pipelines.contracts.rows``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, NotRequired, cast

from pydantic import (
    AfterValidator,
    ConfigDict,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic import Field as PydanticField
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from pipelines.contracts import expressions, rules
from pipelines.contracts.events import from_microseconds, to_microseconds
from pipelines.spec import Contract, Field, FieldType, Rule, Severity
from pipelines.spec.expression import columns

Limits = list[tuple[str, Callable[[Any], bool]]]
Condition = Callable[[Mapping[str, Any]], bool | None]
_CUSTOM = "contract_rules"
_KINDS = {
    "missing": rules.MISSING,
    "float_type": rules.TYPE,
    "int_type": rules.TYPE,
    "bool_type": rules.TYPE,
    "string_type": rules.TYPE,
    "finite_number": rules.FINITE,
    "greater_than_equal": rules.MINIMUM,
    "less_than_equal": rules.MAXIMUM,
}


@dataclass(frozen=True)
class Problem:
    """One broken rule of one record: the field (or unknown key), the rule id, and what to change."""

    field: str
    rule: str
    message: str


@dataclass(frozen=True)
class RecordModel:
    """The compiled rules of some fields of a contract; ``adapter`` yields the typed record.

    ``between`` are the rules between these fields, and ``advisory`` the limits that only warn, by field.
    """

    name: str
    contract: Contract
    fields: tuple[Field, ...]
    adapter: TypeAdapter[Any]
    between: tuple[tuple[Rule, Condition], ...]
    advisory: tuple[tuple[Field, Limits], ...]

    def json_schema(self) -> dict[str, Any]:
        """The JSON Schema of one record, for the API's description."""
        return {**self.adapter.json_schema(), "title": self.name}

    def example(self) -> dict[str, Any] | None:
        """A record that keeps the rules, as JSON values; None when a pattern of the contract has no example.

        Its time is long past, so that a caller who sends it changes no feature.
        """
        record = {field.name: _example(field) for field in self.fields}
        return record if check_record(self, record, rules.LATEST_US)[0] is not None else None


def compile_model(contract: Contract, fields: Sequence[str] | None = None, name: str | None = None) -> RecordModel:
    """Compiles the rules of ``fields`` (all of them by default); any other key is then unknown. Rules between fields
    are those of which all fields are there.

    Raises ``KeyError`` for a name that the contract does not have.
    """
    chosen = contract.fields if fields is None else tuple(contract.field(f) for f in fields)
    title = name or contract.name
    make: Any = TypedDict  # the type is known only now, which no checker can follow
    typed = make(title, {f.name: _annotation(f) for f in chosen})
    typed.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    names = {field.name for field in chosen}
    conditions = [(rule, contract.condition(rule)) for rule in contract.rules]
    return RecordModel(
        name=title,
        contract=contract,
        fields=chosen,
        adapter=TypeAdapter(typed),
        between=tuple((rule, expressions.holds(node)) for rule, node in conditions if columns(node) <= names),
        advisory=tuple(
            (field, [(kind, breaks) for kind, breaks in _limits(field) if kind in field.warn])
            for field in chosen
            if field.warn
        ),
    )


def check_record(
    model: RecordModel, record: Any, now_us: int
) -> tuple[dict[str, Any], list[Problem]] | tuple[None, list[Problem]]:
    """The typed record and the rules it breaks that only warn, or None and every other rule it breaks, in contract
    order.

    Floats, integers, strings and booleans come as Python's, timestamps as UTC datetimes, an absent nullable
    field as None. The contract's time field may not be later than ``now_us`` plus ``contract.future``.
    """
    try:
        typed = model.adapter.validator.validate_python(record)
    except ValidationError as error:
        return None, _problems(model, record, now_us, error)
    time = typed.get(model.contract.time)
    late = None if time is None else _future(model, time, now_us)
    if len(typed) < len(model.fields):
        typed = {f.name: typed.get(f.name) for f in model.fields}
    broken = _between(model, typed) if model.between else []
    hard = [_broken_between(rule) for rule in broken if rule.severity is not Severity.WARN]
    if late or hard:
        return None, [late, *hard] if late else hard
    warnings: list[Problem] = []
    for field, limits in model.advisory:
        if (value := typed[field.name]) is not None:
            warnings += [_problem(field, kind, value) for kind, breaks in limits if breaks(value)]
    warnings += map(_broken_between, broken)
    return typed, warnings


def _example(field: Field) -> Any:
    if field.type is FieldType.STRING:
        return field.example or (field.allowed[0] if field.allowed else None if field.pattern else field.name)
    if field.type is FieldType.TIMESTAMP:
        return "2000-01-01T00:00:00Z"
    if field.type is FieldType.BOOLEAN:
        return False
    if field.type is FieldType.DECIMAL:
        smallest, largest = rules.decimal_bounds(field)
        zero = Decimal(0)
        return format(max(smallest, zero) if smallest is not None else min(largest or zero, zero), "f")
    if field.type is FieldType.LIST:
        few = 1 if field.max_items is None else min(1, field.max_items)
        return [_example(field.item)] * max(few, field.min_items or 0)
    if field.example is not None:
        return int(field.example) if field.type is FieldType.INTEGER else field.example
    low, high = rules.bounds(field)
    number = max(1 if high is None else min(1, high), 1 if low is None else low)
    return number if field.type is FieldType.INTEGER else float(number)


def _annotation(field: Field) -> Any:
    field = field.model_copy(update={**dict.fromkeys(field.warn), "warn": ()})  # what only warns refuses nothing
    low, high = rules.bounds(field)
    kind: Any
    if field.type is FieldType.FLOAT:
        kind = Annotated[StrictFloat, PydanticField(ge=low, le=high, allow_inf_nan=False)]
    elif field.type is FieldType.INTEGER:
        low = rules.INT64_MIN if low is None else max(low, rules.INT64_MIN)
        high = rules.INT64_MAX if high is None else min(high, rules.INT64_MAX)
        kind = Annotated[StrictInt, PydanticField(ge=low, le=high)]
    elif field.type is FieldType.BOOLEAN:
        kind = StrictBool
    elif field.type is FieldType.DECIMAL:
        spelt = {"anyOf": [{"type": "string", "pattern": f"^{rules.DECIMAL_TEXT}$"}, {"type": "integer"}]}
        kind = Annotated[Any, PlainValidator(_decimal(field)), WithJsonSchema(spelt)]
    elif field.type is FieldType.LIST:
        make: Any = list  # the type is known only now, which no checker can follow
        many: TypeAdapter[list[Any]] = TypeAdapter(make[_annotation(field.item)], config=ConfigDict(strict=True))
        extra = {"minItems": field.min_items, "maxItems": field.max_items}
        shown = {**many.json_schema(), **{key: value for key, value in extra.items() if value is not None}}
        kind = Annotated[Any, PlainValidator(_list(field, many)), WithJsonSchema(shown)]
    elif field.type is FieldType.TIMESTAMP:
        kind = Annotated[datetime, PlainValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})]
    else:
        texts = {
            "minLength": field.min_length,
            "maxLength": field.max_length,
            "pattern": None if field.pattern is None else f"^(?:{field.pattern})$",
            "enum": list(field.allowed) if field.allowed is not None else None,
        }
        shown = {key: value for key, value in texts.items() if value is not None}
        kind = Annotated[str, AfterValidator(_string_rules(field)), PydanticField(json_schema_extra=cast(Any, shown))]
    text = "; ".join(part for part in (field.description, f"in {field.unit}" if field.unit else "") if part)
    kind = Annotated[kind | None if field.nullable else kind, PydanticField(description=text or None)]
    return NotRequired[kind] if field.nullable else kind


def _instant(value: Any) -> datetime:
    moment = rules.instant(value)
    if moment is None:
        raise _broken(rules.TYPE)
    return moment


def _decimal(field: Field) -> Callable[[Any], Decimal]:
    limits = _limits(field)

    def read(value: Any) -> Decimal:
        found = rules.decimal(field, value)
        if found is None:
            raise _broken(rules.TYPE)
        broken = [kind for kind, breaks in limits if breaks(found)]
        if broken:
            raise _broken(*broken)
        return found

    return read


def _list(field: Field, many: TypeAdapter[list[Any]]) -> Callable[[Any], list[Any]]:
    item, limits = field.item, _items_limits(field)

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _broken(rules.TYPE)
        found, broken = value, {kind for kind, breaks in limits if breaks(value)}
        try:
            found = many.validator.validate_python(value)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=True)
            broken.update(itertools.chain.from_iterable(_kinds(item, detail) for detail in details))
        if broken & {rules.TYPE, rules.MISSING}:  # then it is no list of that type, and breaks nothing else
            raise _broken(rules.TYPE)
        if broken:
            raise _broken(*broken)
        return found

    return read


def _string_rules(field: Field) -> Callable[[str], str]:
    limits = _limits(field)

    def check(value: str) -> str:
        if not rules.is_text(value):
            raise _broken(rules.TYPE)
        broken = [kind for kind, breaks in limits if breaks(value)]
        if broken:
            raise _broken(*broken)
        return value

    return check


def _limits(field: Field) -> Limits:
    """What tells, by rule, whether a typed value breaks a limit; a list breaks those that any value in it breaks."""
    if field.type is FieldType.LIST:
        return [(kind, _any(breaks)) for kind, breaks in _limits(field.item)] + _items_limits(field)
    low, high = rules.decimal_bounds(field) if field.type is FieldType.DECIMAL else rules.bounds(field)
    shortest, longest, allowed = field.min_length or 0, field.max_length or 0, frozenset(field.allowed or ())
    matches = re.compile(field.pattern or "").fullmatch
    limits: tuple[tuple[str, Any, Callable[[Any], bool]], ...] = (
        (rules.MINIMUM, low, lambda value: value < low),
        (rules.MAXIMUM, high, lambda value: value > high),
        (rules.MIN_LENGTH, field.min_length, lambda value: len(value) < shortest),
        (rules.MAX_LENGTH, field.max_length, lambda value: len(value) > longest),
        (rules.PATTERN, field.pattern, lambda value: matches(value) is None),
        (rules.ALLOWED, field.allowed, lambda value: value not in allowed),
    )
    return [(kind, breaks) for kind, limit, breaks in limits if limit is not None]


def _any(breaks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: any(map(breaks, values))


def _items_limits(field: Field) -> Limits:
    fewest, most = field.min_items or 0, field.max_items or 0
    limits: tuple[tuple[str, Any, Callable[[Any], bool]], ...] = (
        (rules.MIN_ITEMS, field.min_items, lambda values: len(values) < fewest),
        (rules.MAX_ITEMS, field.max_items, lambda values: len(values) > most),
    )
    return [(kind, breaks) for kind, limit, breaks in limits if limit is not None]


def _between(model: RecordModel, typed: Mapping[str, Any]) -> list[Rule]:
    return [rule for rule, holds in model.between if holds(typed) is False]


def _broken_between(rule: Rule) -> Problem:
    said = f": {rule.description}" if rule.description else ""
    return Problem("", rules.between(rule), f"{rule.check} does not hold{said}")


def _broken(*kinds: str) -> PydanticCustomError:
    return PydanticCustomError(_CUSTOM, "breaks the contract", {"kinds": kinds})


def _problems(model: RecordModel, record: Any, now_us: int, error: ValidationError) -> list[Problem]:
    if not isinstance(record, dict):
        return [Problem("", rules.ROW_UNREADABLE, f"a record must be a JSON object, not {_shown(record)}")]
    known = {f.name: f for f in model.fields}
    unknown = {
        rule: Problem(rule.removesuffix(f".{rules.UNKNOWN}"), rule, f"there is no such field; there are {[*known]}")
        for rule in {rules.unknown_id(key) for key in record if key not in known}
    }
    problems = dict(unknown)
    if unknown:  # pydantic may give up at a key that is no text, so the known fields are judged by themselves
        try:
            model.adapter.validator.validate_python({key: record[key] for key in record if key in known})
        except ValidationError as narrowed:
            error = narrowed
        else:
            error = ValidationError.from_exception_data(model.name, [])
    for detail in error.errors(include_url=False, include_context=True):
        field = known[str(detail["loc"][0])]
        for kind in _kinds(field, detail):
            rule = rules.rule_id(field.name, kind)
            problems[rule] = _problem(field, kind, record.get(field.name))
    if model.contract.time in known:
        time = rules.instant(record.get(model.contract.time))
        if time is not None and (late := _future(model, time, now_us)):
            problems[late.rule] = late
    if model.between:
        values = {name: _typed(field, record.get(name), problems) for name, field in known.items()}
        for broken in _between(model, values):
            if broken.severity is not Severity.WARN:
                problems[rules.between(broken)] = _broken_between(broken)
    return [problems[rule] for rule in rules.in_order(model.contract, problems)]


def _typed(field: Field, value: Any, problems: Mapping[str, Problem]) -> Any:
    """A value as rules between fields see it: what is of another type is there as little as a null."""
    if value is None or rules.rule_id(field.name, rules.TYPE) in problems:
        return None
    return rules.instant(value) if field.type is FieldType.TIMESTAMP else value


def _problem(field: Field, kind: str, value: Any) -> Problem:
    return Problem(field.name, rules.rule_id(field.name, kind), _message(field, kind, value))


def _kinds(field: Field, detail: Any) -> tuple[str, ...]:
    value, kind = detail["input"], detail["type"]
    if value is None:
        return (rules.MISSING,)
    if kind == _CUSTOM:
        kinds: tuple[str, ...] = detail["ctx"]["kinds"]
        return kinds
    if field.type is FieldType.INTEGER and "than_equal" in kind and not rules.is_int64(value):
        return (rules.TYPE,)
    return (_KINDS[kind],)


def _future(model: RecordModel, time: datetime, now_us: int) -> Problem | None:
    latest = rules.latest_us(model.contract, now_us)
    if to_microseconds(time) <= latest:
        return None
    name = model.contract.time
    limit = from_microseconds(latest).isoformat()
    return Problem(name, rules.rule_id(name, rules.FUTURE), f"{name} {time.isoformat()} lies after {limit}")


def _message(field: Field, kind: str, value: Any) -> str:
    unit = f" {field.unit}" if field.unit else ""
    wants = {
        rules.MISSING: "must be given and not null",
        rules.TYPE: f"must be {_wanted(field)}",
        rules.FINITE: "must be a finite number",
        rules.MINIMUM: f"must be at least {field.minimum}{unit}",
        rules.MAXIMUM: f"must be at most {field.maximum}{unit}",
        rules.MIN_LENGTH: f"must have at least {field.min_length} characters",
        rules.MAX_LENGTH: f"must have at most {field.max_length} characters",
        rules.PATTERN: f"must match {field.pattern!r} as a whole",
        rules.ALLOWED: f"must be one of {list(field.allowed or ())}",
        rules.MIN_ITEMS: f"must have at least {field.min_items} values",
        rules.MAX_ITEMS: f"must have at most {field.max_items} values",
    }
    whole = field.type is not FieldType.LIST or kind in (rules.MISSING, rules.TYPE, rules.MIN_ITEMS, rules.MAX_ITEMS)
    what = field.name if whole else f"every value of {field.name}"
    return f"{what} {wants[kind]}" + ("" if kind == rules.MISSING else f", got {_shown(value)}")


def _wanted(field: Field) -> str:
    if field.items is not None:
        return f"a list, and every value of it {_WANTED[field.items]}"
    return _WANTED[field.type]


_WANTED = {
    FieldType.STRING: "a string of valid text",
    FieldType.FLOAT: "a number",
    FieldType.INTEGER: "a whole number of 64 bits",
    FieldType.BOOLEAN: "true or false",
    FieldType.DECIMAL: "a decimal as text, with no more digits than the field has, such as -12.50",
    FieldType.TIMESTAMP: "an RFC 3339 instant with a zone, to the microsecond, such as 2026-01-31T06:00:00Z",
}


def _shown(value: Any) -> str:
    text = rules.as_json(value)
    return text if len(text) <= 60 else text[:57] + "..."
