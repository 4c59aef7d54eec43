"""Releases on a real cluster under load: promoted, withdrawn, and with their parts killed; no request ever fails.

Callers try nothing twice, but where a gateway itself is killed: the kernel then resets connections whose request was
not read yet, which no proxy may repeat by itself, and the client does what HTTP asks of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.database import Database
from pipelines.spec import AfterWatch, CanaryStep, ReleasePolicy, Shadow
from pipelines.spec.release import Assignment
from pipelines.training.registry import Registry
from serving.client import Client, TidegateError
from serving.drills import Drill
from serving.rollout.journal import Journal, replay
from serving.rollout.machine import Kind
from serving.wire import RolloutDifferences
from tests.deployment import releasing
from tests.deployment.releasing import (
    INSTANCE,
    Load,
    answering,
    brittle,
    copy,
    finished,
    pids,
    replicas,
    tidegate,
)
from tests.deployment.waiting import until

load, client = releasing.load, releasing.client  # fixtures
NOW = timedelta(0)
QUICK = ReleasePolicy(
    shadow=Shadow(requests=20, time=NOW),
    steps=(CanaryStep(weight=0.5, requests=30, time=NOW),),
    harm_cap=10_000,
    watch=None,
)
WATCHED = QUICK.model_copy(update={"watch": AfterWatch(share=1.0)})
LONG = QUICK.model_copy(update={"steps": (CanaryStep(weight=0.5, requests=1_000_000, time=NOW),)})
CYCLES = 5


def differences(client: Client) -> RolloutDifferences | None:
    try:
        return client.rollout_differences()
    except TidegateError as error:
        if error.status != 404:
            raise
        return None


def went_back(load: Load, version: str) -> bool:
    """Whether for a while every answer is that version's."""
    load.versions.clear()
    time.sleep(0.3)
    return load.versions == {version}


@pytest.mark.timeout(400)
def test_promotions_and_rollbacks_under_load_fail_no_request(demo, client, load):
    for _ in range(CYCLES):
        before = client.rollout().champion
        good = copy(demo, client)
        client.rollout_start(good, policy=QUICK)
        assert finished(client, good) == "promoted"
        status = client.rollout()
        assert (status.champion, status.previous) == (good, before)
        bad = copy(demo, client, Drill(nan=1.0))
        client.rollout_start(bad, policy=QUICK)
        assert finished(client, bad) == "rolled_back"
        status = client.rollout()
        assert (status.champion, status.previous) == (good, before)
        shown = {"champion": good, "previous": before}
        until(lambda: Registry(demo.settings).aliases("aqua") == shown, "MLflow shows it")  # noqa: B023
        assert bad not in load.versions
        until(lambda: good in load.versions, "callers get the new champion")  # noqa: B023
    assert replicas(demo, "aqua-challenger") == []


@pytest.mark.timeout(240)
def test_one_call_takes_the_champion_back_and_withdraws_what_is_being_tried(demo, client, load):
    before, good, tried = client.rollout().champion, copy(demo, client), copy(demo, client)
    client.rollout_start(good, policy=QUICK)
    assert finished(client, good) == "promoted"
    client.rollout_start(tried, policy=LONG)
    answering(client, tried)
    assert client.rollout_command("revert", "it hurts").champion == before

    until(lambda: went_back(load, before), "every gateway answers from the version before", 10)
    assert finished(client, tried) == "aborted"
    status = client.rollout()
    assert (status.champion, status.previous, status.reverted) == (before, None, good)
    until(lambda: Registry(demo.settings).aliases("aqua") == {"champion": before}, "MLflow shows it")
    with pytest.raises(TidegateError, match="no version is kept"):
        client.rollout_command("revert", "once more")


