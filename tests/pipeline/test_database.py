"""The control plane's database, the same on SQLite and on a real PostgreSQL, also when processes race."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from cluster.database import Database, JournalEntry, Load, ReleaseRequest, Routing, StaleEpoch, StaleJournal
from cluster.schema import METADATA
from tests import services

SECOND = 1_000_000


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    with services.postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/not/there/yet/control.db"
        return
    server = request.getfixturevalue("postgresql")
    yield server
    engine = sa.create_engine(server.replace("postgresql:", "postgresql+psycopg:"))
    METADATA.drop_all(engine)
    engine.dispose()


@pytest.fixture
def database(url) -> Iterator[Database]:
    database = Database(url)
    database.create()
    yield database
    database.close()


def _race(worker, count, *arguments):
    """Run ``worker(*arguments, number, start, answers)`` in ``count`` processes at once; their answers."""
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(count), context.Queue()
    children = [context.Process(target=worker, args=(*arguments, n, start, answers)) for n in range(count)]
    for child in children:
        child.start()
    found = [answers.get(timeout=120) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    return found


def _create(url, number, start, answers):
    database = Database(url)
    start.wait()
    database.create()
    for i in range(20):
        database.append_journal("aqua", "step", {"from": number, "i": i}, i)
    answers.put(number)


def test_processes_may_create_and_write_at_once(url):
    _race(_create, 2, url)
    database = Database(url)
    entries = database.journal("aqua")
    assert [entry.sequence for entry in entries] == list(range(1, 41))
    for number in range(2):
        mine = [entry.payload["i"] for entry in entries if entry.payload["from"] == number]
        assert mine == list(range(20))
    database.close()


def test_creating_again_keeps_what_is_there(database):
    database.append_journal("aqua", "step", {}, 1)
    database.create()
    assert len(database.journal("aqua")) == 1


def test_a_load_begun_again_keeps_its_first_moment(database):
    first = database.begin_load("load", "aqua", "aqua/events", 100)
    assert first == Load("load", "aqua", "aqua/events", 100, "begun", None)
    assert database.begin_load("load", "aqua", "aqua/events", 200) == first
    assert database.load("load") == first
    assert database.load("other") is None


def test_a_load_id_belongs_to_one_table(database):
    database.begin_load("load", "aqua", "aqua/events", 100)
    with pytest.raises(ValueError, match="give this one another id"):
        database.begin_load("load", "prop", "prop/events", 100)


def test_a_load_ends_once(database):
    database.begin_load("load", "aqua", "aqua/events", 100)
    database.finish_load("load", "published", {"rows_in": 3})
    database.finish_load("load", "published", {"rows_in": 4})
    load = database.begin_load("load", "aqua", "aqua/events", 300)
    assert (load.status, load.manifest, load.as_of_us) == ("published", {"rows_in": 3}, 100)
    with pytest.raises(ValueError, match="ended as 'published'"):
        database.finish_load("load", "refused", {})
    with pytest.raises(KeyError, match="never begun"):
        database.finish_load("other", "published", {})


def test_loads_are_listed_by_use_case_and_time(database):
    for load_id, usecase, moment in (("b", "aqua", 2), ("a", "aqua", 3), ("c", "prop", 1), ("d", "aqua", 1)):
        database.begin_load(load_id, usecase, "t", moment)
    assert [load.load_id for load in database.loads("aqua")] == ["d", "b", "a"]


def test_a_lease_excludes_others_until_it_expires_or_is_given_back(database):
    assert database.acquire_lease("drain", "a", 10, now_us=0)
    assert not database.acquire_lease("drain", "b", 10, now_us=10 * SECOND - 1)
    assert database.acquire_lease("drain", "a", 10, now_us=5 * SECOND)  # renewed until 15
    assert not database.acquire_lease("drain", "b", 10, now_us=15 * SECOND - 1)
    assert database.acquire_lease("drain", "b", 10, now_us=15 * SECOND)
    database.release_lease("drain", "a")  # not a's any more
    assert not database.acquire_lease("drain", "a", 10, now_us=16 * SECOND)
    database.release_lease("drain", "b")
    assert database.acquire_lease("drain", "a", 10, now_us=16 * SECOND)
    assert database.acquire_lease("another", "b", 10, now_us=16 * SECOND)


def test_a_lease_of_no_length_is_refused(database):
    with pytest.raises(ValueError, match="more than 0 seconds"):
        database.acquire_lease("drain", "a", 0, now_us=0)


def _grab(url, number, start, answers):
    database = Database(url)
    start.wait()
    answers.put(database.acquire_lease("drain", f"holder {number}", 60, now_us=1))


def test_of_racing_processes_one_gets_the_lease(url, database):
    assert sorted(_race(_grab, 3, url)) == [False, False, True]


def test_a_version_is_requested_once(database):
    assert database.request_release("aqua", "1", {"gates": "passed"}, 10)
    assert not database.request_release("aqua", "1", {"gates": "other"}, 11)
    assert database.request_release("prop", "1", {}, 12)
    claimed = database.claim_release("aqua", "a", 5, 20)
    assert claimed is not None
    assert claimed == ReleaseRequest("aqua", "1", {"gates": "passed"}, 10, claimed.sequence)


def test_requests_are_claimed_in_order_and_by_one_holder(database):
    for version in ("9", "10"):
        database.request_release("aqua", version, {}, 1)
    assert database.claim_release("aqua", "a", 10, 0).version == "9"
    assert database.claim_release("aqua", "b", 10, 5 * SECOND) is None
    assert database.claim_release("aqua", "a", 10, 5 * SECOND).version == "9"
    assert database.claim_release("aqua", "b", 10, 15 * SECOND).version == "9"
    database.finish_release("aqua", "9", "promoted")
    assert database.claim_release("aqua", "a", 10, 16 * SECOND).version == "10"
    database.finish_release("aqua", "10", "rolled back")
    assert database.claim_release("aqua", "a", 10, 17 * SECOND) is None
    assert not database.request_release("aqua", "9", {}, 18 * SECOND)


def test_finishing_what_was_never_requested_is_an_error(database):
    with pytest.raises(KeyError, match="version '1' of 'aqua'"):
        database.finish_release("aqua", "1", "promoted")
    with pytest.raises(ValueError, match="'open' is no end"):
        database.finish_release("aqua", "1", "open")


def test_a_routing_table_is_replaced_only_by_who_read_it(database):
    assert database.routing("aqua") is None
    with pytest.raises(StaleEpoch, match="epoch None, not 1"):
        database.put_routing("aqua", 1, {})
    assert database.put_routing("aqua", None, {"champion": "1"}) == 1
    with pytest.raises(StaleEpoch, match="epoch 1, not None"):
        database.put_routing("aqua", None, {"champion": "2"})
    assert database.put_routing("aqua", 1, {"champion": "2"}) == 2
    with pytest.raises(StaleEpoch, match="epoch 2, not 1"):
        database.put_routing("aqua", 1, {"champion": "3"})
    assert database.routing("aqua") == Routing(2, {"champion": "2"})


def _advance(url, number, start, answers):
    database, won = Database(url), 0
    start.wait()
    while (routing := database.routing("aqua")).epoch < 30:
        try:
            database.put_routing("aqua", routing.epoch, {"writes": routing.document["writes"] + 1})
            won += 1
        except StaleEpoch:
            continue
    answers.put(won)


def test_racing_controllers_lose_no_routing_table(url, database):
    database.put_routing("aqua", None, {"writes": 0})
    assert sum(_race(_advance, 2, url)) == 29
    assert database.routing("aqua") == Routing(30, {"writes": 29})


def test_the_journal_keeps_order_per_use_case(database):
    assert database.append_journal("aqua", "started", {"a": [1, None, "ü"]}, 5) == 1
    assert database.append_journal("prop", "started", {}, 6) == 1
    assert database.append_journal("aqua", "ended", {}, 4) == 2
    assert database.journal("aqua") == [
        JournalEntry(1, "started", {"a": [1, None, "ü"]}, 5),
        JournalEntry(2, "ended", {}, 4),
    ]


def test_a_journal_takes_an_entry_only_after_the_one_its_writer_saw(database):
    assert database.append_journal("aqua", "started", {}, 1, expected=0) == 1
    for seen in (0, 2):
        with pytest.raises(StaleJournal, match="read it again"):
            database.append_journal("aqua", "ended", {}, 2, expected=seen)
    assert database.append_journal("aqua", "ended", {}, 2, expected=1) == 2
    assert [entry.kind for entry in database.journal("aqua", after=1)] == ["ended"]


def test_live_leases_are_listed_below_their_prefix(database):
    for name, seconds in (
        ("gateway/aqua/a", 10),
        ("gateway/aqua/b", 1),
        ("gateway/prop/c", 10),
        ("gateway_aqua/d", 10),
    ):
        assert database.acquire_lease(name, "me", seconds, 0)
    assert database.live_leases("gateway/aqua/", 2 * SECOND) == ["a"]
    assert database.live_leases("gateway/aqua/", 0) == ["a", "b"]
    assert database.live_leases("gateway_", 0) == ["aqua/d"]


def test_a_release_that_ended_is_asked_for_again_only_on_purpose(database):
    assert database.request_release("aqua", "1", {}, 1)
    assert not database.request_release("aqua", "1", {}, 2, again=True)
    database.finish_release("aqua", "1", "rolled_back")
    assert not database.request_release("aqua", "1", {}, 3)
    assert database.request_release("aqua", "1", {"why": "mended"}, 4, again=True)
    claimed = database.claim_release("aqua", "me", 10, 5)
    assert claimed == ReleaseRequest("aqua", "1", {"why": "mended"}, 4, claimed.sequence if claimed else 0)


def test_closing_one_request_leaves_a_later_one_of_the_same_version_open(database):
    database.request_release("aqua", "1", {}, 1)
    first = database.claim_release("aqua", "me", 10, 0)
    assert first is not None
    database.finish_release("aqua", "1", "rolled_back", first.sequence)
    database.request_release("aqua", "1", {}, 2, again=True)
    database.finish_release("aqua", "1", "rolled_back", first.sequence)
    assert database.open_releases("aqua") == ["1"]


def test_the_last_entry_of_a_kind_is_found(database):
    for kind in ("a", "b", "a", "b", "c"):
        database.append_journal("aqua", kind, {}, 1)
    found = database.last_entry("aqua", "a")
    assert found is not None
    assert found.sequence == 3
    assert database.last_entry("aqua", "d") is None


def test_an_error_inside_a_write_leaves_nothing_behind(database):
    def failing():
        with database.write() as connection:
            connection.execute(sa.text("INSERT INTO leases (name, holder, expires_us) VALUES ('x', 'y', 1)"))
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        failing()
    assert database.acquire_lease("x", "z", 1, 0)


def test_it_pickles_as_its_url(url, database):
    database.append_journal("aqua", "step", {}, 1)
    again = pickle.loads(pickle.dumps(database))  # noqa: S301
    assert again.url == url
    assert len(again.journal("aqua")) == 1
    again.close()


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/d", "sqlite://", "sqlite:///:memory:"], ids=str)
def test_other_databases_are_refused_without_showing_passwords(url):
    with pytest.raises(ValueError, match="is neither a SQLite file") as caught:
        Database(url)
    assert "hunter2" not in str(caught.value)
