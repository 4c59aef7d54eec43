"""The first champion: only a version whose gates passed, journalled, and never two."""

from __future__ import annotations

import pytest

from cluster.clock import SystemClock
from cluster.database import Database, StaleEpoch
from serving import routing
from serving.releases import ReleaseError, adopt_first


@pytest.fixture
def database(tmp_path) -> Database:
    found = Database(f"sqlite:///{tmp_path}/control.db")
    found.create()
    return found


def test_without_a_release_request_nothing_is_adopted_and_the_error_says_what_to_run(database):
    with pytest.raises(ReleaseError, match=r"python -m pipelines\.train aqua"):
        adopt_first("aqua", database, SystemClock())
    assert routing.read(database, "aqua") is None


def test_the_oldest_requested_version_becomes_champion_and_the_journal_says_why(database):
    database.request_release("aqua", "3", {"gates": ["beats_last_week"]}, 1)
    database.request_release("aqua", "4", {"gates": []}, 2)
    table = adopt_first("aqua", database, SystemClock())
    assert table.champion == "3"
    (entry,) = database.journal("aqua")
    assert (entry.kind, entry.payload) == ("champion_adopted", {"version": "3", "gates": ["beats_last_week"]})
    assert adopt_first("aqua", database, SystemClock()) == table


def test_a_second_writer_of_the_routing_table_is_fenced(database):
    first = routing.publish(database, "aqua", None, champion="1")
    second = routing.publish(database, "aqua", first, champion="2")
    assert second.epoch > first.epoch
    with pytest.raises(StaleEpoch):
        routing.publish(database, "aqua", first, champion="3")
    assert routing.read(database, "aqua") == second
