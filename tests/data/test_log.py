"""Both durable logs against a list-and-dict oracle: sequences, duplicates, generations, trims, reopening."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.log import DurableLog, Log, LogFull, LogRecord, LogUnavailable, Record
from cluster.redis_log import RedisLog
from tests.backends import open_log
from tests.data.logs import REMEMBER, small

STREAMS = st.sampled_from(["events", "quarantine", "é"])
RECORDS = st.lists(
    st.tuples(st.none() | st.integers(0, 12).map(lambda i: b"identity%d" % i), st.binary(max_size=6)), max_size=8
)


class LogMachine(RuleBasedStateMachine):
    """The oracle keeps every identity with the time it was remembered at.

    Between ``REMEMBER`` and one and a half times that, an identity may or may not be remembered; the
    oracle then follows the log, and holds it to its word at every other age.
    """

    def __init__(self, place: str, name: str) -> None:
        super().__init__()
        self.place, self.name = place, name
        self.log = open_log(place, name, remember_us=REMEMBER)
        self.kept: dict[str, list[LogRecord]] = {}
        self.last: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.remembered: dict[tuple[str, bytes], int] = {}
        self.now = self.latest = 1_000

    @rule(step=st.integers(-30, 30) | st.integers(30, 400))
    def time_passes(self, step):
        self.now = max(1, self.now + step)

    @rule(batches=st.lists(st.tuples(STREAMS, RECORDS), min_size=1, max_size=3))
    def append(self, batches):
        self.latest = max(self.latest, self.now)
        with self.log.transaction(self.now) as txn:
            answers = [
                (stream, records, txn.append(stream, [Record(*r) for r in records])) for stream, records in batches
            ]
        for stream, records, answer in answers:
            self._check(stream, records, answer)

    def _check(self, stream, records, answer):
        assert len(answer) == len(records)
        known_at = max(self.now, self.known.get(stream, 0))
        for (identity, value), sequence in zip(records, answer, strict=True):
            if identity is not None:
                age = self.latest - self.remembered.get((stream, identity), -(10**9))
                if age <= REMEMBER:
                    assert sequence is None
                if age > REMEMBER * 3 // 2:
                    assert sequence is not None
            if sequence is None:
                assert identity is not None
                continue
            if identity is not None:
                self.remembered[stream, identity] = self.latest
            self.last[stream] = self.last.get(stream, 0) + 1
            assert sequence == self.last[stream]
            self.known[stream] = known_at
            self.kept.setdefault(stream, []).append(LogRecord(sequence, known_at, value))

    @rule(stream=STREAMS, numbers=st.lists(st.integers(0, 12), max_size=4))
    def remember(self, stream, numbers):
        self.latest = max(self.latest, self.now)
        identities = [b"identity%d" % number for number in numbers]
        with self.log.transaction(self.now) as txn:
            new = txn.remember(stream, identities)
        assert len(new) == len(identities)
        self.remembered |= {
            (stream, identity): self.latest for identity, was in zip(identities, new, strict=True) if was
        }

    @rule(stream=STREAMS, records=RECORDS)
    def abort(self, stream, records):
        def failing():
            with self.log.transaction(self.now) as txn:
                txn.append(stream, [Record(*record) for record in records])
                _ = 1 / 0

        with pytest.raises(ZeroDivisionError):
            failing()

    @precondition(lambda self: any(self.kept.values()))
    @rule(data=st.data())
    def trim(self, data):
        stream = data.draw(st.sampled_from(sorted(s for s, kept in self.kept.items() if kept)))
        through = data.draw(st.integers(self.kept[stream][0].sequence - 1, self.last[stream]))
        self.log.trim(stream, through)
        self.kept[stream] = [record for record in self.kept[stream] if record.sequence > through]

    @rule()
    def reopen(self):
        self.log.close()
        self.log = open_log(self.place, self.name, remember_us=REMEMBER)

    @rule(stream=STREAMS, after=st.integers(0, 40), limit=st.none() | st.integers(0, 5))
    def read(self, stream, after, limit):
        expected = [record for record in self.kept.get(stream, []) if record.sequence > after]
        assert self.log.read(stream, after, limit) == expected[:limit]

    @invariant()
    def counts_agree(self):
        for stream, last in self.last.items():
            kept = self.kept.get(stream, [])
            assert self.log.last(stream) == last
            assert self.log.read(stream, 0) == kept
            assert self.log.pending(stream) == len(kept)
            assert self.log.first(stream) == (kept[0].sequence if kept else last + 1)

    def teardown(self):
        self.log.close()


def test_the_log_does_what_a_list_and_a_dict_would(place):
    numbers = itertools.count()
    steps = settings(max_examples=40, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(lambda: LogMachine(place, f"log{next(numbers)}"), settings=steps)


@pytest.fixture
def log(place):
    log = open_log(place, remember_us=REMEMBER)
    yield log
    log.close()


def append(log: Log, now: int, *records: Record) -> list[int | None]:
    with log.transaction(now) as txn:
        return txn.append("events", records)


def test_an_unknown_format_is_an_error_that_says_so(log):
    append(log, 1, Record(None, b"a"))
    if isinstance(log, RedisLog):
        log.trim("events", 1)
        fields = {"format": 9, "known_at": 1, "value": b"a"}
        log._server.client.xadd(log._records("events"), fields, "2-0")
        where = "record 2 of stream 'events'"
    else:
        with log._env.begin(write=True) as raw:
            key, blob = next(iter(raw.cursor(log._records)))
            raw.put(key, b"\x09" + blob[1:], db=log._records)
        where = "record 1 of stream 'events'"
    with pytest.raises(ValueError, match=where + ".* has format 9; this code reads format 1"):
        log.read("events", 0)


def test_known_at_never_goes_back_along_a_stream(log):
    for now in (7, 5, 9):
        append(log, now, Record(None, b"a"))
    with log.transaction(6) as txn:
        txn.append("others", [Record(None, b"a")])
    assert [record.known_at_us for record in log.read("events", 0)] == [7, 7, 9]
    assert [record.known_at_us for record in log.read("others", 0)] == [6]


def test_a_clock_that_goes_back_forgets_nothing_early(log):
    for now in (1_000, 1_060, 1_110, 1_160, 1_140):
        append(log, now, Record(b"%d" % now, b""))
    # the last identity came in when 1160 had been seen
    assert append(log, 1_255, Record(b"1140", b"")) == [None]


def test_trimming_beyond_the_end_is_refused_and_trims_nothing(log):
    with pytest.raises(ValueError, match="ends at 0"):
        log.trim("events", 1)
    append(log, 1, Record(None, b"a"))
    with pytest.raises(ValueError, match="ends at 1"):
        log.trim("events", 2)
    assert (log.first("events"), log.last("events"), len(log.read("events", 0))) == (1, 1, 1)


@pytest.mark.parametrize("record", [Record("text", b""), Record(None, "text"), Record(None, None)])
def test_what_is_not_bytes_is_refused_before_anything_is_written(log, record):
    with log.transaction(1) as txn:
        with pytest.raises(TypeError, match="must be bytes"):
            txn.append("events", [Record(b"good", b"good"), record])
        answer = txn.append("events", [Record(b"good", b"again")])
    assert answer == [1]


@pytest.mark.parametrize("name", ["", "x" * 401])
def test_a_stream_has_a_name_of_bounded_length(log, name):
    with pytest.raises(ValueError, match="1 to 400 bytes"), log.transaction(1) as txn:
        txn.append(name, [Record(None, b"")])


def test_a_full_log_is_a_clear_error_and_is_usable_afterwards(place):
    log, too_much = small(place)
    with pytest.raises(LogFull, match="let it drain"):
        append(log, 1, *too_much)
    assert append(log, 1, Record(b"a", b"x"), Record(b"a", b"x")) == [1, None]
    log.close()


def until_full(log: Log, record: Record, each: Callable[[], object] = lambda: None) -> None:
    for _ in range(10_000):
        append(log, 1, *[record] * 10)
        each()


def test_the_file_grows_ahead_of_its_pages_and_never_beyond_its_bound(tmp_path):
    bound = 4 << 20
    log, sizes, ahead = DurableLog(tmp_path, remember_us=REMEMBER, map_bytes=bound), [], []

    def look() -> None:
        sizes.append((tmp_path / "data.mdb").stat().st_size)
        ahead.append(sizes[-1] - (log._env.info()["last_pgno"] + 1) * 4096)

    with pytest.raises(LogFull, match="let it drain"):
        until_full(log, Record(None, bytes(1_000)), look)
    assert max(sizes) <= bound
    assert sum(room > 0 for room in ahead) > len(ahead) / 2
    log.close()


def test_a_file_that_cannot_grow_goes_on_in_the_pages_that_were_trimmed(tmp_path):
    log, record, file = DurableLog(tmp_path, remember_us=REMEMBER), Record(None, bytes(1_000)), tmp_path / "data.mdb"
    size = used = 0
    while used < 1 << 20 or size - used >= used // 16:  # the next transaction wants the file to grow
        append(log, 1, record)
        size, used = file.stat().st_size, (log._env.info()["last_pgno"] + 1) * 4096
    last, before = log.last("events"), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.trim("events", last - 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, before[1]))
    try:
        assert [append(log, 1, record) for _ in range(20)] == [[last + place] for place in range(1, 21)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [kept.sequence for kept in log.read("events", 0)] == list(range(last, last + 21))
    log.close()


def test_a_full_disk_refuses_with_what_to_do_and_takes_records_again_once_there_is_room(tmp_path):
    log, before = DurableLog(tmp_path, remember_us=REMEMBER), resource.getrlimit(resource.RLIMIT_FSIZE)
    append(log, 1, Record(None, b"first"))
    for room in (0, 3 * 4096 + 100):  # no room at all, and a write that is cut short
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "data.mdb").stat().st_size + room, before[1]))
        try:
            with pytest.raises(LogUnavailable, match=r"the disk refuses the log .* Make room there"):
                append(log, 1, Record(None, bytes(100_000)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert append(log, 1, Record(None, b"second")) == [2]
    assert [kept.value for kept in log.read("events", 0)] == [b"first", b"second"]
    log.close()


def test_a_shorter_memory_than_before_still_forgets(place):
    log = open_log(place, remember_us=1_000_000)
    for now in (1, 600_000, 1_100_000):
        append(log, now, Record(b"%d" % now, b""))
    log.close()
    log = open_log(place, remember_us=10)
    assert append(log, 1_600_000, Record(b"1100000", b"")) == [None]
    assert append(log, 4_000_000, Record(b"1100000", b""), Record(b"1", b"")) == [4, 5]
    log.close()


def test_a_path_is_opened_once_per_process(tmp_path):
    log = DurableLog(tmp_path, remember_us=REMEMBER)
    with pytest.raises(lmdb.Error):
        DurableLog(tmp_path, remember_us=REMEMBER)
    log.close()