@pytest.mark.timeout(240)
def test_a_promoted_version_is_watched_beside_the_one_before_it_which_answers_again_when_it_hurts(
    demo, client, load, tmp_path
):
    """It is the version before up to 40 degC, so nothing is found against it before the first hot day."""
    before, good = client.rollout().champion, brittle(demo, client, tmp_path)
    client.rollout_start(good, policy=WATCHED)
    assert finished(client, good) == "promoted"
    until(lambda: client.rollout().evidence.copies > 300, "the version before it gets copies", 60)
    status = client.rollout()
    assert (status.phase, status.champion, status.previous) == ("watching", good, before), "it is the same model"
    with pytest.raises(TidegateError, match="409 No version is being tried"):
        client.predict([INSTANCE], variant="challenger")
    hot, answers = [{**INSTANCE, "temperature": 44.0}], []

    def back() -> bool:
        answers.extend(client.predict(hot))
        return answers[-1].model_version == before

    until(back, "the version before answers again on a hot day", 60)
    refused = [answer for answer in answers if answer.model_version == good]
    assert all(answer.value is None and "no_answer" in answer.degraded for answer in refused)
    assert answers[-1].value is not None
    until(lambda: went_back(load, before), "every gateway answers from the version before", 5)
    status = client.rollout()
    assert (status.phase, status.champion, status.previous, status.reverted) == ("idle", before, None, good)
    assert len(refused) < 400, "callers were not hurt for long"


@pytest.mark.timeout(240)
def test_a_tester_chooses_the_version_and_that_is_no_evidence(demo, client):
    champion, version = client.rollout().champion, copy(demo, client)
    with pytest.raises(TidegateError, match="409 No version is being tried"):
        client.predict([INSTANCE], variant="challenger")
    client.rollout_start(version, policy=LONG)
    until(lambda: client.rollout().phase == "shadow", f"{version} is tried", 90)

    def tried() -> bool:
        with contextlib.suppress(TidegateError):  # a gateway that does not follow its table yet
            return client.predict([INSTANCE], variant="challenger")[0].model_version == version
        return False

    until(tried, "a tester gets it before any caller does", 60)
    for variant, wanted in (("challenger", version), ("champion", champion)):
        answers = [client.predict([INSTANCE, INSTANCE], variant=variant) for _ in range(20)]
        assert {answer.model_version for pair in answers for answer in pair} == {wanted}
    evidence = client.rollout().evidence
    assert (evidence.challenger_requests, evidence.served, evidence.copies) == (0, 0, 0)
    client.rollout_command("abort", "the test is over")
    assert finished(client, version) == "aborted"


@pytest.mark.timeout(240)
def test_where_entities_are_assigned_every_district_keeps_its_version(demo, client):
    version = copy(demo, client)
    client.rollout_start(version, policy=LONG.model_copy(update={"assignment": Assignment.ENTITY}))
    districts = [f"dma_{number}" for number in range(1, 11)]

    def versions() -> list[set[str]]:
        asked = [[{**INSTANCE, "district": district}] for district in districts]
        return [{client.predict(one)[0].model_version for _ in range(6)} for one in asked]

    until(
        lambda: client.predict([INSTANCE]) and (s := client.rollout()).phase == "canary" and s.weight > 0, "canary", 90
    )
    until(lambda: len(set().union(*versions())) == 2, "both versions answer", 30)
    assert all(len(found) == 1 for found in versions())
    until(lambda: client.rollout().evidence.served > 0, "what they answered is evidence", 30)
    evidence = client.rollout().evidence
    assert 0 < evidence.challenger_requests - evidence.copies <= len(districts), "entities, not requests"
    client.rollout_command("abort", "the test is over")
    assert finished(client, version) == "aborted"


def commanded(demo, version: str) -> list[tuple[str, str, str]]:
    """What people did to the rollout of a version, as the journal tells it: what, who and why."""
    entries = Journal(Database(demo.settings.database_url), "aqua").read()
    begun = max(i for i, e in enumerate(entries) if e.kind == Kind.STARTED and e.payload["version"] == version)
    started = entries[begun].payload["request"]
    return [
        (Kind.STARTED, started["requested_by"], started["reason"]),
        *((e.kind, e.payload["by"], e.payload["reason"]) for e in entries[begun:] if "by" in e.payload),
    ]


