"""What only a server can do to log and state: restart, lose an answer, refuse, fill up, or not keep its word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
import redis

from cluster import session
from cluster.clock import SystemClock
from cluster.group_commit import GroupCommit
from cluster.log import LogFull, LogUnavailable, Record
from cluster.redis_log import RedisLog
from pipelines.features.online import OnlineState
from pipelines.features.state import StateError
from pipelines.features.stores import StateUnavailable, StoreFull, Transaction
from pipelines.features.stores.redis import RedisStore
from tests import services
from tests.backends import HOUR
from tests.data.worlds import BASE
from tests.pipeline.test_online_state import bulk, record, use_case, write


@pytest.fixture
def server() -> Iterator[services.RedisServer]:
    """A server that the test may kill and configure."""
    with services.redis() as started:
        yield started


def open_log(server: services.RedisServer, **options: Any) -> RedisLog:
    return RedisLog(server.url, "meter", remember_us=HOUR, **options)


def append(log: RedisLog, *records: Record) -> list[int | None]:
    with log.transaction(1) as txn:
        return txn.append("events", records)


def losing_answers(ask: Callable[..., Any], times: int) -> Callable[..., Any]:
    """``ask``, whose first answers get lost on their way although the server has done what it was asked."""

    def run(*arguments: Any) -> Any:
        nonlocal times
        answer = ask(*arguments)
        times -= 1
        if times >= 0:
            raise redis.ConnectionError("the connection was reset")
        return answer

    return run


def test_a_server_killed_and_restarted_under_load_loses_and_doubles_no_acknowledged_record(
    server: services.RedisServer,
) -> None:
    logs = [open_log(server), open_log(server)]
    groups = [GroupCommit(log, SystemClock()) for log in logs]
    acknowledged: list[bytes] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def load(name: int) -> None:
        number = 0
        while not stop.is_set():
            value = b"%d-%d" % (name, number)
            # Without an identity nothing but the log itself can keep a repetition from being a second record.
            error = groups[name % 2].submit("events", [Record(None, value), Record(value, value + b"+")]).exception()
            if error is not None:
                failures.append(error)
                return
            acknowledged.extend((value, value + b"+"))
            number += 1

    threads = [threading.Thread(target=load, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.3)
        server.kill()
        time.sleep(0.1)
        server.start()
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    for group in groups:
        group.close()
    assert not failures
    records = logs[0].read("events", 0)
    values = [r.value for r in records]
    assert [r.sequence for r in records] == list(range(1, len(records) + 1))
    assert len(values) == len(set(values))
    assert set(acknowledged) == set(values)
    assert len(acknowledged) > 100


def test_a_transaction_whose_answer_was_lost_is_written_once(server: services.RedisServer) -> None:
    log = open_log(server)
    log._commit = losing_answers(log._commit, 3)
    assert append(log, Record(None, b"a"), Record(b"b", b"b")) == [1, 2]
    assert [r.value for r in log.read("events", 0)] == [b"a", b"b"]


def test_a_repetition_that_comes_after_the_next_transaction_changes_nothing(server: services.RedisServer) -> None:
    log = open_log(server)
    sent: list[Any] = []
    commit = log._commit
    log._commit = lambda *arguments: (sent.append(arguments), commit(*arguments))[1]
    append(log, Record(None, b"a"))
    append(log, Record(None, b"b"))
    with pytest.raises(redis.ResponseError, match="LATE"):
        commit(*sent[0])
    assert [r.value for r in log.read("events", 0)] == [b"a", b"b"]


def test_a_log_that_does_not_answer_fails_the_whole_group_and_nothing_is_written_twice(
    server: services.RedisServer,
) -> None:
    log = open_log(server, patience_s=0.2)
    entered, go = threading.Event(), threading.Event()
    group = GroupCommit(log, SystemClock(), lambda: (entered.set(), go.wait(30)))
    group.submit("events", [])
    entered.wait(30)
    log._commit = losing_answers(log._commit, 10**9)
    futures = [group.submit("events", [Record(None, value)]) for value in (b"a", b"b")]
    go.set()
    for future in futures:
        assert isinstance(future.exception(30), LogUnavailable)
    group.close()
    assert [r.value for r in log.read("events", 0)] == [b"a", b"b"]


def test_a_server_is_reached_by_host_port_password_and_database(server: services.RedisServer) -> None:
    port = session.free_port()
    server.kill()
    server.start("--port", str(port), "--bind", "127.0.0.1")
    server.ask("CONFIG", "SET", "requirepass", "hunter2")
    url = f"redis://:hunter2@127.0.0.1:{port}/3"
    log, state = RedisLog(url, "meter", remember_us=HOUR), OnlineState(url, use_case())
    write(log, [record("a", BASE, 1.0)], BASE)
    assert (state.project(log), state.names()) == (1, ["a"])
    for where in (log.where, state.store.where):
        assert where.startswith(f"redis://127.0.0.1:{port}/3 ")
    ask = redis.Redis(port=port, password="hunter2")
    assert set(ask.info("keyspace")) == {"db3"}
    ask.close()


def test_errors_name_the_server_without_its_password(server: services.RedisServer) -> None:
    # Allowed for as long as the server runs: then it starts again without its users.
    server.ask("ACL", "SETUSER", "gate", "on", ">hunter2", "~*", "+@all")
    url = server.url.replace("unix://", "unix://gate:hunter2@")
    log, store = RedisLog(url, "meter", remember_us=HOUR, patience_s=0.1), RedisStore(url, "meter:1")
    server.kill()
    asked: list[tuple[type[Exception], Callable[[], object]]] = [
        (LogUnavailable, lambda: append(log, Record(None, b"a"))),
        (LogUnavailable, lambda: log.last("events")),
        (StateUnavailable, store.count),
    ]

    def refusals() -> list[str]:
        told = []
        for kind, ask in asked:
            with pytest.raises(kind, match="does not answer: ") as caught:
                ask()
            assert "unix:///" in str(caught.value)
            told.append(repr(caught.value) + repr(caught.value.__cause__))
        return told

    down = refusals()
    server.start()
    unknown = refusals()
    assert all("invalid username-password pair" in told for told in unknown)
    assert "hunter2" not in "".join(down + unknown)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
        ("no-appendfsync-on-rewrite", "yes"),
        ("maxmemory-policy", "allkeys-lru"),
    ],
)
@pytest.mark.parametrize("durability", ["checked", "guaranteed"])
def test_a_server_that_may_lose_what_it_acknowledged_is_refused(
    server: services.RedisServer, option: str, value: str, durability: str
) -> None:
    server.ask("CONFIG", "SET", "maxmemory", "100mb")
    open_log(server).close()
    server.ask("CONFIG", "SET", option, value)
    with pytest.raises(LogUnavailable, match=f"may lose what it acknowledges: {option} {value[:7]}"):
        open_log(server, durability=durability)


def test_a_server_that_comes_back_without_its_log_is_refused_at_once(server: services.RedisServer) -> None:
    log = open_log(server, patience_s=60)
    append(log, Record(None, b"a"))
    server.kill()
    server.start("--appendonly", "no")
    with pytest.raises(LogUnavailable, match="may lose what it acknowledges: appendonly no"):
        append(log, Record(None, b"b"))
    server.kill()
    server.start()
    assert append(log, Record(None, b"b")) == [2]


def test_a_server_that_does_not_show_its_configuration_needs_its_operators_word(server: services.RedisServer) -> None:
    server.ask("ACL", "SETUSER", "default", "-config")
    with pytest.raises(LogUnavailable, match="TIDEGATE_STATE_DURABILITY=guaranteed"):
        open_log(server)
    open_log(server, durability="guaranteed").close()


def test_a_server_without_memory_is_a_full_log_and_a_full_store(server: services.RedisServer) -> None:
    log, store = open_log(server), RedisStore(server.url, "meter:1")
    server.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(LogFull, match="maxmemory"):
        append(log, Record(b"a", b"a"))
    with pytest.raises(StoreFull, match="maxmemory"):
        store.change(lambda txn: txn.put_head(b"head"))
    server.ask("CONFIG", "SET", "maxmemory", "0")
    assert append(log, Record(b"a", b"a")) == [1]
    with store.reading() as snapshot:
        assert snapshot.head is None


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_change_that_another_writer_overtook_is_made_again(server: services.RedisServer, earlier: int) -> None:
    ours, other = RedisStore(server.url, "meter:1"), RedisStore(server.url, "meter:1")
    seen: list[tuple[str, bytes | None, int]] = []

    def count_up(name: str, meanwhile: Callable[[], object]) -> Callable[[Transaction], None]:
        def make(txn: Transaction) -> None:
            (blob,) = txn.get(["a"])
            number = int(bytes(blob or b"0"))
            seen.append((name, txn.head, number))
            meanwhile()
            txn.put(["a"], [b"%d" % (number + 1)])
            txn.put_head(b"after %d" % (number + 1))

        return make

    def overtake() -> None:
        if len(seen) == 1:
            other.change(count_up("other", lambda: None))

    for _ in range(earlier):
        other.change(count_up("other", lambda: None))
    seen.clear()
    ours.change(count_up("ours", overtake))
    before = (b"after 1" if earlier else None, earlier)
    assert seen == [("ours", *before), ("other", *before), ("ours", b"after %d" % (earlier + 1), earlier + 1)]
    with ours.reading(["a"]) as snapshot:
        assert (snapshot.head, list(snapshot.blobs)) == (b"after %d" % (earlier + 2), [b"%d" % (earlier + 2)])


def test_a_gap_that_is_only_another_writers_progress_is_no_error(server: services.RedisServer) -> None:
    log, others_log = open_log(server), open_log(server)
    ours, other = (OnlineState(server.url, use_case()) for _ in range(2))
    write(log, [record("a", BASE, 1.0), record("a", BASE + 1, 2.0)], BASE + 1)
    first, looks = log.first, 0

    def drained_meanwhile(stream: str) -> int:
        nonlocal looks
        looks += 1
        if looks == 1:
            others_log.trim(stream, other.project(others_log))
        return first(stream)

    log.first = drained_meanwhile  # type: ignore[method-assign]
    assert (ours.project(log), looks) == (2, 2)


@pytest.mark.parametrize("moment", ["before it is published", "as it is published"])
def test_a_rebuild_takes_in_what_was_projected_while_it_was_made(server: services.RedisServer, moment: str) -> None:
    log, others_log = open_log(server), open_log(server)
    ours, other = (OnlineState(server.url, use_case()) for _ in range(2))
    assert isinstance(ours.store, RedisStore)
    read, publish, done = log.read, ours.store.publish_script, False

    def others_go_on() -> None:
        nonlocal done
        if not done:
            done = True
            write(others_log, [record("a", BASE, 1.0)], BASE)
            other.project(others_log)

    def read_to_the_end(*arguments: Any) -> Any:
        found = read(*arguments)
        if not found:
            others_go_on()
        return found

    def publish_too_late(*arguments: Any) -> Any:
        others_go_on()
        return publish(*arguments)

    if moment == "before it is published":
        write(log, [record("c", BASE, 1.0)], BASE)
        log.read = read_to_the_end  # type: ignore[method-assign]
    else:
        ours.store.publish_script = publish_too_late
    table: pa.Table = bulk([record("b", BASE, 1.0)])
    ours.materialize(table, 1, log)
    assert done
    assert {"a", "b"} <= set(other.names())
    assert other.position() == (1, others_log.last("events"))


def test_a_stale_rebuild_is_refused_and_leaves_nothing(server: services.RedisServer) -> None:
    log = open_log(server)
    stale, newer = (OnlineState(server.url, use_case()) for _ in range(2))

    def overtaken() -> Iterator[pa.Table]:
        yield bulk([record("old", BASE, 1.0)])
        newer.materialize(bulk([record("new", BASE, 1.0)]), 2, log)
        yield bulk([record("older", BASE, 1.0)])

    with pytest.raises(StateError, match="another rebuild"):
        stale.materialize(overtaken(), 1, log)
    assert (stale.names(), stale.generation(1)) == (["new"], 2)
    assert len(server.ask("--scan", "--pattern", "*:entities:*").split()) == 1


def test_a_published_rebuild_whose_answer_was_lost_stays(server: services.RedisServer) -> None:
    log = open_log(server)
    state = OnlineState(server.url, use_case())
    assert isinstance(state.store, RedisStore)
    state.store.publish_script = losing_answers(state.store.publish_script, 1)
    with pytest.raises(StateUnavailable):
        state.materialize(bulk([record("a", BASE, 1.0)]), 1, log)
    assert (state.names(), state.position()) == (["a"], (1, 0))


def test_state_whose_entities_were_evicted_is_an_error_that_says_to_rebuild(server: services.RedisServer) -> None:
    log = open_log(server)
    state = OnlineState(server.url, use_case())
    state.materialize(bulk([record("a", BASE, 1.0)]), 1, log)
    server.ask("DEL", *server.ask("--scan", "--pattern", "*:entities:*").split())
    with pytest.raises(StateError, match="--materialize"):
        state.bind().read(["a"], BASE)
    state.materialize(bulk([record("b", BASE, 1.0)]), 2, log)
    assert state.names() == ["b"]
