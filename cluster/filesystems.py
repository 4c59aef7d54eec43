"""pyarrow filesystems for table URIs, from the same storage options that Delta's object store takes."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs


def open_filesystem(uri: str, storage_options: Mapping[str, str]) -> tuple[pafs.FileSystem, str]:
    """The filesystem of ``uri`` and the path of ``uri`` on it.

    Options are named as object_store names them, in any case: ``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``. Those not
    given are found as the AWS SDK finds them. Raises ``ValueError`` for other schemes.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return pafs.LocalFileSystem(), unquote(parts.path)
    if parts.scheme != "s3":
        raise ValueError(f"{uri!r} is neither file:///… nor s3://…: tables live in one of these")
    options = {key.lower().removeprefix("aws_"): value for key, value in storage_options.items()}
    endpoint = options.get("endpoint_url") or options.get("endpoint")
    where = urlsplit(endpoint) if endpoint else None
    return (
        pafs.S3FileSystem(
            access_key=options.get("access_key_id"),
            secret_key=options.get("secret_access_key"),
            session_token=options.get("session_token"),
            region=options.get("region") or options.get("default_region"),
            scheme=where.scheme if where else "https",
            endpoint_override=where.netloc if where else None,
        ),
        f"{parts.netloc}{parts.path}",
    )
