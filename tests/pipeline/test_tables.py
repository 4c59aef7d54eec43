"""Delta tables on files and on S3 over HTTP: loads commit once, reads are pinned and typed as declared."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from deltalake import Field as DeltaField
from deltalake.exceptions import TableNotFoundError
from deltalake.schema import PrimitiveType

from cluster.tables import NoVersion, Tables
from tests import services

SCHEMA = pa.schema(
    [
        ("entity", pa.string()),
        ("time", pa.timestamp("us", "UTC")),
        ("value", pa.float64()),
        ("status", pa.list_(pa.uint8())),
        ("_bucket", pa.int32()),
    ]
)


def rows(*numbers: int) -> pa.Table:
    """One row per number; its bucket is the number modulo 3."""
    return pa.table(
        {
            "entity": [f"e{n}" for n in numbers],
            "time": list(numbers),
            "value": [n / 7 for n in numbers],
            "status": [[n % 256, 255] if n % 2 else None for n in numbers],
            "_bucket": [n % 3 for n in numbers],
        },
        schema=SCHEMA,
    )


def in_order(table: pa.Table) -> pa.Table:
    return table.sort_by("time").combine_chunks()


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with services.s3("tables") as options:
        yield options


@pytest.fixture(params=["file", "s3"])
def tables(request, tmp_path) -> Tables:
    if request.param == "file":
        made = Tables((tmp_path / "a place").as_uri())
    else:
        made = Tables(f"s3://tables/{tmp_path.name}", request.getfixturevalue("bucket"))
    made.ensure("aqua/events", SCHEMA, ["_bucket"])
    return made


def grow(tables: Tables, name: str, schema: pa.Schema, partition_by: list[str]) -> None:
    """In another process: deltalake keeps the interpreter's lock meanwhile, and the S3 server is in this one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_grown, (tables, name, schema, partition_by))


def _grown(tables: Tables, name: str, schema: pa.Schema, partition_by: list[str]) -> None:
    tables.ensure(name, schema, partition_by, grows=True)


def test_a_table_that_grows_keeps_its_rows_and_refuses_other_types(tables) -> None:
    tables.ensure("grown", SCHEMA, ["_bucket"])
    tables.append("grown", rows(1, 2, 3), "load")
    wider = pa.schema([*SCHEMA, ("extra", pa.list_(pa.uint8())), ("note", pa.string())])
    with pytest.raises(ValueError, match=r"extra .* is not a column of it"):
        tables.ensure("grown", wider, ["_bucket"])
    grow(tables, "grown", wider, ["_bucket"])
    grow(tables, "grown", wider, ["_bucket"])
    assert tables.schema("grown") == wider
    more = rows(4).append_column("extra", pa.array([[7]], pa.list_(pa.uint8())))
    tables.append("grown", more.append_column("note", pa.array(["new"])), "load", 2)
    found = in_order(tables.read("grown"))
    assert found.select(SCHEMA.names) == in_order(rows(1, 2, 3, 4))
    assert found["extra"].to_pylist() == [None, None, None, [7]]
    other = pa.schema([field if field.name != "value" else pa.field("value", pa.string()) for field in wider])
    even_wider = pa.schema([*other, ("more", pa.int64())])
    with pytest.raises(ValueError, match="value is double, given string"):
        tables.ensure("grown", even_wider, ["_bucket"], grows=True)
    assert tables.schema("grown") == wider, "refused, and yet grown"


def test_a_table_that_was_grown_halfway_grows_on(tmp_path) -> None:
    tables = Tables(tmp_path.as_uri())
    tables.ensure("half", SCHEMA)
    DeltaTable(tables.uri("half")).alter.add_columns([DeltaField("note", PrimitiveType("string"))])
    wider = pa.schema([*SCHEMA, ("note", pa.string())])
    tables.ensure("half", wider, grows=True)
    assert tables.schema("half") == wider


@pytest.fixture
def local(tmp_path) -> Tables:
    made = Tables(tmp_path.as_uri())
    made.ensure("aqua/events", SCHEMA, ["_bucket"])
    return made


def test_what_is_appended_is_read_as_declared(tables):
    commit = tables.append("aqua/events", rows(1, 2, 3, 4, 255), "load")
    assert commit.applied
    found = tables.read("aqua/events")
    assert found.schema == SCHEMA
    assert in_order(found) == rows(1, 2, 3, 4, 255)
    assert commit.version == tables.version("aqua/events") == 1


def test_a_load_commits_once(tables):
    first = tables.append("aqua/events", rows(1, 2), "load")
    again = tables.append("aqua/events", rows(1, 2), "load")
    assert (first.applied, again.applied) == (True, False)
    assert again.version == first.version
    files = [tables.write_file("aqua/events", rows(3), {"_bucket": 0})]
    assert not tables.commit("aqua/events", files, "load").applied
    assert in_order(tables.read("aqua/events")) == rows(1, 2)


