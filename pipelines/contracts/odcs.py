"""A contract as a document of the Open Data Contract Standard 3.1, and back again.

What the standard has is said in its words: types, nulls, limits, keys, examples, quality rules and service levels. What
it has not is in custom properties, so that a document which this code wrote is read as the contract that it was written
from. A document from elsewhere needs the roles of its columns besides, and is read as far as it can be enforced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from open_data_contract_standard.model import (
    CustomProperty,
    DataQuality,
    Description,
    OpenDataContractStandard,
    SchemaObject,
    SchemaProperty,
    ServiceLevelAgreementProperty,
    Team,
)
from pydantic import TypeAdapter, ValidationError

from pipelines.spec import (
    Contract,
    Field,
    FieldType,
    Freshness,
    LoadRule,
    Rule,
    ServiceLevel,
    Severity,
)

API_VERSION = "v3.1.0"
_ENGINE = "tidegate"
_LOGICAL = {
    FieldType.STRING: "string",
    FieldType.FLOAT: "number",
    FieldType.INTEGER: "integer",
    FieldType.BOOLEAN: "boolean",
    FieldType.DECIMAL: "number",
    FieldType.TIMESTAMP: "timestamp",
    FieldType.LIST: "array",
}
_TYPES = {logical: kind for kind, logical in _LOGICAL.items() if kind is not FieldType.DECIMAL}
_DECIMAL = re.compile(r"(?i:decimal|numeric)\s*\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")
_OPTIONS = {
    "minimum": "minimum",
    "maximum": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "pattern": "pattern",
}
_ITEMS_OPTIONS = {"min_items": "minItems", "max_items": "maxItems"}
_ROLES = ("entity", "time", "delay", "lateness", "future", "max_rejected_share")
_LOAD_RULES: TypeAdapter[LoadRule] = TypeAdapter(LoadRule)


_UNREADABLE = (
    *(ValidationError, yaml.YAMLError, RecursionError),
    *(TypeError, ValueError, KeyError, OverflowError),  # of values that are none of the types that they are said to be
)


class NotReadable(ValueError):
    """The document is none of the standard, or says what cannot be enforced; the message says what, where, and what to
    do.
    """


def to_odcs(contract: Contract) -> str:
    """The contract as YAML."""
    rules = [_of_rule(rule) for rule in contract.rules] + [_of_load(rule) for rule in contract.load_rules]
    document = OpenDataContractStandard(
        apiVersion=API_VERSION,
        kind="DataContract",
        id=f"urn:tidegate:{contract.name}",
        name=contract.name,
        version=contract.version,
        status="active",
        team=Team(name=contract.owner),
        description=Description(purpose=contract.description) if contract.description else None,
        schema=[
            SchemaObject(
                name=contract.name,
                logicalType="object",
                physicalType="table",
                properties=[_of_field(contract, field) for field in contract.fields],
                quality=rules or None,
            )
        ],
        slaProperties=[*_promised(contract), *_enforced(contract)] or None,
        customProperties=[
            CustomProperty(property=_ENGINE, value=contract.model_dump(mode="json", include=set(_ROLES))),
        ],
    )
    text: str = document.to_yaml()
    return text


def _promised(contract: Contract) -> list[ServiceLevelAgreementProperty]:
    return [
        ServiceLevelAgreementProperty(
            property=level.name,
            value=level.value,
            unit=level.unit,
            element=None if level.element is None else f"{contract.name}.{level.element}",
            description=level.description or None,
        )
        for level in contract.sla
    ]


def _enforced(contract: Contract) -> list[ServiceLevelAgreementProperty]:
    """What follows from rules of loads; it is written for others, and not read again."""
    return [
        ServiceLevelAgreementProperty(
            property="freshness",
            value=rule.max_age.total_seconds(),
            unit="s",
            element=f"{contract.name}.{contract.time}",
            driver=_ENGINE,
        )
        for rule in contract.load_rules
        if isinstance(rule, Freshness)
    ]


def from_odcs(text: str) -> Contract:
    """The contract of a YAML document; raises ``NotReadable``."""
    try:
        document = OpenDataContractStandard.from_string(text)
    except _UNREADABLE as error:
        raise NotReadable(f"it is no document of the Open Data Contract Standard: {error}") from error
    try:
        return _read(document)
    except NotReadable:
        raise
    except _UNREADABLE as error:
        raise NotReadable(f"it describes no contract: {error}") from error


def _read(document: OpenDataContractStandard) -> Contract:
    objects = document.schema_ or []
    if len(objects) != 1:
        raise NotReadable(f"it describes {len(objects)} objects, and a contract is of one: make a document of each")
    (table,) = objects
    columns = table.properties or []
    keyed = sorted((c for c in columns if c.primaryKey), key=lambda column: column.primaryKeyPosition or 0)
    roles = _custom(document.customProperties).get(_ENGINE)
    if not isinstance(roles, dict) or not {"entity", "time"} <= roles.keys():
        raise NotReadable(
            f"which column is the entity and which the time is not said: add the custom property {_ENGINE!r} with "
            "the value {entity: COLUMN, time: COLUMN}, and delay, lateness, future where they are not the usual ones"
        )
    rules, load_rules = _rules(table.quality or ())
    team = document.team
    if not isinstance(team, Team) or not team.name:
        raise NotReadable("who owns it is not said: add the name of the team")
    return Contract(
        name=document.name or table.name or "",
        version=document.version or "",
        owner=team.name,
        description=(document.description.purpose if document.description else None) or "",
        fields=tuple(map(_to_field, columns)),
        key=tuple(column.name or "" for column in keyed),
        rules=rules,
        load_rules=load_rules,
        sla=tuple(_to_level(level, table) for level in document.slaProperties or () if level.driver != _ENGINE),
        **roles,
    )


def _to_level(level: ServiceLevelAgreementProperty, table: SchemaObject) -> ServiceLevel:
    kept = ("id", "property", "value", "unit", "element", "description", "driver")
    if other := sorted(level.model_dump(exclude_none=True, exclude=set(kept))):
        raise NotReadable(f"service level {level.property!r} has {other}, which a contract has no place for")
    if level.value is None:
        raise NotReadable(f"service level {level.property!r} has no value")
    return ServiceLevel(
        name=level.property or "",
        value=level.value,
        unit=level.unit,
        element=None if level.element is None else level.element.removeprefix(f"{table.name}."),
        description=level.description or "",
    )


def _of_field(contract: Contract, field: Field) -> SchemaProperty:
    own = field.model_dump(mode="json", include={"unit", "warn", "refuse"}, exclude_defaults=True)
    common: dict[str, Any] = {
        "name": field.name,
        "required": None if field.nullable else True,
        "description": field.description or None,
        "customProperties": [CustomProperty(property=_ENGINE, value=own)] if own else None,
    }
    if field.type is FieldType.LIST:
        options = {theirs: getattr(field, ours) for ours, theirs in _ITEMS_OPTIONS.items()}
        return SchemaProperty(
            **common,
            logicalType=_LOGICAL[field.type],
            physicalType=f"list<{field.items}>",
            logicalTypeOptions={name: value for name, value in options.items() if value is not None} or None,
            items=SchemaProperty(name="item", **_of_values(field.item)),
        )
    return SchemaProperty(
        **common,
        **_of_values(field),
        primaryKey=True if field.name in contract.key else None,
        primaryKeyPosition=contract.key.index(field.name) + 1 if field.name in contract.key else None,
    )


def _of_values(field: Field) -> dict[str, Any]:
    """What is said of single values: those of a field, or those in its lists."""
    options: dict[str, Any] = {theirs: getattr(field, ours) for ours, theirs in _OPTIONS.items()}
    if field.type is FieldType.TIMESTAMP:
        options |= {"timezone": True}
    quality = []
    if field.allowed is not None:
        quality.append(
            _quality(
                type="library",
                metric="invalidValues",
                arguments={"validValues": list(field.allowed)},
                mustBe=0,
                severity="warning" if "allowed" in field.warn else "error",
            )
        )
    return {
        "logicalType": _LOGICAL[field.type],
        "physicalType": f"decimal({field.precision},{field.scale})" if field.precision else field.type.value,
        "logicalTypeOptions": {name: value for name, value in options.items() if value is not None} or None,
        "examples": None if field.example is None else [field.example],
        "quality": quality or None,
    }


def _to_field(column: SchemaProperty) -> Field:
    kind = _TYPES.get(column.logicalType or "")
    if kind is None:
        raise NotReadable(
            f"column {column.name!r} is of logical type {column.logicalType!r}, and a contract has {', '.join(_TYPES)}"
        )
    if kind is FieldType.LIST:
        return _to_list(column)
    return _to_single(column, kind)


def _to_list(column: SchemaProperty) -> Field:
    if column.items is None or column.quality or column.unique:
        raise NotReadable(
            f"column {column.name!r} is an array: it needs items, and quality rules of the whole array, or that it is "
            "unique, are not enforced here"
        )
    options = dict(column.logicalTypeOptions or {})
    lengths = {ours: options.pop(theirs) for ours, theirs in _ITEMS_OPTIONS.items() if theirs in options}
    if options:
        raise NotReadable(f"column {column.name!r} has options that are not enforced here: {sorted(options)}")
    kind = _TYPES.get(column.items.logicalType or "")
    if kind is None:
        raise NotReadable(f"the items of column {column.name!r} are of logical type {column.items.logicalType!r}")
    own = _custom(column.customProperties).get(_ENGINE, {})
    single = _to_single(column.items.model_copy(update={"name": column.name, "required": True}), kind)
    limits = {name: getattr(single, name) for name in (*_OPTIONS, "allowed", "example")}
    return Field(
        name=column.name or "",
        type=FieldType.LIST,
        items=single.type,
        nullable=not column.required,
        description=column.description or "",
        **limits,
        **lengths,
        **{**own, "warn": tuple(dict.fromkeys((*own.get("warn", ()), *single.warn)))},
    )


def _to_single(column: SchemaProperty, kind: FieldType) -> Field:
    digits = _DECIMAL.fullmatch(column.physicalType or "") if kind is FieldType.FLOAT else None
    exact: dict[str, Any] = {}
    if digits is not None:
        kind, exact = FieldType.DECIMAL, {"precision": int(digits[1]), "scale": int(digits[2] or 0)}
    options = column.logicalTypeOptions or {}
    unknown = set(options) - {*_OPTIONS.values(), "timezone"}
    if options.get("timezone") is False or (kind is not FieldType.TIMESTAMP and "timezone" in options):
        unknown.add("timezone")
    if column.unique:
        unknown.add("unique")
    if unknown:
        raise NotReadable(f"column {column.name!r} has options that are not enforced here: {sorted(unknown)}")
    own = _custom(column.customProperties).get(_ENGINE, {})
    limits = {ours: options[theirs] for ours, theirs in _OPTIONS.items() if theirs in options}
    examples = column.examples or []
    return Field(
        name=column.name or "",
        type=kind,
        nullable=not column.required,
        allowed=_allowed(column),
        example=_example(kind, examples),
        description=column.description or "",
        **exact,
        **limits,
        **{**own, "warn": _warned(column, own)},
    )


def _example(kind: FieldType, examples: list[Any]) -> str | float | None:
    """The first one, if a contract's field of that type has any."""
    if not examples or kind not in (FieldType.STRING, FieldType.FLOAT, FieldType.INTEGER):
        return None
    return str(examples[0]) if kind is FieldType.STRING else float(examples[0])


