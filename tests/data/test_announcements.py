"""Releases and tests told to a webhook: from the journal, in order, whoever is killed and whoever is away."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from cluster.database import Database
from cluster.notifications import NotificationFailed, Webhook
from serving.rollout.announcements import Announcer
from serving.rollout.journal import Journal, replay
from serving.rollout.machine import Kind
from tests.data.rollout_play import APPROVED, CAUTIOUS, SHADOWED, STEPS, STORIES, FakeWorld, Play
from tests.receiver import Receiver, receiving

SILENT = {
    *(Kind.READY, Kind.EVIDENCE, Kind.LABELS, Kind.SKEW, Kind.WITHDRAWN, Kind.TEST_RESULTS),
    *(Kind.PROMOTION_BEGUN, Kind.LOADING, Kind.LOADED),
}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def database(tmp_path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/control.db")
    made.create()
    yield made
    made.close()


def play_of(database: Database, use_case=CAUTIOUS) -> Play:
    return Play(FakeWorld(open=["1"]), Journal(database, "aqua"), use_case=use_case)


def news(database: Database) -> bool:
    """Whether there is anything that was not told yet."""
    told = database.told("aqua/rollout")
    return told is not None and any(entry.kind not in SILENT for entry in Journal(database, "aqua").read(told))


def texts(receiver: Receiver) -> list[str]:
    return [document["text"] for document in receiver.told]


def test_every_change_of_a_release_is_told_in_a_line_with_who_and_why(receiver, database, caplog):
    announcer = Announcer("aqua", database, Webhook(receiver.url))
    announcer.begin()
    play = play_of(database)
    with caplog.at_level(logging.INFO, "serving.rollout.controller"):
        for step in ["settle", *APPROVED, "revert", "ask", "settle", "copies", "wait", "settle", "errors", "settle"]:
            STEPS[step](play)
    assert announcer.turn() == len(receiver.told)
    assert announcer.turn() == 0
    told = texts(receiver)
    assert told[:3] == [
        "aqua: version 1 is the first champion",
        "aqua: rollout 1 of version 2 begins beside champion 1 (shadow, then shares of 0.1, 0.5) by asker",
        "aqua: version 2 answers a share of 0.1: the stage is complete",
    ]
    assert "aqua: rollout 1 of version 2 is approved by someone: because 1" in told
    assert "aqua: version 2 is champion in place of 1" in told
    assert "aqua: version 1 answers again in place of 2 by someone: because 2" in told
    assert told[-1].startswith("aqua: version 3 is withdrawn; champion 1 answers: ")
    assert [record.getMessage() for record in caplog.records] == told, "the log tells the same"
    last = receiver.told[-1]
    assert last["change"] == Kind.ROLLED_BACK
    assert (last["release"]["usecase"], last["release"]["champion"], last["release"]["tried"]) == ("aqua", "1", ["3"])


@pytest.mark.parametrize("story", STORIES, ids=lambda story: "-".join(story)[-60:])
def test_whoever_is_killed_or_away_all_is_told_once_and_in_order(receiver, database, story):
    whole = Announcer("aqua", database, Webhook(receiver.url))
    whole.begin()
    play = play_of(database)
    for number, step in enumerate(["settle", *story, "settle"]):
        STEPS[step](play)
        receiver.status = 500 if number % 3 == 1 else 200
        announcer = Announcer("aqua", database, Webhook(receiver.url))  # by a controller that was made again
        if receiver.status == 200 or not news(database):
            announcer.turn()
        else:
            with pytest.raises(NotificationFailed):
                announcer.turn()
    receiver.status = 200
    Announcer("aqua", database, Webhook(receiver.url)).turn()
    told, receiver.told = receiver.told, []
    sequences = [document["release"]["sequence"] for document in told]
    entries = Journal(database, "aqua").read()
    assert sequences == [entry.sequence for entry in entries if entry.kind not in SILENT]
    whole.turn()
    assert receiver.told == told, "one that was there all the time tells the same"


def test_what_was_journalled_before_anybody_was_to_be_told_is_not_told(receiver, database):
    play = play_of(database)
    for step in [*SHADOWED, "abort", "settle"]:
        STEPS[step](play)
    announcer = Announcer("aqua", database, Webhook(receiver.url))
    assert announcer.turn() == 0
    for step in ["ask", "settle"]:
        STEPS[step](play)
    assert Announcer("aqua", database, Webhook(receiver.url)).turn() == 1
    assert texts(receiver)[0].startswith("aqua: rollout 2 of version 3 begins beside champion 1")


def test_the_situation_after_any_entry_is_that_of_a_replay_up_to_it(database):
    play = play_of(database)
    for step in ["settle", *APPROVED, "revert", "test", "settle", "even", "abort", "settle", "ask", "settle", "abort"]:
        STEPS[step](play)
    entries = play.journal.read()
    for count in range(len(entries) + 1):
        found, whole = play.journal.situation(until=count), replay(entries[:count])
        assert (found.state, found.sequence) == (whole.state, whole.sequence)