def test_a_marker_lets_only_later_ones_follow(tables):
    for marker, applied in ((5, True), (5, False), (3, False), (9, True)):
        assert tables.append("aqua/events", rows(marker), "drain", marker).applied is applied
    assert in_order(tables.read("aqua/events")) == rows(5, 9)
    assert tables.marker("aqua/events", "drain") == 9
    assert tables.marker("aqua/events", "other") is None


def test_a_load_without_rows_leaves_its_marker(tables):
    assert tables.append("aqua/events", rows(), "load").applied
    assert tables.marker("aqua/events", "load") == 1
    assert tables.read("aqua/events") == rows()


def test_a_written_file_is_unseen_until_it_is_committed(tables):
    file = tables.write_file("aqua/events", rows(4, 1), {"_bucket": 1})
    assert (file.rows, file.partition) == (2, {"_bucket": "1"})
    assert file.path.startswith("_bucket=1/")
    assert tables.read("aqua/events").num_rows == 0
    tables.commit("aqua/events", [file], "load")
    assert tables.read("aqua/events").combine_chunks() == rows(4, 1)


def test_reads_are_pinned_filtered_and_pruned(tables):
    first = tables.append("aqua/events", rows(0, 1, 2), "a").version
    tables.append("aqua/events", rows(3, 4, 5), "b")
    assert in_order(tables.read("aqua/events", version=first)) == rows(0, 1, 2)
    assert in_order(tables.read("aqua/events", partition={"_bucket": [1, 2]})) == rows(1, 2, 4, 5)
    assert in_order(tables.read("aqua/events", partition={"_bucket": ["1"]})) == rows(1, 4)
    late = tables.read("aqua/events", columns=["_bucket", "entity"], filter=pc.field("value") > 3.5 / 7)
    assert late.sort_by("entity").to_pydict() == {"_bucket": [1, 2], "entity": ["e4", "e5"]}
    assert late.schema.field("_bucket").type == pa.int32()


def test_files_are_those_of_the_version_and_partition(tables):
    first = tables.append("aqua/events", rows(0, 1, 2), "a").version
    tables.append("aqua/events", rows(3, 4), "b")
    assert len(tables.files("aqua/events")) == 5
    assert len(tables.files("aqua/events", version=first)) == 3
    (only,) = tables.files("aqua/events", partition={"_bucket": [2]})
    assert only.startswith(tables.uri("aqua/events") + "/_bucket=2/")


def test_compaction_changes_files_and_no_rows(tables):
    for number in range(6):
        pinned = tables.append("aqua/events", rows(number, number + 100), f"load {number}").version
    before, files = in_order(tables.read("aqua/events")), tables.files("aqua/events")
    assert tables.compact("aqua/events") > 0
    assert len(tables.files("aqua/events")) == 3 < len(files)
    assert in_order(tables.read("aqua/events")) == before
    assert tables.read("aqua/events").schema == SCHEMA
    assert tables.files("aqua/events", version=pinned) == files
    assert tables.marker("aqua/events", "load 3") == 1


def test_it_pickles_and_lists_nothing_of_its_connection(tables):
    tables.append("aqua/events", rows(1), "load")
    assert pickle.loads(pickle.dumps(tables)).read("aqua/events") == rows(1)  # noqa: S301


def test_vacuum_removes_orphans_and_replaced_files_of_age_only(local, tmp_path):
    for number in range(2):
        local.append("aqua/events", rows(number * 3), f"load {number}")
    root, month = tmp_path / "aqua/events", time.time() - 30 * 86_400
    old, young = (local.write_file("aqua/events", rows(3), {"_bucket": 0}).path for _ in range(2))
    for file in [root / old, *(Path(uri.removeprefix("file://")) for uri in local.files("aqua/events"))]:
        os.utime(file, (month, month))
    local.compact("aqua/events")
    assert local.vacuum("aqua/events", timedelta(days=7)) == [old]
    assert (root / young).exists()
    assert in_order(local.read("aqua/events", version=2)) == rows(0, 3)  # replaced just now: still readable
    assert len(local.vacuum("aqua/events", timedelta(0))) == 3
    assert not (root / young).exists()
    assert in_order(local.read("aqua/events")) == rows(0, 3)


def test_ensuring_a_table_again_changes_nothing(tables):
    tables.ensure("aqua/events", SCHEMA, ["_bucket"])
    assert tables.version("aqua/events") == 0
    assert tables.exists("aqua/events")
    assert not tables.exists("aqua/nothing")


def test_another_schema_is_refused_by_field(local):
    other = pa.schema([("entity", pa.string()), ("time", pa.int64()), ("extra", pa.bool_())])
    with pytest.raises(ValueError) as caught:
        local.ensure("aqua/events", other, ["_bucket"])
    for fault in (
        "time is timestamp[us, tz=UTC], given int64",
        "value (double) is missing",
        "extra (bool) is not",
    ):
        assert fault in str(caught.value)
    with pytest.raises(ValueError, match=r"partitioned by \['_bucket'\], not by \['entity'\]"):
        local.ensure("aqua/events", SCHEMA, ["entity"])


