"""The point-in-time join with a table on disk that is bucketed by entity: every task reads its share of one bucket.

A bucket holds whole entities, so nothing is shuffled. A bucket of more rows than a task may take is cut into ranges of
entities, and a busy entity into spans of time, so that it keeps no other waiting. Files that stand by entity and time,
as ingest writes them, are read only where they hold the share, and nothing is sorted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import reduce
from itertools import pairwise
from operator import and_
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.settings import Settings
from cluster.tables import Tables
from pipelines.contracts.events import BUCKET, INSTANT, bucket_of
from pipelines.features.asof import AsOf, by_code, check_joinable, entity_codes, places_seen, times_of, with_columns
from pipelines.features.buckets import Bucket, Engine, buckets_in, ray_carries

_PLACE = "_place"  # of a request among all


def join_bucketed(
    requests: pa.Table | str,
    rows: str,
    *,
    tables: Tables,
    settings: Settings,
    entity: str,
    time: str,
    columns: Sequence[str],
    ttl: timedelta | None = None,
    known_at: str | None = None,
    order: str | None = None,
    version: int | None = None,
    engine: Engine = "auto",
) -> pa.Table:
    """``join_latest`` of requests, a table or the name of one, with one version of the table ``rows``.

    ``version`` None is the newest. ``rows`` is partitioned by ``_bucket``, the bucket of its ``entity`` (strings) among
    ``settings.buckets``. With ``auto`` Ray carries the join when the requests and the rows of their buckets are more
    than ``settings.ray_rows`` and a Ray cluster is connected, and a loop in this process otherwise; the answer is the
    same to the last bit. Tasks read the table themselves and hold about ``settings.task_rows`` of its rows at a time:
    through the object store go only entity and time of the requests, and ``columns`` of the rows that are seen. Raises
    ``ValueError`` where ``join_latest`` does, and when an entity lies in another bucket than its own.
    """
    asked = tables.read(requests) if isinstance(requests, str) else requests
    version = tables.version(rows) if version is None else version
    rule, schema = AsOf(entity, time, ttl, known_at, order), tables.schema(rows, version)
    check_joinable(asked.schema, schema, rule, columns)
    if (kind := schema.field(entity).type) != pa.string():
        raise ValueError(f"{entity!r} of table {rows!r} is {kind}: only strings have a bucket")
    zone = schema.field(time).type.tz
    join = _Join(tables, rows, version, rule, zone, tuple(columns), settings.buckets, settings.task_rows)
    shares, size = join.shares(asked)
    if ray_carries(engine, asked.num_rows + size, settings):
        found = _with_ray(join, shares)
    else:
        found = (join(task, block) for task, block in shares)
    answer = pa.schema([*(schema.field(name) for name in columns), pa.field(_PLACE, pa.int64())])
    seen = pa.concat_tables([answer.empty_table(), *found]).combine_chunks()
    places = np.full(asked.num_rows, -1)
    places[seen.column(_PLACE).to_numpy()] = np.arange(seen.num_rows)
    return with_columns(asked, seen.drop_columns(_PLACE), places)


@dataclass(frozen=True)
class _Part:
    """Rows of a bucket that are read together: entities from ``first`` to ``last``, times from ``since`` on and before
    ``until`` (us); None has no bound."""

    bucket: int
    first: str | None = None
    last: str | None = None
    since: int | None = None
    until: int | None = None

    def holds(self, bucket: int, entity: str) -> bool:
        """Whether an entity of that bucket, not before ``first``, is in the range."""
        return self.bucket == bucket and (self.last is None or entity <= self.last)


@dataclass(frozen=True)
class _Task:
    """Requests with entities of ``parts`` and times of ``parts[newest]``: their rows are there, or in parts before."""

    parts: tuple[_Part, ...]
    newest: int


@dataclass(frozen=True)
class _Join:
    """Shares out a join and does the shares; picklable, so that any worker can do them."""

    tables: Tables
    name: str
    version: int
    rule: AsOf
    zone: str | None
    columns: tuple[str, ...]
    buckets: int
    most: int

    def shares(self, asked: pa.Table) -> tuple[Iterator[tuple[_Task, pa.Table]], int]:
        """Tasks with at most ``most`` requests each (entity, time, place), and how many rows their buckets have.

        A request without entity or time, or of an entity that the table does not have, is in none.
        """
        codes, names = entity_codes(asked.column(self.rule.entity))
        moments, present = times_of(asked.column(self.rule.time))
        texts = names.to_pylist()
        numbers = [bucket_of(text, self.buckets) for text in texts]
        touched = self._buckets(set(numbers))
        ranges = [parts for bucket in touched for parts in self._ranges(bucket)]
        tasks = [_Task(parts, newest) for parts in ranges for newest in range(len(parts))]

        begins, mine = np.cumsum([0, *map(len, ranges)]), np.full(len(texts) + 1, -1)
        keys = [(parts[0].bucket, parts[0].first or "") for parts in ranges]
        for place, key in enumerate(zip(numbers, texts, strict=True)):
            near = bisect_right(keys, key) - 1
            if near >= 0 and ranges[near][0].holds(*key):
                mine[place] = begins[near]
        asks = np.where(present, mine[codes], -1)  # a null entity has the last place
        for begin, parts in zip(begins.tolist(), ranges, strict=False):
            if len(parts) > 1:
                here, begun = np.flatnonzero(asks == begin), np.array([part.since for part in parts[1:]], np.int64)
                asks[here] += np.searchsorted(begun, moments[here], side="right")

        # By entity within a task, so that those of one entity look through the same few rows.
        edges, places = by_code(asks, len(tasks), by_code(codes, len(texts))[1])

        def blocks() -> Iterator[tuple[_Task, pa.Table]]:
            for task, (low, high) in zip(tasks, pairwise(edges.tolist()), strict=True):
                for begin in range(low, high, self.most):
                    chosen = places[begin : min(begin + self.most, high)]
                    entities, times = names.take(pa.array(codes[chosen])), pa.array(moments[chosen]).cast(INSTANT)
                    yield task, pa.table({self.rule.entity: entities, self.rule.time: times, _PLACE: chosen})

        return blocks(), sum(bucket.rows for bucket in touched)

    def __call__(self, task: _Task, block: pa.Table) -> pa.Table:
        """The rows that the block's requests see, each with the place of its request."""
        found = []
        for part in reversed(task.parts[: task.newest + 1]):
            rows = self._read(part, [*self.rule.reads, *self.columns])
            self._check_bucket(part.bucket, rows.column(self.rule.entity))
            at = places_seen(block, rows, self.rule)
            seen = pa.array(at >= 0)
            picked = rows.select(list(self.columns)).take(pa.array(at).filter(seen))
            found.append(picked.append_column(_PLACE, block.column(_PLACE).filter(seen)))
            if part.since is None:
                break
            # Whoever sees nothing in this span may see something in an older one, if that is young enough.
            reach = times_of(block.column(self.rule.time))[0] - self.rule.ttl_us
            block = block.filter(pa.array((at < 0) & (reach < part.since)))
            if not block.num_rows:
                break
        return pa.concat_tables(found)

    def _buckets(self, wanted: Set[int]) -> list[Bucket]:
        held = buckets_in(self.tables, self.name, self.version)
        if held and held[-1].number >= self.buckets:
            raise self._other_buckets(f"a bucket {held[-1].number}")
        return [bucket for bucket in held if bucket.number in wanted]

    def _ranges(self, bucket: Bucket) -> list[tuple[_Part, ...]]:
        """A bucket by ranges of entities of at most ``most`` rows; an entity that has more by spans of time as well."""
        if bucket.rows <= self.most:
            return [(_Part(bucket.number),)]
        held = self._read(_Part(bucket.number), [self.rule.entity]).column(self.rule.entity)
        codes, names = entity_codes(held)
        counts = np.bincount(codes[codes >= 0], minlength=len(names)).tolist()
        groups: list[list[str]] = []
        size = 0
        for name, count in sorted(zip(names.to_pylist(), counts, strict=True)):
            if not groups or size + count > self.most:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += count
        return [self._spans(_Part(bucket.number, group[0], group[-1])) for group in groups]

    def _spans(self, part: _Part) -> tuple[_Part, ...]:
        if part.first != part.last:
            return (part,)
        times, dated = times_of(self._read(part, [self.rule.time]).column(self.rule.time))
        edges = np.unique(np.sort(times[dated])[:: self.most])[1:].tolist()
        return tuple(replace(part, since=since, until=until) for since, until in pairwise([None, *edges, None]))

    def _read(self, part: _Part, columns: Sequence[str]) -> pa.Table:
        entity, time = pc.field(self.rule.entity), pc.field(self.rule.time)
        bounds = [] if part.first is None else [entity >= part.first, entity <= part.last]
        bounds += [] if part.since is None else [time >= self._moment(part.since)]
        bounds += [] if part.until is None else [time < self._moment(part.until)]
        return self.tables.read(
            self.name,
            self.version,
            columns=list(dict.fromkeys(columns)),
            filter=reduce(and_, bounds) if bounds else None,
            partition={BUCKET: [part.bucket]},
            encoded=[self.rule.entity],
        )

    def _moment(self, at: int) -> pa.Scalar:
        return pa.scalar(at, pa.int64()).cast(pa.timestamp("us", self.zone))

    def _check_bucket(self, number: int, entities: pa.ChunkedArray) -> None:
        for chunk in entities.unify_dictionaries().chunks[:1]:
            for name in chunk.dictionary.to_pylist():
                if bucket_of(name, self.buckets) != number:
                    raise self._other_buckets(f"entity {name!r} in bucket {number}")

    def _other_buckets(self, what: str) -> ValueError:
        return ValueError(
            f"table {self.name!r} has {what}, which does not fit {self.buckets} buckets: set TIDEGATE_BUCKETS to the "
            "number that the table was made with"
        )


def _with_ray(join: _Join, shares: Iterator[tuple[_Task, pa.Table]]) -> Iterator[pa.Table]:
    """The answers of the shares, as they come.

    Tasks of Ray itself: Ray Data would add its executor, which takes as long as the join of a million requests, and
    would hold the requests of all tasks in the object store. Here it holds those of two tasks for every CPU.
    """
    import ray

    carried, held = ray.remote(num_cpus=1)(_share), ray.put(join)
    room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
    out: list[Any] = []
    for task, block in shares:
        if len(out) == room:
            done, out = ray.wait(out)
            yield _apart(ray.get(done[0]))
        out.append(carried.remote(held, task, block))
    while out:
        done, out = ray.wait(out)
        yield _apart(ray.get(done[0]))


def _share(join: _Join, task: _Task, block: pa.Table) -> pa.Table:
    return join(task, block)


def _apart(table: pa.Table) -> pa.Table:
    """A copy outside the object store, where the original would keep its room until the join ends."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()
