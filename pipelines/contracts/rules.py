"""What each row rule means, said once for both engines: its id, its place in the order, bounds, instants.

A broken rule is named ``<field>.<rule>``, one between fields ``rule:<name>``. Limits
ignore nulls and values that already broke ``type`` or ``finite``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, Inexact, InvalidOperation
from typing import Any

from pipelines.contracts.events import to_microseconds
from pipelines.spec import Contract, Field, FieldType, Rule, Severity
from pipelines.spec.base import microseconds

MISSING, TYPE, FINITE, MINIMUM, MAXIMUM = "missing", "type", "finite", "minimum", "maximum"
MIN_LENGTH, MAX_LENGTH, MIN_ITEMS, MAX_ITEMS = "min_length", "max_length", "min_items", "max_items"
PATTERN, ALLOWED, FUTURE, UNIT, UNKNOWN = "pattern", "allowed", "future", "unit", "unknown"
_ORDER = (
    *(MISSING, TYPE, FINITE, MINIMUM, MAXIMUM, MIN_LENGTH, MAX_LENGTH),
    *(PATTERN, ALLOWED, MIN_ITEMS, MAX_ITEMS, FUTURE, UNIT),
)

ROW_UNREADABLE = "row.unreadable"  # not a JSON object, or a CSV line with another number of cells
FILE_UNREADABLE = "file.unreadable"
KEY_DUPLICATE = "key.duplicate"
LOAD_REFUSED = "load.refused"

BETWEEN = "rule:"  # before the name of a rule between fields; no field can be named like that

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

DECIMAL_TEXT = r"-?[0-9]{1,60}(?:\.[0-9]{1,60})?"
_DECIMAL = re.compile(DECIMAL_TEXT)
_EXACT = Context(prec=38, traps=[InvalidOperation, Inexact])
_WIDE = Context(prec=400)

# RFC 3339 with a zone, at most microseconds, of years from 1000 on, in its zone and in UTC, so that what is kept can
# be spelt again (Python and Arrow disagree about year 0).
# Both engines match this text first, in syntax that Python's re and RE2 read alike.
INSTANT_TEXT = (
    r"[1-9][0-9]{3}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])[T ]"
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6}0{0,3})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_INSTANT = re.compile(INSTANT_TEXT)
_EARLIEST = datetime(1000, 1, 1, tzinfo=UTC)
EARLIEST_US = to_microseconds(_EARLIEST)
LATEST_US = to_microseconds(datetime.max.replace(tzinfo=UTC))


def rule_id(field: str, rule: str) -> str:
    """``<field>.<rule>``."""
    return f"{field}.{rule}"


def unknown_id(name: Any) -> str:
    """The rule that a key or column outside the contract breaks; any key becomes valid, bounded UTF-8."""
    text = str(name)
    text = text if len(text) <= 100 else text[:100] + "…"
    return rule_id(text.encode("utf-8", "backslashreplace").decode(), UNKNOWN)


def between(rule: Rule) -> str:
    """The id of a rule between fields."""
    return BETWEEN + rule.name


def severities(contract: Contract) -> dict[str, Severity]:
    """What follows where a rule is broken, of those that do not just refuse the row."""
    found: dict[str, Severity] = {}
    for field in contract.fields:
        found |= dict.fromkeys((rule_id(field.name, kind) for kind in field.warn), Severity.WARN)
        found |= dict.fromkeys((rule_id(field.name, kind) for kind in field.refuse), Severity.REFUSE)
    found |= {between(rule): rule.severity for rule in contract.rules}
    return {rule: severity for rule, severity in found.items() if severity is not Severity.REJECT}


def in_order(contract: Contract, rules: Iterable[str]) -> list[str]:
    """Rule ids in the order of the contract's fields, then of its rules, then unknown names by the alphabet."""
    places = {field.name: place for place, field in enumerate(contract.fields)}
    later = {between(rule): place for place, rule in enumerate(contract.rules)}

    def rank(rule: str) -> tuple[int, int, str]:
        name, _, kind = rule.rpartition(".")
        if rule in later:
            return len(places), later[rule], rule
        if kind == UNKNOWN or name not in places or kind not in _ORDER:
            return len(places) + 1, 0, rule
        return places[name], _ORDER.index(kind), rule

    return sorted(rules, key=rank)