def test_rows_of_another_schema_are_not_written(local, tmp_path):
    wrong = rows(1).set_column(2, "value", pa.array(["text"]))
    with pytest.raises(ValueError, match="value is double, given string"):
        local.append("aqua/events", wrong, "load")
    with pytest.raises(ValueError, match="value \\(double\\) is missing"):
        local.write_file("aqua/events", rows(1).drop_columns(["value"]), {"_bucket": 1})
    assert not list((tmp_path / "aqua/events").rglob("*.parquet"))
    assert local.marker("aqua/events", "load") is None


@pytest.mark.parametrize("partition", [{}, {"_bucket": 1, "entity": "e"}, {"_bucket": "a/../b"}, {"_bucket": ""}])
def test_a_partition_that_does_not_fit_is_refused(local, partition):
    with pytest.raises(ValueError, match="partition"):
        local.write_file("aqua/events", rows(1), partition)


def test_pruning_by_what_is_no_partition_is_refused(local):
    with pytest.raises(ValueError, match="cannot be pruned by \\['entity'\\]"):
        local.read("aqua/events", partition={"entity": ["e1"]})


@pytest.mark.parametrize("version", [7, -1, 2**20, 2**40, 2**63, 2**64])
def test_a_version_that_is_not_there_says_so_at_once(tables, version):
    asked = f"'aqua/events' has no version {version}: its newest is 0; ask for one from 0 to 0, or for none"
    begun = time.monotonic()
    for ask in (tables.read, tables.files, tables.entries):
        with pytest.raises(NoVersion, match=asked):
            ask("aqua/events", version=version)
    assert time.monotonic() - begun < 5


def test_a_version_of_which_the_log_was_cleaned_says_so(local, tmp_path):
    for number in (1, 2):
        local.append("aqua/events", rows(number), "load", number)
    DeltaTable(local.uri("aqua/events")).create_checkpoint()  # as Delta does it, before it deletes older entries
    for version in (0, 1):
        (tmp_path / f"aqua/events/_delta_log/{version:020d}.json").unlink()
    with pytest.raises(NoVersion, match="'aqua/events' no longer has version 1: its newest is 2; ask for a later"):
        local.read("aqua/events", version=1)
    assert local.read("aqua/events", version=2).num_rows == 2


def test_a_table_that_is_not_there_says_so(local):
    with pytest.raises(TableNotFoundError, match=r"there is no table 'aqua/nothing' below file:"):
        local.read("aqua/nothing")


@pytest.mark.parametrize("name", ["", "/etc", "a//b", "a/../b", "a b", "a/"])
def test_a_name_that_would_leave_its_place_is_refused(local, name):
    with pytest.raises(ValueError, match="table name"):
        local.uri(name)


@pytest.mark.parametrize("url", ["/no/scheme", "gs://bucket", "file://host/path"])
def test_other_stores_are_refused(url):
    with pytest.raises(ValueError, match="tables live below file:///… or s3://…"):
        Tables(url)


def _append(tables, number, start, answers):
    start.wait()
    shared = [tables.append("aqua/events", rows(n), f"shared {n}").applied for n in range(3)]
    own = [tables.append("aqua/events", rows(100 * (number + 1) + n), f"own {number} {n}").applied for n in range(3)]
    answers.put((shared, own))


def test_racing_processes_commit_every_load_once(tables):
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    children = [context.Process(target=_append, args=(tables, n, start, answers)) for n in range(2)]
    for child in children:
        child.start()
    found = [answers.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    for shared in zip(*(answer[0] for answer in found), strict=True):
        assert sum(shared) == 1
    assert all(all(answer[1]) for answer in found)
    expected = [*range(3), *(100 * (number + 1) + n for number in range(2) for n in range(3))]
    assert in_order(tables.read("aqua/events")) == rows(*expected)


def _create(tables, start, answers):
    start.wait()
    tables.ensure("aqua/raced", SCHEMA, ["_bucket"])
    answers.put(tables.version("aqua/raced"))


def test_racing_processes_create_one_table(tables):
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    children = [context.Process(target=_create, args=(tables, start, answers)) for _ in range(2)]
    for child in children:
        child.start()
    assert [answers.get(timeout=120) for _ in children] == [0, 0]
    for child in children:
        child.join()


def test_a_process_that_reads_and_writes_ends_cleanly(local):
    code = (
        "import pyarrow as pa, sys; from cluster.tables import Tables\n"
        "t = Tables(sys.argv[1]); s = pa.schema([('a', pa.int64())]); t.ensure('x', s)\n"
        "t.append('x', pa.table({'a': [1]}, schema=s), 'k'); t.compact('x'); assert t.read('x').num_rows == 1"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, local.url], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