@pytest.mark.timeout(240)
def test_a_canary_is_paused_resumed_and_approved_by_people_whom_the_journal_names(demo, client, load):
    version = copy(demo, client)
    client.rollout_start(version, policy=QUICK.model_copy(update={"approval": True}), reason="to be tried")
    until(lambda: client.rollout().reason == "waiting for approval", "only the approval is missing", 90)
    client.rollout_command("pause", "a look first")
    status = client.rollout()
    assert (status.phase, status.weight, status.paused) == ("canary", 0.5, True)
    assert client.rollout_command("approve", "it looks good").paused
    served = client.rollout().evidence.served
    until(lambda: client.rollout().evidence.served > served + 50, "a paused canary goes on answering", 60)
    assert client.rollout().phase == "canary"
    until(lambda: differences(client) is not None, "both versions' answers are in the table")
    found = client.rollout_differences()
    assert (found.version, found.instances > 50, len(found.worst)) == (version, True, 10)
    assert found.quantiles["1"] < 1e-9, "it is the same model"
    client.rollout_command("resume", "it was seen")
    assert finished(client, version) == "promoted"
    assert commanded(demo, version) == [
        (Kind.STARTED, "owner", "to be tried"),
        (Kind.PAUSED, "owner", "a look first"),
        (Kind.APPROVED, "owner", "it looks good"),
        (Kind.RESUMED, "owner", "it was seen"),
    ]


@pytest.mark.timeout(240)
def test_a_killed_controller_resumes_at_its_step_with_its_evidence(demo, client, load):
    version = copy(demo, client)
    client.rollout_start(version, policy=LONG)
    answering(client, version)
    (controller,) = pids(demo, "ray::RolloutActor")
    os.kill(controller, signal.SIGKILL)
    journal = Journal(Database(demo.settings.database_url), "aqua")
    left = journal.situation()
    until(lambda: pids(demo, "ray::RolloutActor") not in ([], [controller]), "Ray starts the controller again", 60)
    until(lambda: client.rollout().evidence.served > left.evidence.served + 50, "evidence is taken again", 60)
    after = journal.situation()
    assert after.state == left.state
    assert after.evidence.served >= left.evidence.served
    client.rollout_command("abort", "the test is over")
    assert finished(client, version) == "aborted"


@pytest.mark.timeout(240)
def test_a_killed_challenger_harms_nobody(demo, client, load):
    version = copy(demo, client)
    client.rollout_start(version, policy=LONG)
    answering(client, version)
    (challenger,) = replicas(demo, f"aqua-challenger-{version}")
    os.kill(challenger, signal.SIGKILL)
    until(lambda: replicas(demo, f"aqua-challenger-{version}") != [challenger], "it is gone", 60)
    answered = load.answers
    until(lambda: load.answers > answered + 500, "callers go on", 60)
    if client.rollout().phase == "canary":
        with contextlib.suppress(TidegateError):  # its evidence may withdraw it in this very moment
            client.rollout_command("abort", "the test is over")
    assert finished(client, version) in ("aborted", "rolled_back")


@pytest.mark.parametrize("load", [3], indirect=True)
@pytest.mark.timeout(240)
def test_one_of_two_gateways_killed_during_a_canary_fails_no_request(demo, client, load):
    version = copy(demo, client)
    client.rollout_start(version, policy=LONG)
    answering(client, version)
    gateways = replicas(demo, "aqua")
    assert len(gateways) == 2
    os.kill(gateways[0], signal.SIGKILL)
    until(lambda: len(set(replicas(demo, "aqua")) - set(gateways)) == 1, "Serve starts another gateway", 90)
    served = client.rollout().evidence.served
    until(lambda: client.rollout().evidence.served > served + 50, "the canary goes on", 60)
    client.rollout_command("abort", "the test is over")
    assert finished(client, version) == "aborted"


@pytest.mark.timeout(240)
def test_a_version_that_does_not_load_leaves_the_champion_answering(demo, client, load):
    champion = client.rollout().champion
    version = copy(demo, client)
    folder = demo.settings.cache_dir / "models" / "aqua" / version
    Registry(demo.settings).download("aqua", version, demo.settings.cache_dir / "models")
    (folder / "model.onnx").write_bytes(b"not a graph")
    client.rollout_start(version, policy=QUICK)
    assert finished(client, version) == "rolled_back"
    assert client.rollout().champion == champion
    assert version not in load.versions


def test_the_journal_tells_the_whole_story_and_its_replay_agrees_with_what_serves(demo, client):
    entries = Journal(Database(demo.settings.database_url), "aqua").read()
    assert [e.sequence for e in entries] == list(range(1, len(entries) + 1))
    state, status = replay(entries).state, client.rollout()
    assert (state.champion, state.previous, state.phase) == (status.champion, status.previous, status.phase)
    begun = [e for e in entries if e.kind == Kind.STARTED]
    assert all("policy" in e.payload and "request" in e.payload for e in begun)
    tests = sum(e.kind == Kind.TEST_STARTED for e in entries)
    assert sum(e.kind == Kind.WITHDRAWN for e in entries) == len(begun) + tests


