"""Season's normals are the medians they claim to be, and stay with their model version."""

from __future__ import annotations

import json
import math
import statistics
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipelines.spec import Fallback
from pipelines.training import artifact as artifacts
from pipelines.training.artifact import ArtifactError, Calibration, HalfWidths, Level, Runner, write_page
from pipelines.training.dataset import Frame
from pipelines.training.normals import NORMALS, Normals, NormalsError, read_normals, season_normals
from tests.data.worlds import same_bits
from tests.model.test_artifact import ask, inputs, make

ZONE = "Europe/Rome"
HOUR = 3_600_000_000
START = int(datetime(2022, 3, 26, tzinfo=UTC).timestamp()) * 1_000_000  # the night before the clocks change


def policy(rows: int = 2, slots: tuple[str, ...] = ("hour", "weekend", "month")) -> Fallback:
    day = timedelta(days=1)
    return Fallback(hold=day, silence=day, zone=ZONE, slots=slots, rows=rows)


def frame(times: list[int], entities: list[str], values: list[list[float]]) -> Frame:
    columns = {name: np.array([row[i] for row in values]) for i, name in enumerate(("a", "b"))}
    names = np.array(entities, dtype=object)
    return Frame(np.array(times, np.int64), np.zeros(len(times)), names, columns, {"place": names})


def parts_of(time_us: int, slots: tuple[str, ...]) -> tuple[int, ...]:
    local = datetime.fromtimestamp(time_us / 1e6, ZoneInfo(ZONE))
    return tuple({"hour": local.hour, "weekend": int(local.weekday() >= 5), "month": local.month}[s] for s in slots)


def oracle(told: Frame, column: str, asked: Fallback, entity: str, time_us: int) -> float:
    """The median of the finest slot that has enough values, from the rows themselves."""
    for depth in range(len(asked.slots), 0, -1):
        slots = asked.slots[:depth]
        values = [
            float(value)
            for value, at, name in zip(told.columns[column], told.time_us, told.entity, strict=True)
            if name == entity and math.isfinite(value) and parts_of(int(at), slots) == parts_of(time_us, slots)
        ]
        if len(values) >= asked.rows:
            return statistics.median(values)
    return math.nan


_VALUES = st.one_of(st.just(math.nan), st.sampled_from([0.1, 0.2, 0.3, -7.0, 1e6]), st.floats(-1e9, 1e9))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_normal_is_the_median_of_the_finest_slot_with_enough_rows(data: st.DataObject) -> None:
    slots = data.draw(st.sampled_from([("hour",), ("hour", "month"), ("hour", "weekend", "month"), ("month", "hour")]))
    asked = policy(data.draw(st.integers(1, 4)), slots)
    moment = st.builds(
        lambda day, hour, rest: START + (day * 24 + hour) * HOUR + rest,
        st.sampled_from([0, 1, 2, 5, 6, 7, 31, 365]),
        st.integers(0, 2),
        st.sampled_from([0, 1, HOUR - 1]),
    )
    count = data.draw(st.integers(1, 40))
    told = frame(
        data.draw(st.lists(moment, min_size=count, max_size=count)),
        data.draw(st.lists(st.sampled_from(["north", "south"]), min_size=count, max_size=count)),
        data.draw(st.lists(st.lists(_VALUES, min_size=2, max_size=2), min_size=count, max_size=count)),
    )
    table = season_normals(asked, ("a", "b"), told)
    times = data.draw(st.lists(moment, min_size=4, max_size=4))
    for entity in ("north", "south"):
        found = table.at([entity] * 4, np.array(times, np.int64))
        wanted = [[oracle(told, column, asked, entity, at) for column in ("a", "b")] for at in times]
        assert same_bits(found, np.array(wanted))


def table() -> Normals:
    times = [START + i * HOUR for i in range(96)]
    return season_normals(policy(), ("a", "b"), frame(times * 2, ["north"] * 192, [[i / 7, i] for i in range(192)]))


def test_an_entity_without_training_rows_has_no_normals() -> None:
    found = table().at(["nowhere", "north"], np.array([START, START], np.int64))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_normals_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    made = table()
    made.save(tmp_path)
    found = read_normals(tmp_path)
    assert same_bits(found.values, made.values)
    assert (found.zone, found.slots, found.features, found.places) == (ZONE, made.slots, ("a", "b"), {"north": 0})


def test_a_file_of_another_format_or_of_nothing_is_refused(tmp_path: Path) -> None:
    save_file({"values": np.zeros((1, 24, 2))}, tmp_path / NORMALS, {"format": "2", "page": "{}"})
    with pytest.raises(NormalsError, match="has format '2'"):
        read_normals(tmp_path)
    (tmp_path / NORMALS).write_bytes(b"nothing")
    with pytest.raises(NormalsError, match="does not hold normals"):
        read_normals(tmp_path)


@pytest.fixture
def version(tmp_path: Path) -> Path:
    make(tmp_path)
    return tmp_path


def test_a_version_without_normals_loads_and_has_none(version: Path) -> None:
    document = json.loads((version / "artifact.json").read_text())
    calibration = {"coverage": 0.9, "everywhere": 2.0, "by_entity": {}, "rows": 900}  # as an older version wrote it
    (version / "artifact.json").write_text(json.dumps({**document, "calibration": calibration}))
    runner = Runner(version)
    assert runner.normals is None
    assert runner.artifact.calibration == Calibration(coverage=0.9, everywhere=2.0, rows=900)


def test_normals_of_a_version_are_checked_like_its_other_files(version: Path) -> None:
    table().save(version)
    assert Runner(version).normals is None, "a file that the page does not name is not part of the version"
    write_page(version, artifacts.load(version))
    found = Runner(version).normals
    assert found is not None
    assert same_bits(found.values, table().values)
    whole = (version / NORMALS).read_bytes()
    (version / NORMALS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"normals.safetensors is not the file"):
        Runner(version)
    (version / NORMALS).unlink()
    with pytest.raises(ArtifactError, match=r"holds no normals.safetensors"):
        Runner(version)


def test_each_row_takes_the_interval_of_its_own_rung(version: Path) -> None:
    calibration = Calibration(
        coverage=0.9, everywhere=1.0, by_entity={"north": 0.5}, rows=900,
        held=HalfWidths(everywhere=2.0, by_entity={"north": 0.7}, rows=900),
        normal=HalfWidths(everywhere=4.0, rows=900),
    )  # fmt: skip
    write_page(version, artifacts.load(version).model_copy(update={"calibration": calibration}))
    given_ = inputs(6)
    given_["categories"][:, 0] = [1, 1, 1, 2, 2, 2]  # north and south
    runner = Runner(version)
    level = np.array([Level.FRESH, Level.HELD, Level.NORMAL] * 2, np.uint8)
    wanted = [0.5, 0.7, 4.0, 1.0, 2.0, 4.0]
    found = ask(runner, given_, level)
    assert (found.upper - found.value) / given_["scale"] == pytest.approx(wanted)
    assert (found.value - found.lower) / given_["scale"] == pytest.approx(wanted)
    assert same_bits(found.value, ask(runner, given_).value), "the level changes no answer"


def test_a_rung_that_was_not_calibrated_gives_no_interval(version: Path) -> None:
    calibration = Calibration(coverage=0.9, everywhere=1.0, rows=900)
    write_page(version, artifacts.load(version).model_copy(update={"calibration": calibration}))
    found = ask(Runner(version), inputs(3), np.array([0, 1, 2], np.uint8))
    assert np.isfinite(found.value).all()
    assert np.isnan(found.upper).tolist() == [False, True, True]
