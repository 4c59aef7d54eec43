"""The two stages of enforcing a contract on a load, as functions of one split and of one bucket.

They run alike in this process or inside Ray tasks. Whatever they write is seen by nobody until the driver
commits it, so an attempt that dies or is repeated leaves only orphans.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.filesystems import open_filesystem
from cluster.tables import DataFile, Tables
from pipelines.contracts import events, rules, sources
from pipelines.contracts.datasets import Tally, unique_keys
from pipelines.contracts.parsing import Parsed
from pipelines.contracts.profile import Earlier, Profile, expects, profiled
from pipelines.contracts.rows import RowVerdict, check
from pipelines.spec import Contract, EventSource
from pipelines.spec.base import microseconds

_SOURCE, _POSITION = "_source", "_position"
Engine = Literal["arrow", "ray"]


def events_table(source: EventSource) -> str:
    """The Delta table of accepted events."""
    return f"{source.name}/events"


def quarantine_table(source: EventSource) -> str:
    """The Delta table of refused rows."""
    return f"{source.name}/quarantine"


@dataclass(frozen=True)
class LoadContext:
    """What every task of a load needs. ``staging`` is the URI that this run of the load stages below. No row is taken
    to have been known before ``known_from_us``.
    """

    contract: Contract
    events: str
    quarantine: str
    load_id: str
    as_of_us: int
    tables: Tables
    staging: str
    names: tuple[str, ...]
    buckets: int
    known_from_us: int = 0


@dataclass(frozen=True)
class Staged:
    """What one split became: accepted rows by bucket (a file each), refused rows in a quarantine file.

    ``warned`` counts accepted rows by the rules that they break and that refuse none.
    """

    order: int
    rows_in: int
    refused: int
    by_rule: dict[str, int]
    warned: dict[str, int]
    files: dict[int, str]
    quarantine: DataFile | None
    earliest_us: int | None
    latest_us: int | None
    unreadable: str | None = None


@dataclass(frozen=True)
class Settled:
    """What one bucket became; ``accepted`` and ``refused`` count rows by the order of their source.

    ``profile`` is that of the rows which are accepted unless the load is refused.
    """

    bucket: int
    accepted: dict[int, int]
    refused: dict[int, int]
    by_rule: dict[str, int]
    events: DataFile | None
    quarantine: DataFile | None
    profile: Profile


def quarantine_rows(
    contract: Contract,
    parsed: Parsed,
    verdict: RowVerdict,
    *,
    load_id: str,
    source: str,
    positions: np.ndarray,
    at_us: int,
) -> pa.Table:
    """Quarantine rows of everything that a verdict refused; ``positions`` of all rows, int64[n]."""
    refused = np.flatnonzero(~verdict.accepted)
    return quarantined(
        contract,
        load_id=load_id,
        sources=[source] * len(refused),
        positions=positions[refused],
        rules_column=verdict.rules_column(),
        records=parsed.raw(refused),
        at_us=at_us,
    )


def stage(context: LoadContext, part: sources.Split) -> Staged:
    """Stage one: read a split, judge its rows, set the accepted aside by bucket and write the refused."""
    contract = context.contract
    writers: dict[int, _Writer] = {}
    refused: list[pa.Table] = []
    by_rule: Counter[str] = Counter()
    warned: Counter[str] = Counter()
    rows_in, low, high = 0, None, None
    try:
        for batch in sources.read(contract, part, context.tables.storage_options):
            rows_in += batch.parsed.table.num_rows
            verdict = check(contract, batch.parsed, context.as_of_us)
            for broken in verdict.broken:
                by_rule[broken.rule] += len(broken.rows)
            for advised in verdict.warned:
                warned[advised.rule] += int(verdict.accepted[advised.rows].sum())
            if not verdict.accepted.all():
                refused.append(
                    quarantine_rows(
                        contract,
                        batch.parsed,
                        verdict,
                        load_id=context.load_id,
                        source=part.source.name,
                        positions=batch.positions,
                        at_us=context.as_of_us,
                    )
                )
            good = _accepted(contract, batch, verdict, part.order)
            if good.num_rows:
                extent = pc.min_max(good.column(contract.time).cast(pa.int64())).as_py()
                low = extent["min"] if low is None else min(low, extent["min"])
                high = extent["max"] if high is None else max(high, extent["max"])
            for bucket, table in _by_bucket(contract, good, context.buckets):
                writers.setdefault(bucket, _Writer(context, bucket, table.schema)).write(table)
    except sources.Unreadable as error:
        return Staged(part.order, 0, 0, {}, {}, {}, None, None, None, unreadable=str(error))
    finally:
        for writer in writers.values():
            writer.close()
    file = context.tables.write_file(context.quarantine, pa.concat_tables(refused)) if refused else None
    count = sum(table.num_rows for table in refused)
    files = {bucket: writer.path for bucket, writer in writers.items()}
    return Staged(part.order, rows_in, count, dict(by_rule), dict(+warned), files, file, low, high)


def unreadable_file(context: LoadContext, order: int, reason: str) -> Staged:
    """A file that cannot be read counts as one row, refused."""
    row = quarantined(
        context.contract,
        load_id=context.load_id,
        sources=[context.names[order]],
        positions=np.zeros(1, dtype=np.int64),
        rules_column=pa.array([[rules.FILE_UNREADABLE]], pa.list_(pa.string())),
        records=[rules.as_json({"reason": reason})],
        at_us=context.as_of_us,
    )
    file = context.tables.write_file(context.quarantine, row)
    return Staged(order, 1, 1, {rules.FILE_UNREADABLE: 1}, {}, {}, file, None, None)


@dataclass(frozen=True)
class Bucket:
    """Stage two's work: the staged files of one bucket, and the span of event times of the whole load.

    Without any it is only asked whose events were expected.
    """

    bucket: int
    paths: tuple[str, ...]
    earliest_us: int
    latest_us: int


def settle(
    context: LoadContext, work: Bucket, *, mode: Literal["publish", "refuse", "recover"], version: int
) -> Settled:
    """Stage two: each key once, in source order, and not if the events table has it at ``version``.

    ``publish`` writes the kept rows sorted by (entity, time, event order) and the duplicates; ``refuse``
    quarantines them all; ``recover`` is for a load whose events are committed already: exactly the committed
    rows count as accepted.
    """
    contract = context.contract
    earlier = _earlier(context, work, version)
    if not work.paths:
        nothing = pa.table({field.name: pa.array([], field.type) for field in events.contract_schema(contract)})
        return Settled(work.bucket, {}, {}, {}, None, None, profiled(contract, nothing, work.latest_us, earlier))
    staged = _read_staged(context, work)
    ids = staged.column(events.EVENT_ID).combine_chunks()
    theirs, mine = _taken(context, work, version)
    keep = unique_keys(ids, theirs)
    if mode == "recover":
        keep &= pc.is_in(ids, value_set=mine).to_numpy(zero_copy_only=False)
    reasons = np.where(keep, rules.LOAD_REFUSED, rules.KEY_DUPLICATE)
    accepted = keep if mode != "refuse" else np.zeros(len(keep), dtype=bool)
    refused = staged.filter(pa.array(~accepted))
    order = staged.column(_SOURCE).to_numpy()
    quarantine = None
    if refused.num_rows:
        plain = refused.select([f.name for f in contract.fields])
        columns = [c.cast(pa.string()) if pa.types.is_temporal(c.type) else c for c in plain.columns]
        shown = pa.table(columns, names=plain.column_names)
        rows = quarantined(
            contract,
            load_id=context.load_id,
            sources=[context.names[i] for i in refused.column(_SOURCE).to_pylist()],
            positions=refused.column(_POSITION).to_numpy(),
            rules_column=pa.array([[reason] for reason in reasons[~accepted]], pa.list_(pa.string())),
            records=[rules.as_json(row) for row in shown.to_pylist()],
            at_us=context.as_of_us,
        )
        quarantine = context.tables.write_file(context.quarantine, rows)
    written = None
    if mode == "publish" and accepted.any():
        table = _event_rows(context, staged.filter(pa.array(accepted)), work.bucket)
        written = context.tables.write_file(context.events, table, {events.BUCKET: work.bucket}, partial=True)
    return Settled(
        bucket=work.bucket,
        accepted=_counts(order[accepted]),
        refused=_counts(order[~accepted]),
        by_rule=dict(Counter(reasons[~accepted].tolist())),
        events=written,
        quarantine=quarantine,
        profile=profiled(contract, staged.filter(pa.array(keep)), work.latest_us, earlier),
    )


def run(engine: Engine, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """``function`` of every item, in order: here, or in Ray Data tasks of half a CPU.

    A task whose worker dies is repeated by Ray; only what the successful attempt returns counts.
    """
    if engine == "arrow" or not items:
        return [function(item) for item in items]
    import ray

    work = list(items)

    def one(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = np.empty(len(batch["id"]), dtype=object)
        for place, item in enumerate(batch["id"]):
            results[place] = function(work[int(item)])
        return {"id": batch["id"], "result": results}

    data = ray.data.range(len(work), override_num_blocks=len(work))
    found = data.map_batches(one, batch_size=1, num_cpus=0.5).take_all()
    return [row["result"] for row in sorted(found, key=lambda row: int(row["id"]))]


class _Writer:
    def __init__(self, context: LoadContext, bucket: int, schema: pa.Schema) -> None:
        self.path = f"{context.staging}/{uuid.uuid4().hex}-{bucket}.arrow"
        filesystem, path = open_filesystem(self.path, context.tables.storage_options)
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        self._sink = filesystem.open_output_stream(path)
        # Arrow's own format: these files are read once and soon, so encoding them would only cost time.
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_file(self._sink, schema, options=options)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def close(self) -> None:
        self._writer.close()
        self._sink.close()


def _accepted(contract: Contract, batch: sources.Batch, verdict: RowVerdict, order: int) -> pa.Table:
    table, positions = batch.parsed.table, batch.positions
    if not verdict.accepted.all():
        table, positions = table.filter(pa.array(verdict.accepted)), positions[verdict.accepted]
    table = table.append_column(events.EVENT_ID, events.event_ids(contract, table))
    table = table.append_column(_SOURCE, pa.array(np.full(len(positions), order, dtype=np.int32)))
    return table.append_column(_POSITION, pa.array(positions, pa.int64()))


def _by_bucket(contract: Contract, table: pa.Table, buckets: int) -> Iterator[tuple[int, pa.Table]]:
    if not table.num_rows:
        return
    numbers = events.buckets_of(table.column(contract.entity), buckets).to_numpy()
    order = np.argsort(numbers, kind="stable")
    table, numbers = table.take(pa.array(order)), numbers[order]
    present, starts = np.unique(numbers, return_index=True)
    for bucket, start, stop in zip(present, starts, [*starts[1:], len(numbers)], strict=True):
        yield int(bucket), table.slice(start, stop - start)


def _read_staged(context: LoadContext, work: Bucket) -> pa.Table:
    parts = []
    for uri in work.paths:
        filesystem, path = open_filesystem(uri, context.tables.storage_options)
        with filesystem.open_input_file(path) as file:
            parts.append(pa.ipc.open_file(file).read_all())
    return pa.concat_tables(parts).sort_by([(_SOURCE, "ascending"), (_POSITION, "ascending")])


def _taken(context: LoadContext, work: Bucket, version: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Event ids that the table holds in this bucket: of others, and of this load."""
    contract, span = context.contract, None
    if contract.time in contract.key:  # then an equal id has an equal time, so other times need not be read
        moments = [pa.scalar(us, pa.int64()).cast(events.INSTANT) for us in (work.earliest_us, work.latest_us)]
        span = (pc.field(contract.time) >= moments[0]) & (pc.field(contract.time) <= moments[1])
    held = context.tables.read(
        context.events,
        version=version,
        columns=[events.EVENT_ID, events.LOAD_ID],
        filter=span,
        partition={events.BUCKET: [work.bucket]},
    )
    own = pc.equal(held.column(events.LOAD_ID), context.load_id)
    ids = held.column(events.EVENT_ID)
    return ids.filter(pc.invert(own)), ids.filter(own)


