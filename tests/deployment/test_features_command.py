"""``tidegate features`` beside a running gateway: training table, audit of what was served, and state by name."""

from __future__ import annotations

import json
import subprocess

from pipelines import usecases
from tests.deployment.conftest import DemoRun
from tests.deployment.releasing import INSTANCE, tidegate


def said(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_show_is_what_the_gateway_reads(demo: DemoRun) -> None:
    with demo.client() as client:
        served = client.features("dma_1")
    shown = said(tidegate(demo, "features", "show", "aqua", "dma_1"))
    assert list(shown["features"]) == list(usecases.load("aqua").view.stored)
    assert shown["features"]["inflow_mean_7d"]["value"] == served.features["inflow_mean_7d"].value
    unknown = tidegate(demo, "features", "show", "aqua", "dma_999")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "dma_999" in unknown.stderr


def test_audit_makes_what_was_served_again(demo: DemoRun) -> None:
    with demo.client() as client:
        for _ in range(20):
            client.predict([INSTANCE])
    report = said(tidegate(demo, "features", "audit", "aqua", "--hours", "500", "--share", "0.5"))
    assert report["checked"] > 0
    assert report["mismatched"] == 0
    pages = sorted((demo.settings.cache_dir / "models" / "aqua").glob("*/artifact.json"))
    kept = [page.read_text() for page in pages]
    for page in pages:
        page.write_text("{")
    damaged = tidegate(demo, "features", "audit", "aqua", "--hours", "500", "--share", "0.5")
    for page, text in zip(pages, kept, strict=True):
        page.write_text(text)
    assert damaged.returncode == 1
    assert damaged.stderr.splitlines()[-1].endswith("delete that copy, and what needs the version fetches it again")
    refused = tidegate(demo, "features", "audit", "aqua", "--share", "5")
    assert refused.returncode == 2
    assert "a share lies above 0" in refused.stderr


def test_backfill_makes_only_what_is_not_there(demo: DemoRun) -> None:
    assert said(tidegate(demo, "features", "backfill", "aqua"))["rows"] > 0
    assert said(tidegate(demo, "features", "backfill", "aqua"))["buckets"] == 0
