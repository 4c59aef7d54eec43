"""Refusals as RFC 9457 problem documents: what was wrong, where, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

MEDIA_TYPE = b"application/problem+json"


@dataclass(eq=False)
class Problem(Exception):
    """An answer that refuses: HTTP status, short title, what to do, and where it was found.

    Not frozen: whoever handles an exception may set its traceback.
    """

    status: int
    title: str
    detail: str
    errors: list[dict[str, Any]] = field(default_factory=list)
    retry_after_s: int | None = None

    def body(self) -> bytes:
        """The problem document as JSON."""
        document: dict[str, Any] = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            document["errors"] = self.errors
        return orjson.dumps(document)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that go with the document."""
        headers = [(b"content-type", MEDIA_TYPE)]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers
