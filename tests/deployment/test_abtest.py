"""An A/B test on a real cluster: several versions answer at the same time, outcomes decide, the winner is released."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from datetime import timedelta

import pyarrow.compute as pc
import pytest

from cluster.tables import Tables
from pipelines import usecases
from pipelines.features.served import predictions_table
from pipelines.spec import ABTest, Assignment, Goal, Measure, Variant
from serving.client import TidegateError
from serving.drills import Drill
from tests.deployment import releasing
from tests.deployment.releasing import INSTANCE, SETTLED, copy, replicas, tidegate
from tests.deployment.waiting import until

load, client = releasing.load, releasing.client  # fixtures


def definition(*versions: str, share: float = 0.3, **changes: object) -> ABTest:
    given = {
        "variants": tuple(Variant(version=version, share=share) for version in versions),
        "unit": Assignment.INSTANCE,
        "measure": Measure.OUTCOME,
        "goal": Goal.HIGHER,
        "units": 100,
        "time": timedelta(0),
        **changes,
    }
    return ABTest.model_validate(given)


def give_outcomes(client, best: str) -> set[str]:
    """Answers of a few requests, each with an outcome that is better where ``best`` answered; who answered."""
    answers = client.predict([INSTANCE] * 30)
    client.feedback({a.prediction_id: random.gauss(1.0 if a.model_version == best else 0.0, 0.5) for a in answers})
    return {answer.model_version for answer in answers}


@pytest.mark.timeout(300)
def test_the_better_version_wins_by_its_outcomes_and_its_release_is_asked_for(demo, client, load, tmp_path):
    champion, better, other = client.rollout().champion, copy(demo, client), copy(demo, client)
    gateways = replicas(demo, "aqua")
    began = client.ab_start(definition(better, other), reason="which is better")
    assert (began.champion, began.running, [one.version for one in began.variants]) == (champion, True, [better, other])
    assert client.rollout().phase == "testing"
    until(lambda: give_outcomes(client, better) == {champion, better, other}, "all versions answer", 90)
    with pytest.raises(TidegateError, match="409 No version is being tried"):
        client.predict([INSTANCE], variant="challenger")
    with pytest.raises(TidegateError, match="does not fit a release that is testing"):
        client.ab_start(definition(better), reason="another one")
    (pid,) = replicas(demo, f"aqua-challenger-{other}")
    os.kill(pid, signal.SIGKILL)  # of which callers notice nothing, as the load sees
    until(lambda: (give_outcomes(client, better), client.ab_test().outcome)[1] == "won", "somebody wins", 120)
    ended = client.ab_test()
    assert (ended.winner, ended.running) == (better, False)
    assert {one.version: one.finding for one in ended.variants}[better] == "better"
    assert sum(ended.assigned) > 100
    assert ended.sample_ratio.log_e < ended.sample_ratio.threshold
    until(lambda: client.rollout().challenger == better, "the release of the winner begins", 60)
    told = client.ab_test()
    assert (told.winner, told.variants, told.champion) == (better, ended.variants, champion), "it is still told of"

    page = tmp_path / "test.html"
    said = tidegate(demo, "ab", "aqua", "report", "--out", str(page))
    assert said.returncode == 0, said.stderr
    assert f"won, version {better}" in page.read_text()
    assert "<svg" in page.read_text()
    client.rollout_command("abort", "the test is about who won")
    until(lambda: client.rollout().phase in SETTLED, "it is over")
    assert replicas(demo, "aqua") == gateways, "no gateway was replaced"
    tables, name = Tables(demo.settings.tables_url), predictions_table(usecases.load("aqua"))
    columns = ["assigned", "model_version", "unit"]
    mine = tables.read(name, columns=columns, filter=pc.field("test") == ended.test).to_pylist()
    assert {row["assigned"] for row in mine} == {champion, better, other}
    assert all(row["unit"] for row in mine)
    assert all(row["model_version"] in (row["assigned"], champion) for row in mine)


@pytest.mark.timeout(240)
def test_a_variant_that_hurts_ends_the_test_and_no_caller_notices(demo, client, load, tmp_path):
    champion, bad = client.rollout().champion, copy(demo, client, Drill(errors=1.0))
    page = tmp_path / "test.json"
    page.write_text(json.dumps({"unit": "instance"}))
    options = ("--variant", f"{bad}=0.5", "--definition", str(page), "--reason", "it looks good")
    said = tidegate(demo, "ab", "aqua", "start", *options)
    assert said.returncode == 0, said.stderr
    until(lambda: client.rollout().phase in SETTLED, "it is over", 120)
    ended = client.ab_test()
    assert (ended.outcome, ended.winner, ended.champion) == ("lost", None, champion)
    assert (ended.served, ended.accidents >= 100) == (0, True)
    assert bad not in load.versions


@pytest.mark.timeout(240)
def test_where_entities_are_assigned_a_district_keeps_its_version_until_the_test_is_aborted(demo, client):
    one, gateways = copy(demo, client), replicas(demo, "aqua")
    client.ab_start(definition(one, share=0.6, unit=Assignment.ENTITY, units=100_000), reason="by district")
    every = [{**INSTANCE, "district": f"dma_{number}"} for number in range(1, 11)]

    def versions() -> tuple[str, ...]:
        return tuple(answer.model_version for answer in client.predict(every))

    until(lambda: all(one in versions() for _ in range(10)), "a variant answers at every gateway", 90)
    assert len({versions() for _ in range(10)}) == 1
    assert client.ab_command("pause", "to look at it").paused
    until(lambda: all(one not in versions() for _ in range(10)), "the champion answers all while it is paused", 10)
    client.ab_command("resume", "seen")
    until(lambda: one in versions(), "it goes on", 30)
    said = tidegate(demo, "ab", "aqua", "abort", "--reason", "seen enough")
    assert said.returncode == 0, said.stderr
    until(lambda: client.rollout().phase in SETTLED, "it is over")
    assert client.ab_test().outcome == "aborted"
    assert replicas(demo, "aqua") == gateways, "no gateway was replaced"
    with pytest.raises(TidegateError, match=r"409 .*no A/B test is running"):
        client.ab_command("abort", "once more")


def test_a_test_that_cannot_be_is_refused_with_the_reason(demo, client, tmp_path):
    champion = client.rollout().champion
    for version, why in ((champion, "is the champion"), ("99999", "99999")):
        with pytest.raises(TidegateError, match=f"409 The A/B test cannot begin.*{why}"):
            client.ab_start(definition(version), reason="")
    for options, why in (
        (["--variant", "2=1.5"], "variants.0.share: Input should be less than 1"),
        (["--variant", "two"], "variants.0.version"),
        ([], "variants: Field required"),
    ):
        said: subprocess.CompletedProcess[str] = tidegate(demo, "ab", "aqua", "start", *options)
        assert said.returncode == 1
        assert f"that is no A/B test: {why}" in said.stderr
    page = tmp_path / "test.json"
    for text, why in (
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"variants": []}', "leave one of them out"),
    ):
        if text is not None:
            page.write_text(text)
        said = tidegate(demo, "ab", "aqua", "start", "--variant", "2=0.5", "--definition", str(page))
        assert said.returncode == 1
        assert str(page) in said.stderr
        assert why in said.stderr