def _earlier(context: LoadContext, work: Bucket, version: int) -> Earlier | None:
    contract, known_for = context.contract, expects(context.contract)
    if known_for is None:
        return None
    span = (work.earliest_us - microseconds(known_for), work.latest_us)
    since, until = (pa.scalar(us, pa.int64()).cast(events.INSTANT) for us in span)
    held = context.tables.read(
        context.events,
        version=version,
        columns=[contract.entity, contract.time],
        filter=(pc.field(contract.time) >= since) & (pc.field(contract.time) <= until),
        partition={events.BUCKET: [work.bucket]},
    )
    return Earlier(held, work.earliest_us)


def _event_rows(context: LoadContext, table: pa.Table, bucket: int) -> pa.Table:
    contract = context.contract
    table = table.append_column("_order", pa.array(events.event_order(table.column(events.EVENT_ID).to_pylist())))
    table = table.sort_by([(name, "ascending") for name in (contract.entity, contract.time, "_order")])
    known = pc.add(table.column(contract.time).cast(pa.int64()), microseconds(contract.delay))
    known = pc.max_element_wise(known, pa.scalar(context.known_from_us, pa.int64()))
    columns = {
        **{field.name: table.column(field.name) for field in contract.fields},
        events.EVENT_ID: table.column(events.EVENT_ID),
        events.KNOWN_AT: known.cast(events.INSTANT),
        events.SEQUENCE: pa.array(np.zeros(table.num_rows, dtype=np.int64)),
        events.LOAD_ID: pa.array([context.load_id] * table.num_rows, pa.string()),
        events.BUCKET: pa.array(np.full(table.num_rows, bucket, dtype=np.int32)),
    }
    return pa.table(columns, schema=events.events_schema(contract))


