"""After the replay: tables against what was acknowledged, state against the sweep over the table, and the leaks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from cluster.tables import Tables
from pipelines.contracts.enforce import events_table, quarantine_table
from pipelines.contracts.events import BUCKET, EVENT_ID, SEQUENCE, event_order
from pipelines.features.skew import different_bits
from pipelines.features.sweep import Reads, places, sweep
from pipelines.features.windows import compile_plan, eligible, event_columns
from tests.benchmarks.features.worlds import BASE, MINUTE_US
from tests.benchmarks.harness import Incomparable, say
from tests.benchmarks.water_network.network import LEAK_M3_S, Network, between
from tests.benchmarks.water_network.page import USE_CASE
from tests.benchmarks.water_network.replay import Acknowledged, Replayed


def lost(kept: Acknowledged, tables: Tables, buckets: int) -> int:
    """How many readings are not where they must be: an accepted one in the events table exactly once, and nothing else
    there; a refused one in quarantine as often as it was refused.

    Only a request that was sent again may have left its broken readings in quarantine more often.
    """
    acknowledged = np.unique(np.concatenate(kept.ids))
    held = np.sort(np.concatenate([_ids(tables, bucket) for bucket in range(buckets)]))
    differing = _surplus(held, acknowledged) + _surplus(acknowledged, held)
    refused = np.sort(np.concatenate(kept.refused))
    records = tables.read(quarantine_table(USE_CASE), columns=["record"]).column("record")
    quarantined = np.sort(event_order(records.to_pylist()))
    differing += _surplus(refused, quarantined)
    more = np.setdiff1d(quarantined, refused).size if kept.resent else _surplus(quarantined, refused)
    say(
        f"sent {kept.new + kept.repeated + len(refused):,}: accepted {kept.new:,}, repeated {kept.repeated:,}, "
        f"refused {len(refused):,}; {kept.resent} requests had to be sent again\n"
        f"events table {len(held):,}, quarantine {len(quarantined):,}"
    )
    return differing + more


def _ids(tables: Tables, bucket: int) -> np.ndarray:
    rows = tables.read(events_table(USE_CASE), columns=[EVENT_ID], partition={BUCKET: [bucket]})
    return event_order(rows.column(EVENT_ID).to_pylist())


def _surplus(left: np.ndarray, right: np.ndarray) -> int:
    """By how many the values of ``left`` outnumber the same ones of ``right``, together."""
    values, counts = np.unique(left, return_counts=True)
    others, theirs = np.unique(right, return_counts=True)
    at = np.minimum(np.searchsorted(others, values), max(len(others) - 1, 0))
    known = np.where(others[at] == values, theirs[at], 0) if len(others) else 0
    return int(np.maximum(counts - known, 0).sum())


def same_state(replayed: Replayed, tables: Tables, sample: Sequence[str]) -> None:
    """Recomputes from the table what state answered, value, status and age, and tells how much that was.

    Raises ``Incomparable`` when one differs in a bit.
    """
    plan = compile_plan(USE_CASE.view, USE_CASE.contract)
    rows = tables.read(events_table(USE_CASE), filter=pc.field(USE_CASE.contract.entity).isin(list(sample)))
    columns, width = event_columns(plan, rows), len(sample)
    moments = np.repeat([moment for moment, _ in replayed.probes], width)
    bounds = np.repeat([read.sequence for _, read in replayed.probes], width)
    asked = np.tile(places(columns, np.array(sample, dtype=object)), len(replayed.probes))
    swept = sweep(plan, columns, rows.column(SEQUENCE).to_numpy(), Reads(asked, moments, bounds), ages=True)
    assert swept.age_s is not None
    served = [read for _, read in replayed.probes]
    for what, mine, theirs in (
        ("values", swept.values, np.concatenate([read.values for read in served])),
        ("ages", swept.age_s, np.concatenate([read.age_s for read in served])),
        ("statuses", swept.status.astype(np.float64), np.concatenate([read.status for read in served])),
    ):
        differs = different_bits(mine, theirs.astype(np.float64))
        if differs.any():
            row, place = np.argwhere(differs)[0].tolist()
            raise Incomparable(
                f"{int(differs.sum())} {what} of state and sweep differ, first {plan.features[place]} of "
                f"{sample[row % width]} in read {row // width}: {theirs[row, place]} and {mine[row, place]}"
            )
    say(
        f"{swept.values.size:,} values served in {len(served)} reads of {width} nodes: bit for bit those of the sweep "
        f"over the table, where {int((~eligible(plan, columns)).sum()):,} of {rows.num_rows:,} readings came too late"
    )


def show_leaks(replayed: Replayed, network: Network, sample: Sequence[str]) -> None:
    """Tells how far the served hour's mean at leaking nodes lies below that of the same network without leaks."""
    place, read_at = USE_CASE.view.stored.index("pressure_mean_1h"), dict(replayed.probes)
    moments = {(moment - BASE) // MINUTE_US + 1: moment for moment in read_at}
    found = []
    for leak in network.leaks:
        if (moment := moments.get(leak.stop_hour * 60)) is None:
            continue
        name = network.names[leak.node]
        hour = range(leak.stop_hour * 60 - 60, leak.stop_hour * 60)
        without = np.mean([between(network.unleaked, minute)[leak.node] for minute in hour])
        found.append((without - read_at[moment].values[sample.index(name), place], name, without))
    if not found:
        say("no leak ended within these minutes")
        return
    most, name, without = max(found)
    say(
        f"simulated leaks of {LEAK_M3_S * 1e3:g} L/s: pressure_mean_1h at {len(found)} nodes is lower by "
        f"{np.median([less for less, _, _ in found]):.2f} m (median), at {name} by {most:.1f} of {without:.1f} m"
    )