def _allowed(column: SchemaProperty) -> tuple[str, ...] | None:
    found: tuple[str, ...] | None = None
    for quality in column.quality or ():
        given = quality.arguments or {}
        values = given.get("validValues")
        same = quality.metric == "invalidValues" and quality.mustBe == 0 and set(given) == {"validValues"}
        if not same or not isinstance(values, list) or found is not None:
            raise NotReadable(f"column {column.name!r} has a quality rule that is not enforced here: {_said(quality)}")
        found = tuple(values)
    return found


def _warned(column: SchemaProperty, own: Mapping[str, Any]) -> tuple[Any, ...]:
    """What only warns: as it was written here, or by the severity of a rule from elsewhere."""
    given = tuple(own.get("warn", ()))
    soft = any(quality.severity == "warning" for quality in column.quality or ())
    return (*given, "allowed") if soft and "allowed" not in given else given


def _of_rule(rule: Rule) -> DataQuality:
    return _quality(
        type="custom",
        engine=_ENGINE,
        name=rule.name,
        description=rule.description or None,
        severity="warning" if rule.severity is Severity.WARN else "error",
        implementation=rule.model_dump(mode="json", include={"check", "severity"}),
    )


def _of_load(rule: LoadRule) -> DataQuality:
    return _quality(
        type="custom",
        engine=_ENGINE,
        name=rule.id.replace(".", "_"),
        severity="warning" if rule.severity is Severity.WARN else "error",
        implementation=rule.model_dump(mode="json", exclude_none=True),
    )


def _rules(qualities: Iterable[DataQuality]) -> tuple[tuple[Rule, ...], tuple[LoadRule, ...]]:
    rules, load_rules = [], []
    for quality in qualities:
        wanted = quality.implementation
        if quality.type != "custom" or quality.engine != _ENGINE or not isinstance(wanted, dict):
            raise NotReadable(f"a quality rule is not enforced here: {_said(quality)}")
        try:
            if "check" in wanted:
                rules.append(Rule(name=quality.name or "", description=quality.description or "", **wanted))
            else:
                load_rules.append(_LOAD_RULES.validate_python(wanted))
        except (ValidationError, TypeError) as error:
            raise NotReadable(f"quality rule {quality.name!r}: {error}") from error
    return tuple(rules), tuple(load_rules)


def _quality(**given: Any) -> DataQuality:
    return DataQuality(mustBeBetween=None, mustNotBeBetween=None, **given)


def _said(quality: DataQuality) -> str:
    return str(quality.model_dump(exclude_none=True, exclude_defaults=True))


def _custom(properties: Iterable[CustomProperty] | None) -> dict[str, Any]:
    return {one.property: one.value for one in properties or () if one.property is not None}