def quarantined(
    contract: Contract,
    *,
    load_id: str,
    sources: list[str],
    positions: np.ndarray,
    rules_column: pa.ListArray,
    records: list[str],
    at_us: int,
) -> pa.Table:
    """Rows of the quarantine table from one value a row each."""
    count = len(records)
    columns: list[pa.Array] = [
        pa.array([load_id] * count, pa.string()),
        pa.array(sources, pa.string()),
        pa.array(positions, pa.int64()),
        pa.array([contract.name] * count, pa.string()),
        pa.array([contract.version] * count, pa.string()),
        rules_column,
        pa.array(records, pa.string()),
        pa.array([at_us] * count, pa.int64()).cast(events.INSTANT),
    ]
    return pa.Table.from_arrays(columns, schema=events.QUARANTINE_SCHEMA)


def _counts(orders: np.ndarray) -> dict[int, int]:
    found, counts = np.unique(orders, return_counts=True)
    return {int(order): int(count) for order, count in zip(found, counts, strict=True)}


def by_source(
    context: LoadContext, staged: Sequence[Staged], settled: Sequence[Settled]
) -> Iterator[tuple[str, Tally]]:
    """What every part reports of every source; what stage one passed on counts where stage two put it."""
    for part in staged:
        yield context.names[part.order], Tally(rows_in=part.rows_in, quarantined=part.refused)
    for bucket in settled:
        for order, count in bucket.accepted.items():
            yield context.names[order], Tally(accepted=count)
        for order, count in bucket.refused.items():
            yield context.names[order], Tally(quarantined=count)
