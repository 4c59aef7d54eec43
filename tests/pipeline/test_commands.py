"""What commands say when their user can do something about it: one line, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import audit, backfill, ingest
from serving import cli


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("arguments", [["prop"], ["prop", "--materialize", "--only-state"]])
def test_features_of_a_table_that_is_not_there(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"no table 'prop/events' .* `python -m pipelines.ingest prop FILE …`"):
        backfill.main(arguments)


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match=r"no source 'missing.parquet': name existing files"):
        ingest.main(["prop", "missing.parquet"])


@pytest.mark.parametrize("hours", ["-1", "0", "nan", "inf"])
def test_hours_of_an_audit_are_above_zero(hours: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        audit.main(["prop", f"--hours={hours}"])
    assert ended.value.code == 2
    assert "hours are above 0" in capsys.readouterr().err


def test_state_that_is_none_and_an_entity_not_there(environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["features", "show", "prop", "area_12"]) == 1
    assert "no event of 'area_12': check the name; events of files get there by" in capsys.readouterr().err
    for data in (environment / "state" / "prop" / "views").glob("*/data.mdb"):
        data.write_bytes(b"no pages" * 1_000)
    with pytest.raises(SystemExit, match=r"is no state .* move it away, .* rebuild the state"):
        cli.main(["features", "show", "prop", "area_12"])