def instant(value: Any) -> datetime | None:
    """The UTC datetime of RFC 3339 text with a zone or of an aware datetime; None for anything else."""
    if isinstance(value, str):
        if _INSTANT.fullmatch(value) is None:
            return None
        try:
            value = datetime.fromisoformat(value)
        except ValueError:  # the thirtieth of February
            return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        return None
    try:
        moment = value.astimezone(UTC)
    except OverflowError:  # its UTC moment lies outside of years 1 to 9999
        return None
    return moment if moment >= _EARLIEST else None


def is_text(value: str) -> bool:
    """Whether a string can be stored as UTF-8: a lone surrogate cannot."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_int64(value: int) -> bool:
    """Whether an integer fits 64 bits."""
    return INT64_MIN <= value <= INT64_MAX


def bounds(field: Field) -> tuple[float | int | None, float | int | None]:
    """Inclusive limits as the field's own type, so that integers are compared exactly."""
    low, high = field.minimum, field.maximum
    if field.type is not FieldType.INTEGER:
        return low, high
    return (
        None if low is None else _clamp(low, math.ceil),
        None if high is None else _clamp(high, math.floor),
    )


def decimal(field: Field, value: Any) -> Decimal | None:
    """The field's decimal of an integer, a decimal, or text such as ``-12.50``; None for what is none, or does not fit.

    It has the field's scale. A float is none: which decimal it stands for is not known.
    """
    if isinstance(value, str):
        if _DECIMAL.fullmatch(value) is None:
            return None
    elif isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    try:
        exact = Decimal(value)
        if not exact.is_finite():
            return None
        found = _EXACT.quantize(exact, Decimal(1).scaleb(-(field.scale or 0)))
        digits = (field.precision or 38) - (field.scale or 0)
        return None if abs(found) >= Decimal(10) ** digits else found if found else abs(found)  # there is one zero
    except (InvalidOperation, Inexact, ValueError):  # other digits than the field has, or too many to be read at all
        return None


def decimal_bounds(field: Field) -> tuple[Decimal | None, Decimal | None]:
    """Inclusive limits as decimals of the field's type, so that they are compared exactly."""
    scale, most = field.scale or 0, 10 ** (field.precision or 38) - 1

    def of(limit: float | None, rounding: str) -> Decimal | None:
        if limit is None:
            return None
        # Beyond its digits every decimal is on one side; one step outside says the same, and is compared as well.
        unscaled = int(Decimal(str(limit)).scaleb(scale, _WIDE).to_integral_value(rounding))
        return Decimal(max(-most - 1, min(most + 1, unscaled))).scaleb(-scale, _WIDE)

    return of(field.minimum, ROUND_CEILING), of(field.maximum, ROUND_FLOOR)


def _clamp(limit: float, rounded: Callable[[float], int]) -> int:
    # Beyond 64 bits every integer is on one side: one step outside the range says the same.
    if limit > INT64_MAX:
        return INT64_MAX + 1
    if limit < INT64_MIN:
        return INT64_MIN - 1
    return rounded(limit)


def latest_us(contract: Contract, now_us: int) -> int:
    """The newest event time that is not in the future, in microseconds since the epoch."""
    return now_us + microseconds(contract.future)


def _shown(value: Any) -> str:
    return format(value, "f") if isinstance(value, Decimal) else str(value)  # str() may give it an exponent


def as_json(record: Any) -> str:
    """A record as ASCII JSON that shows every value, NaN and huge integers included."""
    try:
        return json.dumps(record, default=_shown)
    except (TypeError, ValueError, RecursionError):  # other keys, a cycle, 5,000 digits, a thousand levels
        return json.dumps(f"a {type(record).__name__} that JSON cannot show")
