"""Rules of a whole load: each key once, few enough refused rows, what its contract wants of it as a whole, and rows in
= accepted + quarantined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.profile import WORST, Digests, Found, Moments, Profile, Values
from pipelines.contracts.rules import FILE_UNREADABLE, LOAD_REFUSED, severities
from pipelines.spec import (
    Contract,
    Distribution,
    Freshness,
    Monotone,
    NullShare,
    References,
    Severity,
    Silence,
    Unique,
    Volume,
)

_LEAST_HISTORY = 3
_Measured = Volume | Freshness | NullShare | Distribution | Monotone | Silence | Unique


class ReconciliationError(RuntimeError):
    """Rows got lost or appeared twice: a bug, and nothing of the load may be committed."""


@dataclass(frozen=True)
class Tally:
    """Rows that came in from one source, and where they went."""

    rows_in: int = 0
    accepted: int = 0
    quarantined: int = 0

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            self.rows_in + other.rows_in,
            self.accepted + other.accepted,
            self.quarantined + other.quarantined,
        )


@dataclass(frozen=True)
class Manifest:
    """What a load did: totals, refusals by rule (a row counts for each rule it breaks), tallies by source."""

    total: Tally
    by_rule: dict[str, int] = field(default_factory=dict)
    by_source: dict[str, Tally] = field(default_factory=dict)


def unique_keys(ids: pa.Array, taken: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """bool[n]: the first row of each id, in the order given, unless the id is among ``taken``.

    Ids are event ids (``events.event_ids``); no id is null.
    """
    if not len(ids):
        return np.zeros(0, dtype=bool)
    encoded = ids.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(codes, return_index=True)
    keep = np.zeros(len(ids), dtype=bool)
    keep[first] = True
    if len(taken):
        known = pc.is_in(encoded.dictionary, value_set=taken).to_numpy(zero_copy_only=False)
        keep &= ~known[codes]
    return keep


def reconcile(tallies: Iterable[tuple[str, Tally]], by_rule: Iterable[tuple[str, int]]) -> Manifest:
    """Adds up what the parts of a load report; ``ReconciliationError`` names a source out of balance."""
    by_source: dict[str, Tally] = {}
    for source, tally in tallies:
        by_source[source] = by_source.get(source, Tally()).plus(tally)
    for source, tally in by_source.items():
        if tally.rows_in != tally.accepted + tally.quarantined:
            raise ReconciliationError(
                f"source {source!r}: {tally.rows_in} rows came in, but {tally.accepted} were accepted and "
                f"{tally.quarantined} quarantined; nothing was published: report this as a bug"
            )
    counted: Counter[str] = Counter()
    for rule, count in by_rule:
        counted[rule] += count
    total = Tally()
    for tally in by_source.values():
        total = total.plus(tally)
    return Manifest(total, dict(sorted(counted.items())), by_source)


def refusals(contract: Contract, manifest: Manifest) -> list[str]:
    """Why a load is not to be published, in words; empty when it is.

    More than ``contract.max_rejected_share`` of its rows are refused, one breaks a rule for which loads are refused, or
    no file could be read.
    """
    files = manifest.by_rule.get(FILE_UNREADABLE, 0)  # each counts as one row, and says nothing of those of others
    rows_in, found = manifest.total.rows_in - files, []
    refused = manifest.total.quarantined - files - manifest.by_rule.get(LOAD_REFUSED, 0)  # refused for the others
    if refused > contract.max_rejected_share * rows_in:
        share = refused / rows_in
        found.append(f"{share:.1%} of the rows are refused, and at most {contract.max_rejected_share:.1%} may be")
    if files and not rows_in:
        found.append("there is no other file than those that could not be read")
    strict = severities(contract)
    for rule, count in manifest.by_rule.items():
        if strict.get(rule) is Severity.REFUSE:
            found.append(f"{count} rows break {rule}, for which a load is refused")
    return found


@dataclass(frozen=True)
class Finding:
    """A rule of a load that is broken: what was measured, in words, and whether the load is refused for it."""

    rule: str
    said: str
    refuses: bool


def findings(
    contract: Contract,
    profile: Profile,
    history: Sequence[int],
    as_of_us: int,
    known: Callable[[References], frozenset[Any] | None],
) -> list[Finding]:
    """The load rules that rows of that profile break, in contract order.

    ``history`` are the accepted rows of the loads published before, the newest last; the load began at ``as_of_us``.
    ``known`` gives the values that a rule refers to, None when there is no such column.
    """
    found = []
    for rule in contract.load_rules:
        if isinstance(rule, References):
            said = _unknown(rule, profile.values.get(rule.id, Values()).seen, known(rule))
        else:
            said = _broken(rule, profile, history, as_of_us)
        if said is not None:
            found.append(Finding(rule.id, said, rule.severity is Severity.REFUSE))
    return found


def _broken(rule: _Measured, profile: Profile, history: Sequence[int], as_of_us: int) -> str | None:
    """What is wrong, in words; None when nothing is."""
    match rule:
        case Volume():
            return _volume(rule, profile.rows, history)
        case Freshness(max_age=most):
            if profile.newest_us is None:
                return "there is no row, so nothing is fresh"
            age = timedelta(microseconds=as_of_us - profile.newest_us)
            return f"the newest event is {age} old, and at most {most} is allowed" if age > most else None
        case NullShare(field=name, maximum=maximum):
            nulls = profile.nulls.get(name, 0)
            if nulls <= maximum * profile.rows:
                return None
            return f"{nulls / profile.rows:.1%} of {name} are null, and at most {maximum:.1%} may be"
        case Distribution():
            return _distribution(rule, profile.moments.get(rule.field, Moments()))
        case Monotone(field=name):
            fell = profile.descents.get(name, Found())
            return f"{name} fell {fell.count} times, by most {_worst(fell, '')}" if fell.count else None
        case Unique(fields=names):
            repeated = profile.digests.get(rule.id, Digests()).repeated
            return f"{repeated} rows repeat the {', '.join(names)} of another" if repeated else None
        case Silence(every=every):
            gaps = profile.gaps.get(rule.id, Found())
            return f"{gaps.count} gaps exceed {every}, the longest {_worst(gaps, ' s')}" if gaps.count else None


def _unknown(rule: References, values: frozenset[Any], known: frozenset[Any] | None) -> str | None:
    if known is None:
        return f"there is no column {rule.column!r} of events of {rule.source!r} that {rule.field} could refer to"
    missing = sorted(values - known, key=repr)
    if not missing:
        return None
    shown = ", ".join(map(repr, missing[:WORST])) + (", …" if len(missing) > WORST else "")
    return f"{len(missing)} values of {rule.field} are not among those of {rule.column} of {rule.source}: {shown}"


def _volume(rule: Volume, rows: int, history: Sequence[int]) -> str | None:
    if rule.minimum is not None and rows < rule.minimum:
        return f"{rows} rows are fewer than {rule.minimum}"
    if rule.maximum is not None and rows > rule.maximum:
        return f"{rows} rows are more than {rule.maximum}"
    past = history[-rule.history :] if rule.history is not None else ()
    if len(past) < _LEAST_HISTORY:
        return None
    usual, (low, high) = median(past), rule.ratio
    if low * usual <= rows <= high * usual:
        return None
    return f"{rows} rows are not between {low:g} and {high:g} times {usual:g}, the median of the last {len(past)} loads"


def _distribution(rule: Distribution, moments: Moments) -> str | None:
    for name, bounds, value, least in (("mean", rule.mean, moments.mean, 1), ("std", rule.std, moments.std, 2)):
        if bounds is not None and moments.count >= least and not bounds[0] <= value <= bounds[1]:
            return f"the {name} of {rule.field} is {value:.6g}, and must lie between {bounds[0]:g} and {bounds[1]:g}"
    return None


def _worst(found: Found, unit: str) -> str:
    return ", ".join(f"{how_bad:g}{unit} ({entity})" for how_bad, entity in found.worst)
