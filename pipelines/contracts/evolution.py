"""What changes between two versions of a contract, and whom each change breaks.

A *writer* produces rows: a change breaks writers when rows that the old contract took are refused by the new one, or
lost to features. A *reader* uses rows: a change breaks readers when rows that the new contract takes may be such as the
old one promised they would not be. Both are told apart, because a contract is changed on one side at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pipelines.spec import Contract, Field, FieldType, ServiceLevel, Severity
from pipelines.spec.expression import columns


class Breaks(StrEnum):
    """Whom a change breaks."""

    NOBODY = "nobody"
    READERS = "readers"
    WRITERS = "writers"
    BOTH = "both"


_N, _R, _W, _B = Breaks.NOBODY, Breaks.READERS, Breaks.WRITERS, Breaks.BOTH

KINDS: dict[str, tuple[Breaks, str]] = {
    "field_added": (_N, "a field that may be null: rows without it are taken"),
    "required_field_added": (_W, "rows without it are refused"),
    "field_removed": (_B, "readers miss it, and rows that still bring it are refused"),
    "fields_reordered": (_N, "columns are found by their names, in files and in the log"),
    "type_widened": (_R, "numbers may have a fraction now"),
    "type_narrowed": (_W, "numbers with a fraction are refused"),
    "type_changed": (_B, "old rows are refused, and new ones are of another type"),
    "precision_raised": (_R, "numbers with more digits come now"),
    "precision_lowered": (_W, "numbers with more digits are refused"),
    "scale_changed": (_B, "numbers have other digits behind the point, and fewer or more before it"),
    "null_allowed": (_R, "values may be missing now"),
    "null_forbidden": (_W, "rows without a value are refused"),
    "minimum_added": (_W, "smaller values are refused"),
    "minimum_raised": (_W, "values between the two are refused"),
    "minimum_lowered": (_R, "values between the two come now"),
    "minimum_removed": (_R, "values of any size below come now"),
    "maximum_added": (_W, "larger values are refused"),
    "maximum_lowered": (_W, "values between the two are refused"),
    "maximum_raised": (_R, "values between the two come now"),
    "maximum_removed": (_R, "values of any size above come now"),
    "min_length_added": (_W, "shorter text is refused"),
    "min_length_raised": (_W, "text of a length between the two is refused"),
    "min_length_lowered": (_R, "text of a length between the two comes now"),
    "min_length_removed": (_R, "text of any shorter length comes now"),
    "max_length_added": (_W, "longer text is refused"),
    "max_length_lowered": (_W, "text of a length between the two is refused"),
    "max_length_raised": (_R, "text of a length between the two comes now"),
    "max_length_removed": (_R, "text of any longer length comes now"),
    "items_changed": (_B, "old lists are refused, and new ones are of other values"),
    "min_items_added": (_W, "shorter lists are refused"),
    "min_items_raised": (_W, "lists of a length between the two are refused"),
    "min_items_lowered": (_R, "lists of a length between the two come now"),
    "min_items_removed": (_R, "lists of any shorter length come now"),
    "max_items_added": (_W, "longer lists are refused"),
    "max_items_lowered": (_W, "lists of a length between the two are refused"),
    "max_items_raised": (_R, "lists of a length between the two come now"),
    "max_items_removed": (_R, "lists of any longer length come now"),
    "pattern_added": (_W, "text of another form is refused"),
    "pattern_removed": (_R, "text of any form comes now"),
    "pattern_changed": (_B, "text of the old form may be refused, and other text may come"),
    "allowed_introduced": (_W, "other values are refused"),
    "allowed_dropped": (_R, "any value comes now"),
    "value_added": (_R, "a value that no reader knows comes now"),
    "value_withdrawn": (_W, "rows with that value are refused"),
    "unit_changed": (_B, "the same number means another quantity"),
    "example_changed": (_N, "it is shown to callers and checked by nobody"),
    "field_description_changed": (_N, "words"),
    "entity_changed": (_B, "rows belong to other entities, so every feature is another one"),
    "time_changed": (_B, "rows happen at other times, so every feature is another one"),
    "key_changed": (_B, "other rows are duplicates of each other"),
    "delay_changed": (_R, "loaded rows become known at another time, so training sees others"),
    "lateness_raised": (_R, "rows that came too late for features count now, so features are other ones"),
    "lateness_lowered": (_W, "rows that came late and counted are left out of features"),
    "future_raised": (_R, "rows may lie further ahead of the clock"),
    "future_lowered": (_W, "rows that lie further ahead are refused"),
    "rejected_share_raised": (_R, "loads with more refused rows are published"),
    "rejected_share_lowered": (_W, "loads that were published are refused"),
    "limit_softened": (_R, "rows that break it come now, with a warning"),
    "limit_hardened": (_W, "rows that break it are refused, of which was only warned"),
    "load_refused_for_it": (_W, "a load with a row that breaks it is refused as a whole"),
    "load_taken_despite_it": (_R, "a load with rows that break it is published without them"),
    "rule_added": (_W, "rows for which it does not hold are refused"),
    "warning_added": (_N, "rows for which it does not hold are counted, and taken"),
    "rule_removed": (_R, "rows for which it did not hold come now"),
    "warning_removed": (_N, "rows for which it did not hold are no longer counted"),
    "rule_changed": (_B, "other rows may be refused, and other ones may come"),
    "warning_changed": (_N, "other rows are counted"),
    "rule_softened": (_R, "rows for which it does not hold come now, with a warning"),
    "rule_hardened": (_W, "rows for which it does not hold are refused, of which was only warned"),
    "rule_description_changed": (_N, "words"),
    "load_rule_added": (_W, "loads that break it are refused"),
    "load_warning_added": (_N, "loads that break it are published, with a warning"),
    "load_rule_removed": (_R, "loads that break it are published now"),
    "load_warning_removed": (_N, "loads that break it are published as before"),
    "load_rule_changed": (_B, "other loads may be refused, and other ones may come"),
    "load_warning_changed": (_N, "other loads come with a warning"),
    "load_rule_softened": (_R, "loads that break it are published now, with a warning"),
    "load_rule_hardened": (_W, "loads that break it are refused, which were published with a warning"),
    "service_level_added": (_N, "more is promised"),
    "service_level_removed": (_R, "it is promised no more"),
    "service_level_changed": (_R, "something else is promised"),
    "owner_changed": (_N, "words"),
    "description_changed": (_N, "words"),
    "contract_renamed": (_B, "it is another contract to everything that goes by its name"),
}
"""Every kind of change: whom it breaks, and how."""
_WORDS = frozenset(
    {
        "example_changed",
        "field_description_changed",
        "owner_changed",
        "description_changed",
        "rule_description_changed",
    }
)


@dataclass(frozen=True)
class Change:
    """One change. ``field`` is None where it is one of the contract as a whole, and a rule's name where it is one of
    that, which ``reads`` some fields.
    """

    kind: str
    field: str | None
    before: Any
    after: Any
    reads: frozenset[str] = frozenset()

    @property
    def breaks(self) -> Breaks:
        """Whom it breaks."""
        return KINDS[self.kind][0]

    @property
    def breaking(self) -> bool:
        """Whether it breaks anybody."""
        return self.breaks is not Breaks.NOBODY

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        values = "" if self.before is None and self.after is None else f" ({self.before} → {self.after})"
        whom = "compatible" if not self.breaking else f"breaks {self.breaks.replace('both', 'readers and writers')}"
        return f"{where}{self.kind.replace('_', ' ')}{values}: {whom}; {KINDS[self.kind][1]}"


def diff(old: Contract, new: Contract) -> tuple[Change, ...]:
    """Every change from ``old`` to ``new``, those of the whole contract first, then by field in the new order."""
    before, after = ({field.name: field for field in contract.fields} for contract in (old, new))
    found = list(_of_contract(old, new))
    for name, field in after.items():
        if name in before:
            found += _of_field(before[name], field, identifies=name in old.key)
        else:
            found.append(Change("field_added" if field.nullable else "required_field_added", name, None, field.type))
    found += _of_rules(old, new)
    found += _of_sla(old, new)
    found += [Change("field_removed", name, before[name].type, None) for name in before if name not in after]
    kept = [name for name in before if name in after]
    if list(after)[: len(kept)] != kept:  # one that is added comes after those there are, or these change their places
        found.append(Change("fields_reordered", None, None, None))
    return tuple(found)


def required_version(old: str, changes: tuple[Change, ...]) -> str:
    """The lowest semantic version that a contract of version ``old`` must have after ``changes``.

    Breaking ones need a major version, others a minor one, and words alone a patch.
    """
    major, minor, patch = map(int, old.split("."))
    if any(change.breaking for change in changes):
        return f"{major + 1}.0.0"
    if any(change.kind not in _WORDS for change in changes):
        return f"{major}.{minor + 1}.0"
    return f"{major}.{minor}.{patch + 1}" if changes else old


def enough(version: str, required: str) -> bool:
    """Whether a version is at least the required one."""
    return tuple(map(int, version.split("."))) >= tuple(map(int, required.split(".")))


def _of_contract(old: Contract, new: Contract) -> Iterator[Change]:
    for kind, name in (
        ("contract_renamed", "name"),
        ("owner_changed", "owner"),
        ("description_changed", "description"),
        ("entity_changed", "entity"),
        ("time_changed", "time"),
        ("delay_changed", "delay"),
    ):
        yield from _changed(kind, None, getattr(old, name), getattr(new, name))
    if old.key != new.key:  # in another order, too, they make another event id
        yield Change("key_changed", None, ", ".join(old.key), ", ".join(new.key))
    for stem, name in (("lateness", "lateness"), ("future", "future"), ("rejected_share", "max_rejected_share")):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield Change(f"{stem}_{'raised' if after > before else 'lowered'}", None, before, after)


def _of_field(old: Field, new: Field, *, identifies: bool) -> Iterator[Change]:
    """``identifies`` says that event ids are made of it: then a number of another type is another id."""
    name = old.name
    if old.type is not new.type:
        kinds = {
            (FieldType.INTEGER, FieldType.FLOAT): "type_widened",
            (FieldType.FLOAT, FieldType.INTEGER): "type_narrowed",
        }
        kind = "type_changed" if identifies else kinds.get((old.type, new.type), "type_changed")
        yield Change(kind, name, old.type, new.type)
    elif old.items is not new.items:
        yield Change("items_changed", name, old.items, new.items)
    elif old.scale != new.scale:
        yield Change("scale_changed", name, old.scale, new.scale)
    elif old.precision is not None and new.precision is not None and old.precision != new.precision:
        kind = "precision_raised" if new.precision > old.precision else "precision_lowered"
        yield Change(kind, name, old.precision, new.precision)
    if old.nullable != new.nullable:
        yield Change("null_allowed" if new.nullable else "null_forbidden", name, None, None)
    for limit, changes in _LIMITS.items():
        before, after = getattr(old, limit), getattr(new, limit)
        if limit in old.warn or limit in new.warn:
            yield from _of_warning(limit, old, new)
        else:
            yield from changes(limit, name, before, after)
    for place in new.refuse:
        if place not in old.refuse:
            yield Change("load_refused_for_it", name, None, place)
    for place in old.refuse:
        if place not in new.refuse:
            yield Change("load_taken_despite_it", name, place, None)
    for kind, part in (("unit", "unit"), ("example", "example"), ("field_description", "description")):
        yield from _changed(f"{kind}_changed", name, getattr(old, part), getattr(new, part))


def _of_warning(limit: str, old: Field, new: Field) -> Iterator[Change]:
    """Of a limit that only warns before, after, or both."""
    before, after = getattr(old, limit), getattr(new, limit)
    if before is None or after is None:
        if before != after:
            yield Change("warning_added" if before is None else "warning_removed", old.name, before, after)
    elif limit in old.warn and limit in new.warn:
        yield from _changed("warning_changed", old.name, before, after)
    else:
        yield Change("limit_softened" if limit in new.warn else "limit_hardened", old.name, before, after)


def _of_rules(old: Contract, new: Contract) -> Iterator[Change]:
    """Those between fields, then those of loads."""
    rows = ({f"rule {rule.name}": (rule.severity, rule.check) for rule in contract.rules} for contract in (old, new))
    reads: dict[str, frozenset[str]] = {}
    for contract in (old, new):
        for rule in contract.rules:
            name = f"rule {rule.name}"
            reads[name] = reads.get(name, frozenset()) | columns(contract.condition(rule))
        reads |= {f"rule {rule.id}": frozenset(rule.reads) for rule in contract.load_rules}
    for change in _of_named("", *rows):
        yield replace(change, reads=reads[change.field or ""])
    words = ({f"rule {rule.name}": rule.description for rule in contract.rules} for contract in (old, new))
    before, after = words
    for name in before.keys() & after.keys():
        yield from _changed("rule_description_changed", name, before[name], after[name])
    loads = (
        {f"rule {r.id}": (r.severity, r.model_dump_json(exclude={"severity"})) for r in contract.load_rules}
        for contract in (old, new)
    )
    for change in _of_named("load_", *loads):
        yield replace(change, reads=reads.get(change.field or "", frozenset()))


def _of_sla(old: Contract, new: Contract) -> Iterator[Change]:
    before, after = ({_promised(level): level for level in contract.sla} for contract in (old, new))
    for name, level in after.items():
        had = before.get(name)
        said = f"{level.value} {level.unit or ''}".strip()
        if had is None:
            yield Change("service_level_added", name, None, said)
        elif (had.value, had.unit) != (level.value, level.unit):
            yield Change("service_level_changed", name, f"{had.value} {had.unit or ''}".strip(), said)
        elif had.description != level.description:
            yield Change("description_changed", name, had.description, level.description)
    for name, level in before.items():
        if name not in after:
            yield Change("service_level_removed", name, f"{level.value} {level.unit or ''}".strip(), None)


def _promised(level: ServiceLevel) -> str:
    return f"sla {level.name}" + (f" of {level.element}" if level.element is not None else "")


def _of_named(
    of: str, before: Mapping[str, tuple[Severity, str]], after: Mapping[str, tuple[Severity, str]]
) -> Iterator[Change]:
    """Of rules by name, with their severity and what they want; a rule of rows may refuse a row or its whole load."""
    for name, (severity, wanted) in after.items():
        now_warns, refuses = severity is Severity.WARN, severity is Severity.REFUSE
        had, what = before.get(name, (None, None))
        warned = had is Severity.WARN
        if had is None:
            yield Change(f"{of}warning_added" if now_warns else f"{of}rule_added", name, None, wanted)
        elif what != wanted:
            yield Change(f"{of}warning_changed" if warned and now_warns else f"{of}rule_changed", name, what, wanted)
        if had is not None and warned != now_warns:
            yield Change(f"{of}rule_softened" if now_warns else f"{of}rule_hardened", name, had, severity)
        if not of and (had is Severity.REFUSE) != refuses:
            yield Change("load_refused_for_it" if refuses else "load_taken_despite_it", name, had, severity)
    for name, (severity, wanted) in before.items():
        if name not in after:
            kind = "warning_removed" if severity is Severity.WARN else "rule_removed"
            yield Change(f"{of}{kind}", name, wanted, None)


def _of_limit(limit: str, name: str, old: float | None, new: float | None) -> Iterator[Change]:
    if old == new:
        return
    if old is None or new is None:
        yield Change(f"{limit}_{'added' if old is None else 'removed'}", name, old, new)
    else:
        yield Change(f"{limit}_{'raised' if new > old else 'lowered'}", name, old, new)


def _of_pattern(limit: str, name: str, old: str | None, new: str | None) -> Iterator[Change]:
    if old is not None and new is not None:
        yield from _changed("pattern_changed", name, old, new)
    elif old != new:
        yield Change("pattern_added" if old is None else "pattern_removed", name, old, new)


def _of_allowed(limit: str, name: str, old: tuple[str, ...] | None, new: tuple[str, ...] | None) -> Iterator[Change]:
    if old is None or new is None:
        if old != new:
            yield Change("allowed_introduced" if old is None else "allowed_dropped", name, old, new)
        return
    for value in new:
        if value not in old:
            yield Change("value_added", name, None, value)
    for value in old:
        if value not in new:
            yield Change("value_withdrawn", name, value, None)


_LIMITS: dict[str, Callable[[str, str, Any, Any], Iterator[Change]]] = {
    "minimum": _of_limit,
    "maximum": _of_limit,
    "min_length": _of_limit,
    "max_length": _of_limit,
    "min_items": _of_limit,
    "max_items": _of_limit,
    "pattern": _of_pattern,
    "allowed": _of_allowed,
}


def _changed(kind: str, field: str | None, old: Any, new: Any) -> Iterator[Change]:
    if old != new:
        yield Change(kind, field, old, new)
