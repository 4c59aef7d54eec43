"""Bulk ingest with sources and tables on S3, through moto's real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.database import Database
from cluster.filesystems import open_filesystem
from cluster.settings import Settings
from cluster.tables import Tables
from tests.pipeline.loads import FixedClock, World, everything, readings


@pytest.fixture
def options() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_S3_ALLOW_UNSAFE_RENAME": "true",
    }
    server.stop()


def test_files_on_s3_reach_tables_on_s3(home: Path, options: dict[str, str]) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=options["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="lake")
    filesystem, path = open_filesystem("s3://lake/in/a.parquet", options)
    pq.write_table(
        readings(range(60)).set_column(3, "temperature", pa.array([99.0] + [1.0] * 59)),
        path,
        filesystem=filesystem,
    )
    settings = Settings(home=home, tables_url="s3://lake/tables", storage_options=options)
    database = Database(settings.database_url)
    database.create()
    here = World(settings, Tables(settings.tables_url, settings.storage_options), database, FixedClock())
    report = here.load(["s3://lake/in"])
    assert (report.status, report.rows_in, report.accepted) == ("published", 60, 59)
    accepted, quarantine = everything(here.tables)
    assert (accepted.num_rows, quarantine.column("source").to_pylist()) == (59, ["a.parquet"])
    staged = client.list_objects_v2(Bucket="lake", Prefix="tables/_staging/").get("Contents", [])
    assert [item["Key"] for item in staged if item["Key"].endswith(".arrow")] == []