def test_the_webhook_is_told_of_every_release_and_of_its_alerts(demo, client):
    ends = (Kind.PROMOTED, Kind.ROLLED_BACK, Kind.ABORTED)
    worth = {
        e.sequence: e.kind
        for e in Journal(Database(demo.settings.database_url), "aqua").read()
        if e.kind in (Kind.ADOPTED, Kind.STARTED, Kind.ADVANCED, *ends)
    }
    assert set(ends) < set(worth.values())

    def told() -> bool:
        releases = {d["release"]["sequence"]: d["change"] for d in demo.webhook.told if "release" in d}
        return worth.items() <= releases.items()

    until(told, "the webhook is told of all of them", 30)
    alerts = [(d["change"], d["alert"]["name"]) for d in demo.webhook.told if "alert" in d]
    for change in ("opened", "resolved"):
        assert (change, "rollout_rolled_back") in alerts


def test_commands_fit_the_phase(demo, client):
    with pytest.raises(TidegateError) as refused:
        client.rollout_command("abort")
    assert refused.value.status == 409
    assert f"does not fit a release that is {client.rollout().phase}; what fits: " in str(refused.value)
    with pytest.raises(TidegateError) as unknown:
        client.rollout_start("99999")
    assert unknown.value.status == 409


def test_the_command_shows_the_release_and_refuses_what_does_not_fit(demo, client):
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        tidegate = str(Path(sys.executable).with_name("tidegate"))
        environment = {**os.environ, "TIDEGATE_URL": demo.url, "TIDEGATE_API_KEY": demo.key}
        return subprocess.run(
            [tidegate, "rollout", "aqua", *arguments], env=environment, capture_output=True, text=True, check=False
        )

    shown = command()
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["champion"] == client.rollout().champion
    refused = command("abort", "--reason", "nothing is wrong")
    assert refused.returncode == 1
    assert "409" in refused.stderr
    assert refused.stdout == ""


@pytest.mark.timeout(240)
def test_a_rollout_is_started_and_steered_by_the_command(demo, client):
    """Under the page's own policy; the cluster's time stands still, so its first stage does not end by itself."""
    version = copy(demo, client)

    def said(action: str, *arguments: str) -> dict[str, Any]:
        done = tidegate(demo, "rollout", "aqua", action, *arguments, "--reason", f"{action} by hand")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    said("start", version)
    until(lambda: (s := client.rollout()).challenger == version and s.phase == "shadow", f"{version} is tried", 90)
    assert said("pause")["paused"] is True
    assert said("resume")["paused"] is False
    assert said("approve")["challenger"] == version
    said("abort")
    assert finished(client, version) == "aborted"
    kinds = (Kind.STARTED, Kind.PAUSED, Kind.RESUMED, Kind.APPROVED, Kind.ABORTED)
    actions = ("start", "pause", "resume", "approve", "abort")
    expected = [(kind, "owner", f"{action} by hand") for kind, action in zip(kinds, actions, strict=True)]
    assert commanded(demo, version) == expected


@pytest.mark.timeout(240)
def test_a_use_case_is_deployed_anew_under_load_and_its_release_stays_where_it_was(demo, client, load):
    """New gateways take over from those that drain; no request fails, and none is repeated."""
    before, (controller,) = client.rollout(), pids(demo, "ray::RolloutActor")
    gateways = replicas(demo, "aqua")
    done = tidegate(demo, "deploy", "aqua")
    assert done.returncode == 0, done.stderr
    assert f"aqua: version {before.champion} answers" in done.stdout
    assert pids(demo, "ray::RolloutActor") not in ([], [controller])
    until(lambda: not set(replicas(demo, "aqua")) & set(gateways), "new gateways answer", 60)
    answered = load.answers
    until(lambda: load.answers > answered + 200, "callers go on", 60)
    assert client.rollout() == before
    (answer,) = client.predict([INSTANCE])
    assert answer.model_version == before.champion
    unknown = tidegate(demo, "deploy", "nothing")
    assert unknown.returncode == 1
    assert "nothing" in unknown.stderr
