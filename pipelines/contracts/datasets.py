"""Rules of a whole load: each key once, few enough refused rows, and rows in = accepted + quarantined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.spec import Contract


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


def publishable(contract: Contract, total: Tally) -> bool:
    """Whether the refused share of a load is at most ``contract.max_rejected_share``."""
    return total.quarantined <= contract.max_rejected_share * total.rows_in
