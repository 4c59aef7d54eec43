"""Records of many callers in one transaction of the log: each gets its own sequences, and its own failure."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from cluster import group_commit
from cluster.group_commit import GroupCommit
from cluster.log import LogFull, Record
from tests.backends import open_log
from tests.data.logs import REMEMBER, Ticking, small


@pytest.fixture
def log(place):
    log = open_log(place, remember_us=REMEMBER)
    yield log
    log.close()


def test_many_threads_get_each_their_own_sequences(log):
    projected: list[int] = []
    group = GroupCommit(log, Ticking(), lambda: projected.append(log.last("events")))
    answers: dict[int, list[Future]] = {}

    def work(number):
        answers[number] = [group.submit("events", [Record(None, b"%d-%d" % (number, i))]) for i in range(100)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    where = {answers[n][i].result(30)[0]: b"%d-%d" % (n, i) for n in range(8) for i in range(100)}
    assert {record.sequence: record.value for record in log.read("events", 0)} == where
    assert sorted(where) == list(range(1, 801))
    assert projected[-1] == 800
    group.close()
    assert group.waiting == 0


def test_one_bad_submission_fails_alone(log):
    entered, go = threading.Event(), threading.Event()
    group = GroupCommit(log, Ticking(), lambda: (entered.set(), go.wait(30)))
    first = group.submit("events", [Record(None, b"first")])
    entered.wait(30)  # the next three wait together and go into one transaction
    good, bad, other = (group.submit("events", [Record(None, value)]) for value in (b"a", "text", b"b"))
    go.set()
    assert [f.result(30) for f in (first, good, other)] == [[1], [2], [3]]
    assert isinstance(bad.exception(30), TypeError)
    group.close()


def test_a_submission_too_big_for_the_log_fails_alone(place):
    log, too_much = small(place)
    entered, go = threading.Event(), threading.Event()
    group = GroupCommit(log, Ticking(), lambda: (entered.set(), go.wait(30)))
    group.submit("events", [])
    entered.wait(30)
    good = group.submit("events", [Record(None, b"a")])
    big = group.submit("events", too_much)
    go.set()
    assert good.result(30) == [1]
    assert isinstance(big.exception(30), LogFull)
    group.close()
    log.close()


def test_a_future_resolves_only_after_the_projection(log):
    entered, go = threading.Event(), threading.Event()
    group = GroupCommit(log, Ticking(), lambda: (entered.set(), go.wait(30)))
    future = group.submit("events", [Record(b"a", b"a")])
    entered.wait(30)
    assert log.last("events") == 1
    assert not future.done()
    go.set()
    assert future.result(30) == [1]
    group.close()


def test_a_failed_projection_fails_its_group_and_a_retry_finds_the_record(log):
    failures = [OSError("state is gone"), None, None]

    def project():
        if (error := failures.pop(0)) is not None:
            raise error

    group = GroupCommit(log, Ticking(), project)
    with pytest.raises(OSError, match="state is gone"):
        group.submit("events", [Record(b"a", b"a")]).result(30)
    assert group.submit("events", [Record(b"a", b"a")]).result(30) == [None]
    assert group.submit("events", [Record(b"b", b"b")]).result(30) == [2]
    group.close()


def test_the_queue_is_bounded_in_records(log):
    entered, go = threading.Event(), threading.Event()
    group = GroupCommit(log, Ticking(), lambda: (entered.set(), go.wait(30)), max_waiting=5)
    first = group.submit("events", [Record(None, b"a")] * 3)
    entered.wait(30)
    second = group.submit("events", [Record(None, b"b")] * 2)
    with pytest.raises(LogFull, match="6 records would wait for the log, at most 5 may"):
        group.submit("events", [Record(None, b"c")])
    go.set()
    assert (first.result(30), second.result(30)) == ([1, 2, 3], [4, 5])
    group.close()


def test_close_writes_what_waits_and_then_takes_no_more(log):
    group = GroupCommit(log, Ticking())
    for _ in range(50):
        group.submit_quiet("predictions", [Record(None, b"p")])
    group.close()
    assert log.last("predictions") == 50
    with pytest.raises(RuntimeError, match="closed"):
        group.submit("predictions", [])


@pytest.fixture
def patient(monkeypatch):
    """What lingers does so until something else ends it."""
    monkeypatch.setattr(group_commit, "_LINGER_S", 600.0)


@pytest.mark.usefixtures("patient")
def test_records_that_nobody_waits_for_share_a_transaction_and_are_not_projected(log):
    clock, projected = Ticking(), []
    group = GroupCommit(log, clock, lambda: projected.append(log.last("predictions")))
    began = clock.now()
    for _ in range(50):
        group.submit_quiet("predictions", [Record(None, b"p")])
        time.sleep(0.001)
    group.close()
    assert log.last("predictions") == 50
    assert clock.now() - began == 2  # it is asked once a transaction, and here
    assert not projected


@pytest.mark.usefixtures("patient")
def test_a_record_that_somebody_waits_for_takes_along_what_lingers(log):
    projected = []
    group = GroupCommit(log, Ticking(), lambda: projected.append(log.last("predictions")))
    for expected in range(1, 30):
        group.submit_quiet("predictions", [Record(None, b"p")])
        assert group.submit("events", [Record(None, b"e")]).result(30) == [expected]
        assert log.last("predictions") == expected
    group.close()
    assert projected == list(range(1, 30))


def test_a_quiet_failure_is_logged(log, caplog):
    group = GroupCommit(log, Ticking())
    group.submit_quiet("predictions", [Record(None, "text")])
    group.close()
    assert "1 records of stream 'predictions'" in caplog.text


def test_a_cancelled_submission_is_not_written(log):
    entered, go = threading.Event(), threading.Event()
    group = GroupCommit(log, Ticking(), lambda: (entered.set(), go.wait(30)))
    group.submit("events", [Record(None, b"a")])
    entered.wait(30)
    assert group.submit("events", [Record(None, b"b")]).cancel()
    go.set()
    group.close()
    assert [record.value for record in log.read("events", 0)] == [b"a"]
